"""Predictors that keep keys and values: exact in blocks, an approximation on full canvases.

In a full-sequence model every token attends to all others, so the keys and values of a finished
one change with each new token. `ApproximatePredictor` ignores that: those of tokens that are final
when a segment begins stay as in the segment's first call. The rest was still noise then. (Prefix
and dual caches of arXiv:2505.22618, with the segment as their block.) Letters: A active rows, S
canvas positions, r rows and T tokens of one call, N predicted positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.objectives import Prediction
from textdiff.models import CacheSlice, Denoiser, Layout, left_neighbours
from textdiff.models.devices import on_device, to_device
from textdiff.sampling.positions import Positions, in_groups
from textdiff.sampling.predictor import Predictor


class CachedPredictor(Predictor):
    """A predictor that runs on the active block alone, finished ones being in a cache.

    Args:
        model: the network.
        family: in blocks; its finished tokens depend on nothing later.
        slots: rows that are active together, at most.
        room: tokens of the longest row, the end of its last block included.
        window: tokens before a block that it attends to, a multiple of the block size; None: all.
    """

    def __init__(self, model: Denoiser, family: Family, slots: int, room: int, window: int | None):
        super().__init__(model, family)
        assert family.block_size is not None
        self.size = family.block_size
        self.window = window
        # Besides the window there must be room for a block to be stored and the active one.
        self.cache = model.new_cache(
            slots, room if window is None else min(room, window + 2 * self.size)
        )
        self.stored = torch.zeros(0, dtype=torch.int64)  # [A] tokens in each slot
        # [V] logits of the last one, which predict the first of the next block where outputs are
        # about the next token. It is finished: they stay as they were when it was stored.
        self.ends: list[Tensor | None] = []

    def keep(self, order: Sequence[int]) -> None:
        """Move rows to the slots of those that left."""
        for slot, source in enumerate(order):
            if slot != source:
                self.cache.copy(source, [slot])
        self.stored = self.stored[list(order)]
        self.ends = [self.ends[source] for source in order]

    def admit(self, text: Tensor, finished: Tensor) -> None:
        """Store the whole blocks of prompts, equal ones once."""
        first = len(self.stored)
        known = finished // self.size * self.size
        self.stored = torch.cat([self.stored, known])
        self.ends += [None] * len(text)
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, (ids, length) in enumerate(zip(text.tolist(), known.tolist(), strict=True)):
            if length:
                groups.setdefault(tuple(ids[:length]), []).append(row)
        text = to_device(text, self.model.device)
        leaders = torch.tensor([group[0] for group in groups.values()], dtype=torch.int64)
        longest = int(known.max())
        # In a ring, what is written must not be where its own block still looks.
        step = longest if self.window is None else 2 * self.size
        for start in range(0, longest, max(1, step)):
            rows = leaders[known[leaders] > start]
            length = min(step, longest - start)
            counts = (known[rows] - start).clamp(max=length)
            self._store(text, rows, first + rows, torch.full_like(rows, start), length, counts)
        for leader, *others in groups.values():
            if others:
                self.cache.copy(first + leader, [first + row for row in others])
                for row in others:
                    self.ends[first + row] = self.ends[first + leader]

    def enter(self, text: Tensor, starts: Tensor, widths: Tensor, frozen: Tensor) -> None:
        """Keep the finished blocks at hand, to be stored with the first call.

        A ring has room for one of them: where a row skipped blocks that its prompt filled, the
        earlier ones are stored now.
        """
        super().enter(text, starts, widths, frozen)
        self.text = text
        self.starts = starts
        while self.window is not None and bool((starts - self.stored > self.size).any()):
            rows = (starts - self.stored > self.size).nonzero().squeeze(1)
            counts = torch.full_like(rows, self.size)
            self._store(text, rows, rows, self.stored[rows], self.size, counts)
            self.stored[rows] += self.size

    def _predict(self, canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        """Predict by one network call on the rows that have as many tokens to store."""
        owners = positions.row
        alpha = self._alpha(t, torch.arange(len(t)))
        # Rows whose last block is not stored yet give it along; mostly all do, or none.
        # A network whose inputs are shifted right has stored the block with its first call.
        lengths = (self.starts + self.size - self.stored).clamp(min=self.size)

        def run(indices: Tensor) -> Tensor:
            called = rows = self._called(owners[indices])
            length = int(lengths[called[0]])
            if length == self.size:  # others would store finished tokens again
                rows = self._joined(called, torch.full_like(lengths, length))
            self.stored[called] = self.starts[called] + (self.size if self.shifted else 0)
            noise = alpha[on_device(alpha, rows)]
            own, place = positions[indices], torch.searchsorted(rows, owners[indices])
            at = own.after(place * length + (length - self.size))
            options = self._previous(own, at)
            if self.shift:
                return self._run_shifted(canvas, rows, length, noise, (place, own), **options)
            return self._run(canvas, rows, length, noise, at, **options)

        logits = in_groups(lengths[owners], run)
        return self._predicted(logits, canvas, positions, alpha[on_device(alpha, owners)])

    def _run_shifted(
        self,
        canvas: Tensor,
        rows: Tensor,
        length: int,
        alpha: Tensor,
        places: tuple[Tensor, Positions],
        **options: Any,
    ) -> Tensor:
        """Return logits [n, V] that predict positions, which are in [n] of these rows.

        They are read one place before; what is before a block is the end of the last one.
        """
        place, own = places
        before = length - self.size  # tokens that this call stores
        starts = place * length + before
        at = (own.after(starts) - 1).maximum(on_device(own.flat, place * length))
        stored = torch.arange(len(rows)) * length + before - 1 if before else place[:0]
        asked = torch.cat([at, on_device(at, stored)])
        logits = self._run(canvas, rows, length, alpha, asked, **options)
        self._keep_ends(rows, logits[len(at) :])
        return self._crossed(logits[: len(at)], own)

    def _crossed(self, logits: Tensor, own: Positions) -> Tensor:
        """Return logits [n, V] with those from before the block, at its first column."""
        first = own.row.diff(prepend=own.row.new_full((1,), -1)).nonzero().squeeze(1)  # of each row
        first = first[self.starts[own.row[first]] > 0]
        if own.flat.device.type == "cpu":  # else all of them are asked
            first = first[own[first].column == 0]
        kept = [self.ends[row] for row in own.row[first].tolist()]
        if not kept:
            return logits
        at = to_device(first, logits.device)
        crosses = to_device(own[first].column == 0, logits.device)[:, None]
        return logits.index_copy_(0, at, torch.where(crosses, torch.stack(kept), logits[at]))

    def _keep_ends(self, slots: Tensor, logits: Tensor) -> None:
        """Keep logits [r, V] at the last stored token of some slots, or nothing if there are none.

        They are copies: a view would hold the logits of the whole call.
        """
        for slot, row in zip(slots.tolist(), logits, strict=False):
            self.ends[slot] = row.clone()

    def _run(
        self,
        canvas: Tensor,
        rows: Tensor,
        length: int,
        alpha: Tensor,
        at: Tensor,
        **options: Any,
    ) -> Tensor:
        """Return logits [n, V] of some rows whose last `length` tokens are new."""
        begins = self.starts[rows] + self.size - length
        text, active = self.text, canvas
        if len(rows) != len(canvas):
            index = to_device(rows, canvas.device)
            text, active = text[index], active[index]
        if self.shifted:  # the network reads the tokens before those it predicts, all final
            tokens = self._inputs(text, begins, length)
        elif length == self.size:
            tokens = active
        else:
            tokens = torch.cat([self._inputs(text, begins, length - self.size), active], dim=1)
        sigma = torch.zeros(len(rows), length // self.size, device=alpha.device)
        sigma[:, -1] = self.family.network_time(alpha)
        layout = self.layout.after(self.starts[rows])
        view = self._view(layout, begins, length, rows)
        return self._logits(tokens, sigma, at, layout=layout, cache=view, **options)

    def _store(
        self,
        text: Tensor,
        rows: Tensor,
        slots: Tensor,
        begins: Tensor,
        length: int,
        counts: Tensor,
    ) -> None:
        """Store `length` tokens of some rows of a text, from `begins` [r] on.

        The first `counts` [r] of them are finished; what follows is written over later.
        """
        at = torch.arange(len(rows)) * length + counts - 1
        logits = self._logits(
            self._inputs(text[to_device(rows, text.device)], begins, length),
            torch.zeros(len(rows), length // self.size),
            at if self.shift else at[:0],
            layout=self.layout,
            cache=self._view(self.layout, begins, length, slots),
        )
        self._keep_ends(slots, logits)

    def _inputs(self, text: Tensor, begins: Tensor, length: int) -> Tensor:
        """Return [r, length] the network's inputs at finished positions, from `begins` on."""
        at = begins[:, None] + torch.arange(length)
        if not self.shifted:
            return text.gather(1, to_device(at, text.device))
        before = text.gather(1, to_device((at - 1).clamp(min=0), text.device))
        first = to_device(at == 0, text.device)
        return before.masked_fill(first, self.family.objective.first_input)

    def _view(self, layout: Layout, begins: Tensor, length: int, slots: Tensor) -> CacheSlice:
        return self.cache.exact_slice(layout, begins, length, _unless_first(slots), self.window)


