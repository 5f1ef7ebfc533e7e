"""A cache for full canvases: fewer positions per call, at the price of an approximation.

In a full-sequence model every token sees all others, so what a finished one computes changes with
each new token. `ApproximateDenoiser` leaves that out: keys and values of what is final when a
segment begins stay those of the segment's first call, when the rest was still noise (prefix and
dual caches of arXiv:2505.22618, with the segment as their block).
Letters: A active rows, S canvas positions, r rows and T positions of one call, N wanted positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.objectives import Prediction
from textdiff.models import TextDiffusionModel
from textdiff.sampling.denoiser import Predictor


class ApproximateDenoiser(Predictor):
    """Runs the network on a whole canvas once, and then on its open positions alone.

    A row's first call in a segment is exact, and so is every call where nothing is final. A network
    that is told the noise level is told the current one for open positions; what is stored of the
    others keeps that of the first call.

    Args:
        model: the network.
        family: of the whole sequence.
        slots: rows that are active together, at most.
        room: tokens of the longest row.
    """

    def __init__(self, model: TextDiffusionModel, family: Family, slots: int, room: int):
        super().__init__(model, family)
        # Behind the canvas there is one place more, for what fills up rows of fewer positions.
        self.cache = model.new_cache(slots, 1 + min(room, model.config.max_position_embeddings))

    def admit(self, text: Tensor, finished: Tensor) -> None:
        """Nothing is stored of rows between segments."""

    def keep(self, order: Sequence[int]) -> None:
        """Likewise."""

    def enter(self, text: Tensor, starts: Tensor, widths: Tensor, frozen: Tensor) -> None:
        """Forgets what is stored: it was at other positions, and noise that is now text."""
        self.widths = widths
        self.whole = torch.arange(frozen.shape[1]) < widths[:, None]  # [A, S]
        self.open = self.whole & ~frozen
        self.stored = torch.zeros(len(widths), dtype=torch.bool)  # [A] rows that had their call

    def __call__(self, canvas: Tensor, t: Tensor, positions: Tensor) -> Prediction:
        """One network call on the rows that own the positions; two if it is the first of some."""
        owners = positions // canvas.shape[1]
        alpha = self._alpha(t)
        stored = self.stored[owners]
        parts = [part for part in (~stored, stored) if bool(part.any())]
        found = [self._run(canvas, positions[part], alpha) for part in parts]
        order = torch.cat([part.nonzero().squeeze(1) for part in parts]).argsort()
        logits = found[0] if len(found) == 1 else torch.cat(found)[order.to(canvas.device)]
        self.stored[owners] = True
        xt = canvas.flatten()[positions.to(canvas.device)]
        return self._predicted(logits, xt, alpha[owners].to(canvas.device))

    def _run(self, canvas: Tensor, positions: Tensor, alpha: Tensor) -> Tensor:
        """[N, V] logits at positions of rows that all have had their first call, or none has."""
        rows, where = torch.unique(positions // canvas.shape[1], return_inverse=True)
        runs = (self.open if bool(self.stored[rows[0]]) else self.whole)[rows]  # [r, S]
        at = self._places(runs)
        tokens = canvas[rows.to(canvas.device)]
        rank = runs.cumsum(1) - 1  # [r, S] which of the row's T positions each one is
        return self._logits(
            tokens.gather(1, at.clamp(max=canvas.shape[1] - 1).to(canvas.device)),
            -torch.log(alpha[rows]).float().unsqueeze(1),
            where * at.shape[1] + rank[where, positions % canvas.shape[1]],
            layout=self.layout,
            cache=self.cache.approximate_slice(
                at, self.widths[rows], None if torch.equal(rows, torch.arange(len(rows))) else rows
            ),
        )

    def _places(self, runs: Tensor) -> Tensor:
        """[r, T] the positions that run, [r, S], in order; fewer are filled up."""
        counts = runs.sum(1, keepdim=True)
        at = (~runs).byte().argsort(dim=1, stable=True)[:, : int(counts.max())]
        return at.masked_fill(torch.arange(at.shape[1]) >= counts, self.cache.capacity - 1)
