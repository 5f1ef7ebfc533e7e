"""A folder of golden data: a small published checkpoint, and what its official code computed.

A measure is a function of a `Golden` that compares our quantities with the official ones under
their names; `golden.py` runs it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from textdiff import load_denoiser
from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives import Prediction
from textdiff.loss import Batch, PositionTerms
from textdiff.models import FULL, Denoiser, Layout

LOWEST = -1e5  # the official codes write minus infinity as about -1e6

KINDS = {
    "raw_logits": "logits",
    "log_probs": "log-probabilities",
    "log_score": "log-probabilities",
    "nelbo": "losses",
    "loss": "losses",
    "nll": "losses",
    "diffusion": "losses",
    "reconstruction": "losses",
    "score_entropy": "losses",
    "cross_entropy": "losses",
}
"""Kinds of quantities by the last part of their names; others are probabilities or settings."""

SETTINGS = ("t", "sigma", "dsigma", "alpha", "dalpha", "move_chance", "beta_pi")


@dataclass(frozen=True)
class Comparison:
    """One quantity, ours against the official one.

    Attributes:
        name: in `cases.safetensors`.
        difference: the largest, absolute or relative to the largest official entry.
        tolerance: of `cases.json`, in the same terms.
        relative: whether it is relative.
        entries: how many were compared.
    """

    name: str
    difference: float
    tolerance: float
    relative: bool
    entries: int

    @property
    def kind(self) -> str:
        """Logits, log-probabilities, losses, probabilities or settings."""
        last = self.name.rsplit("/", 1)[-1]
        if last.startswith("loss"):
            return "losses"
        for end, kind in KINDS.items():
            if last.endswith(end):
                return kind
        return "settings" if last in SETTINGS else "probabilities"


class Golden:
    """A folder of golden data, opened by the public way."""

    def __init__(self, folder: Path, file: str = ""):
        self.folder = folder
        self.cases = load_file(folder / "cases.safetensors")
        self.described = json.loads((folder / "cases.json").read_text())["tensors"]
        denoiser, self.family = load_denoiser(folder / file)
        self.denoiser: Denoiser = denoiser
        self.rows = self.denoiser.config.vocab_size

    def __getitem__(self, name: str) -> Tensor:
        return self.cases[name]

    def __contains__(self, name: str) -> bool:
        return name in self.cases

    @cached_property
    def masked(self) -> Tensor:
        """[B, L] bool: positions that hold the mask."""
        return self["x_t"] == self.family.process.mask_token_id

    def compare(self, name: str, ours: Tensor, where: Tensor | None = None) -> Comparison:
        """Compare a quantity with the official one.

        Args:
            name: in the cases.
            ours: of its shape, or with more rows at the end of the last dimension.
            where: bool, entries that count, broadcast from the left; None: all.
        """
        official = self[name]
        ours = ours[..., : official.shape[-1]] if official.ndim else ours
        assert ours.shape == official.shape, (name, ours.shape, official.shape)
        if where is not None:
            where = where.reshape(*where.shape, *[1] * (ours.ndim - where.ndim)).expand(ours.shape)
            ours, official = ours[where], official[where]
        tolerance = self.described[name].get("tolerance", {"absolute": 1e-6})
        if tolerance == "exact":
            wrong = float((ours != official).sum())
            return Comparison(name, wrong, 0.0, False, official.numel())
        ours, official = ours.double(), official.double()
        # Minus infinity must be so in both.
        least = ours < LOWEST
        assert torch.equal(least, official < LOWEST), name
        difference = (ours - official).masked_fill(least, 0.0).abs().max().item()
        ((kind, limit),) = tolerance.items()
        relative = kind == "relative_to_largest"
        scale = official.masked_fill(least, 0.0).abs().max().item() if relative else 1.0
        return Comparison(name, difference / scale, limit, relative, official.numel())

    # --- ours ---

    def alpha(self, t: Tensor) -> Tensor:
        """Return float64 survival probabilities at times t, rounded as the official codes do.

        They compute them in float32, which shows near t = 1 where little survives.
        """
        return self.family.schedule.alpha(t.float()).double()

    def time(self, t: Tensor) -> Tensor:
        """Return what the network reads at times t, of t's shape."""
        return self.family.network_time(self.family.known_alpha(self.alpha(t)))

    @torch.no_grad()
    def logits(
        self,
        ids: Tensor,
        context: Tensor | None = None,
        sigma: Tensor | None = None,
        layout: Layout = FULL,
    ) -> Tensor:
        """Return [B, L, V] raw logits."""
        return self.denoiser(ids, context, sigma=sigma, layout=layout).logits

    def predict(
        self, logits: Tensor, ids: Tensor, alpha: Tensor, family: Family | None = None
    ) -> Prediction:
        """Read logits [B, L, V] at tokens [B, L] and survival probabilities [B] or [B, L]."""
        alpha = alpha.double().reshape(len(ids), -1).expand(ids.shape).flatten()
        objective = (family or self.family).objective
        return objective.predict(logits.flatten(0, 1), ids.flatten(), alpha)

    @torch.no_grad()
    def terms(
        self,
        x0: Tensor,
        xt: Tensor,
        noise: Noise,
        sigma: Tensor | None = None,
        family: Family | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return [B, L] terms of the negative ELBO and of the training loss, as training has them.

        Args:
            x0: [B, L] clean tokens.
            xt: [B, L] noisy tokens.
            noise: see `noise_at`.
            sigma: [B, blocks] what the network reads; None: that of the noise.
            family: process, schedule and objective; None: the checkpoint's.
        """
        family = family or self.family
        positions = family.objective.positions(noise).flatten().nonzero().squeeze(1)
        blocks = family.blocks(x0.shape[1])
        if sigma is None:
            starts = torch.arange(0, x0.shape[1], blocks.size)
            sigma = family.network_time(family.known_alpha(noise.alpha[:, starts]))
        batch = Batch(x0, xt, positions, noise.at(positions), sigma, None, family.block_size)
        terms = PositionTerms(self.denoiser, family, batch)
        losses, nelbo = terms.losses(slice(None), terms.head(*terms.inputs))
        empty = torch.zeros(x0.numel(), dtype=torch.float64)
        shape = x0.shape
        return tuple(empty.index_put((positions,), v.double()).view(shape) for v in (nelbo, losses))

    def noise_at(self, t: Tensor, xt: Tensor) -> Noise:
        """Return the noise of times t, [B] or [B, blocks], where x_t [B, L] is what it is."""
        blocks = self.family.blocks(xt.shape[1])
        t = t.reshape(len(t), -1).expand(-1, blocks.count)
        alpha, weight = self.alpha(t), self.family.schedule.elbo_weight(t.double())
        return self.noise_of(blocks.spread(alpha), blocks.spread(weight), xt)

    def noise_of(
        self, alpha: Tensor, weight: Tensor, xt: Tensor, alpha_s: Tensor | None = None
    ) -> Noise:
        """Return the noise of survival probabilities and weights, [B, L] or [B, 1]."""
        masked = xt == self.family.process.mask_token_id
        u = torch.where(masked, 0.25, 0.75).double()
        half = torch.full_like(u, 0.5)
        values = (v if v is None else v.expand(u.shape) for v in (alpha, weight, alpha_s))
        alpha, weight, alpha_s = values
        return Noise(alpha, half, u, weight, alpha_s=alpha_s)

    def in_objective(self, objective: object) -> Family:
        """Return the family with another objective, which is on no process yet."""
        return replace(self.family, objective=objective.on(self.family.process))


Measure = Iterator[Comparison]