class ApproximatePredictor(Predictor):
    """A predictor that runs on a whole canvas once, and then on its open positions alone.

    A row's first call in a segment is exact, and so is every call where nothing is final. Open
    positions have the current noise level; what is stored of the others that of the first call.

    Args:
        model: the network.
        family: of the whole sequence.
        slots: rows that are active together, at most.
        room: tokens of the longest row.
    """

    def __init__(self, model: Denoiser, family: Family, slots: int, room: int):
        super().__init__(model, family)
        # One place more than the canvas has is for padding of rows with fewer positions.
        self.cache = model.new_cache(slots, 1 + min(room, model.context))

    def enter(self, text: Tensor, starts: Tensor, widths: Tensor, frozen: Tensor) -> None:
        """Forget what is stored: it was at other positions, and noise that is now text."""
        super().enter(text, starts, widths, frozen)
        self.widths = widths
        self.whole = torch.arange(frozen.shape[1]) < widths[:, None]  # [A, S]
        self.asked = self.whole & ~frozen
        if self.shift:  # predictions are read one place before what they are about
            self.asked[:, :-1] |= self.asked[:, 1:].clone()
        self.numbers = self.asked.sum(1)  # [A]
        self.stored = torch.zeros(len(widths), dtype=torch.bool)  # [A] rows that had their call

    def _predict(self, canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        """Predict by a network call on the rows that own the positions; two for mixed ones."""
        owners = positions.row
        alpha = self._alpha(t, torch.arange(len(t)))
        stored = self.stored[owners]
        logits = in_groups(stored, lambda indices: self._run(canvas, positions[indices], alpha))
        self.stored[owners] = True
        return self._predicted(logits, canvas, positions, alpha[on_device(alpha, owners)])

    def _run(self, canvas: Tensor, positions: Positions, alpha: Tensor) -> Tensor:
        """Return [N, V] logits at N positions of rows that all have had a call, or none has."""
        rows, runs = self._called(positions.row), self.whole
        if bool(self.stored[rows[0]]):
            runs = self.asked
            rows = self._joined(rows, self.numbers)
        where, runs = torch.searchsorted(rows, positions.row), runs[rows]  # [N], [r, S]
        at = self._places(runs)  # [r, T]
        tokens = canvas[to_device(rows, canvas.device)]
        first = torch.arange(len(rows))[:, None] * at.shape[1]
        index = (first + runs.cumsum(1) - 1).flatten()  # [r * S] of each place, among r * T tokens
        own = positions.after(where * canvas.shape[1])  # [N] places
        asked = left_neighbours(own, canvas.shape[1]) if self.shift else own
        index = to_device(index, own.device)
        return self._logits(
            tokens.gather(1, to_device(at.clamp(max=canvas.shape[1] - 1), canvas.device)),
            self.family.network_time(alpha[on_device(alpha, rows)]).unsqueeze(1),
            index[asked],
            layout=self.layout,
            cache=self.cache.approximate_slice(at, self.widths[rows], _unless_first(rows)),
            **self._previous(positions, index[own]),
        )

    def _places(self, runs: Tensor) -> Tensor:
        """Return [r, T] the positions of `runs` [r, S] in order, padded with the spare place."""
        counts = runs.sum(1, keepdim=True)
        at = (~runs).byte().argsort(dim=1, stable=True)[:, : int(counts.max())]
        return at.masked_fill(torch.arange(at.shape[1]) >= counts, self.cache.capacity - 1)


def _unless_first(slots: Tensor) -> Tensor | None:
    """Return slots, or None for 0, 1, 2 and so on, which need no gathering."""
    return None if torch.equal(slots, torch.arange(len(slots))) else slots
