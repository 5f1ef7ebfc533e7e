"""Measures of golden folders whose network is a class of transformers, and what tests need."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from golden_case import Comparison, Golden
from safetensors.torch import load_file
from torch import Tensor

from textdiff import load_denoiser
from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import Noise
from textdiff.loss import Batch, PositionTerms
from textdiff.models import CAUSAL, FULL, Denoiser, Layout


@dataclass(frozen=True)
class StockGolden:
    """A golden folder as read by this package.

    Attributes:
        model: the network.
        family: its family, with the mask that the cases were made with.
        cases: inputs and official outputs by name.
        tensors: tolerance and meaning of each.
    """

    model: Denoiser
    family: Family
    cases: dict[str, Tensor]
    tensors: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.cases[name]

    def error(self, name: str, value: Tensor, where: Tensor | None = None) -> float:
        """Return the largest difference from a case, as a share of what its tolerance allows."""
        want = self.cases[name]
        value, want = (value, want) if where is None else (value[where], want[where])
        allowed = self.tensors[name].get("tolerance", "exact")
        difference = float((value.double() - want.double()).abs().max())
        if allowed == "exact":
            return 0.0 if difference == 0.0 else float("inf")
        if "absolute" in allowed:
            return difference / float(allowed["absolute"])
        return difference / float(allowed["relative_to_largest"]) / float(want.abs().max())

    @torch.no_grad()
    def logits(self, ids: Tensor, context: Tensor | None = None, **options: Any) -> Tensor:
        """Return the raw logits [B, L, rows] of the rows that the official code has."""
        rows = next(v.shape[-1] for k, v in self.cases.items() if k.endswith("raw_logits"))
        return self.model(ids, context, **options).logits[..., :rows]

    @torch.no_grad()
    def terms(
        self,
        xt: Tensor,
        x0: Tensor,
        weight: Tensor,
        block_size: int | None = None,
        time: Any = None,
    ) -> Tensor:
        """Return [B, L] loss terms with official weights [B], normalised over all official rows.

        Our terms leave out ids that must not be predicted; what that contributes is added.
        """
        masked = xt == self.family.process.mask_token_id
        at = masked.flatten().nonzero().squeeze(1)  # [N]
        weights = weight.double()[:, None].expand(xt.shape)
        alpha = 1.0 - 1.0 / weights
        noise = Noise(alpha, masked.double(), torch.full_like(alpha, 0.5), weights).at(at)
        sigma = torch.zeros(len(xt), 1) if time is None else time.view(-1, 1).float()
        if block_size:
            sigma = sigma.expand(-1, xt.shape[1] // block_size)
        family = self.family.with_block_size(block_size)
        batch = Batch(x0, xt, at, noise, sigma, None, block_size)
        terms = PositionTerms(self.model, family, batch)
        logits = terms.head(*terms.inputs).double()  # [N, V]
        clean = logits.masked_fill(~family.process.vocabulary.clean, -torch.inf)
        rows = next(v.shape[-1] for k, v in self.cases.items() if k.endswith("raw_logits"))
        share = logits[:, :rows].logsumexp(-1) - clean.logsumexp(-1)  # [N]
        found = torch.zeros(xt.numel(), dtype=torch.float64)
        found[at] = terms.all() + noise.weight * share
        return found.view(xt.shape)


@cache
def read_golden(folder: Path, options: str = "") -> StockGolden:
    """Load a golden folder.

    Args:
        folder: the folder.
        options: `kind`, and options besides the mask, of the family of checkpoints; empty: the
            folder says all.
    """
    described = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    mask = described["conventions"]["mask_id"]
    wanted = f"{options} mask_token_id={mask}" if options else None
    model, family = load_denoiser(folder, wanted)
    assert family.process.mask_token_id == mask
    return StockGolden(model, family, load_file(folder / "cases.safetensors"), described["tensors"])


def documents(attention_mask: Tensor) -> Layout:
    """Return the full layout in which padding [B, L] is hidden."""
    return replace(FULL, document_ids=attention_mask.long() - 1)


IN_BLOCKS = Layout("block_causal", 4)
TWO_STREAMS = Layout("block_diffusion", 4)
OPTIONS = {"a2d-qwen3": "a2d", "diffugpt": "diffugpt", "diffullama": "diffullama"}
"""Folders that do not name their mask: their family."""

RAW: dict[str, dict[str, tuple[str, Layout]]] = {
    "llada": {"raw_logits": ("x_t", FULL)},
    "dream": {"raw_logits": ("x_t", FULL)},
    "a2d-qwen3": {
        "mdlm/raw_logits": ("x_t", FULL),
        "bd3lm/two_stream_raw_logits": ("x_t", TWO_STREAMS),
        "bd3lm/clean_stream_raw_logits": ("x0", IN_BLOCKS),
    },
    "sdar": {
        "two_stream/raw_logits": ("x_t", TWO_STREAMS),
        "two_stream/clean_raw_logits": ("x0", IN_BLOCKS),
        "block_causal/raw_logits": ("x0", IN_BLOCKS),
    },
    "diffugpt": {"raw_logits": ("x_t", FULL), "causal/raw_logits": ("x_t", CAUSAL)},
    "diffullama": {"raw_logits": ("x_t", FULL), "causal/raw_logits": ("x_t", CAUSAL)},
    "tiny-diffusion": {"raw_logits": ("x_t", FULL)},
}
"""Logits of each folder: the tokens that the network reads, and the layout."""


def shared_rate(t: Tensor) -> Tensor:
    """Return the mask probability in the losses of LLaDA and SDAR."""
    return (1.0 - 1e-3) * t + 1e-3


RATES: dict[str, Callable[[Tensor], Tensor]] = {
    "llada": shared_rate,
    "dream": lambda t: t + 1e-6,
    "a2d-qwen3": lambda t: t + 1e-6,
    "sdar": shared_rate,
    "diffugpt": lambda t: t,
    "diffullama": lambda t: t,
    "tiny-diffusion": torch.ones_like,
}
"""Mask probabilities by which the official losses divide."""

LOSSES: dict[str, dict[str, int | None]] = {
    "llada": {"nelbo": None},
    "dream": {"nelbo": None},
    "a2d-qwen3": {"mdlm/nelbo": None, "bd3lm/nelbo": 4},
    "sdar": {"nelbo": 4},
    "diffugpt": {"nelbo": None},
    "diffullama": {"nelbo": None},
    "tiny-diffusion": {"cross_entropy": None},
}
"""Loss terms of each folder: the block size."""


def raw_logits(stock: StockGolden, tokens: str, layout: Layout) -> Tensor:
    """Return the logits of one case."""
    context = stock["x0"] if layout.streams == 2 else None
    time = {"sigma": stock["t"]} if stock.model.time_conditioning else {}
    return stock.logits(stock[tokens], context, layout=layout, **time)


def loss_terms(stock: StockGolden, name: str, size: int | None) -> Tensor:
    """Return the loss terms of one folder."""
    weight = 1.0 / RATES[name](stock["t"].float())
    time = stock["t"] if stock.model.time_conditioning else None
    return stock.terms(stock["x_t"], stock["x0"], weight, size, time)


def measure_stock(name: str, golden: Golden) -> Iterator[Comparison]:
    """Logits on all rows, and loss terms under the official distribution."""
    stock = read_golden(golden.folder, OPTIONS.get(name, ""))
    for key, (tokens, layout) in RAW[name].items():
        yield golden.compare(key, raw_logits(stock, tokens, layout))
    for key, size in LOSSES[name].items():
        terms = loss_terms(stock, name, size)
        yield golden.compare(key, terms[:, -golden[key].shape[1] :])


MEASURES = {name: (partial(measure_stock, name), "") for name in RAW}
