"""A network as a decoding rule sees it: the canvas of a segment in, predictions out.

`Denoiser` runs the network on all that a segment may see. `CachedDenoiser` runs it on what is new:
the active block, and before its first call the blocks finished since. A third kind, in
`approximate.py`, keeps what is final of a full canvas. Letters: A active rows, S canvas positions,
r rows of one call, N wanted positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.objectives import Prediction
from textdiff.errors import CheckpointError, overflow_advice
from textdiff.models import (
    CAUSAL,
    FULL,
    CacheSlice,
    Layout,
    TextDiffusionModel,
    sampling_layout,
    shift_right,
)


class Predictor(ABC):
    """What the rules call, and what the block loop tells it.

    Args:
        model: the network.
        family: process, schedule, objective and block size.

    Attributes:
        calls: network calls so far.
        rows: rows of these calls together.
    """

    def __init__(self, model: TextDiffusionModel, family: Family):
        self.model = model
        self.family = family
        self.shifted = family.objective.shifted
        self.layout: Layout = CAUSAL if self.shifted else sampling_layout(family.block_size)
        self.calls = 0
        self.rows = 0
        self._broken = torch.zeros((), dtype=torch.bool, device=model.device)
        self._dtype = torch.float32  # of the network's last output

    def check(self) -> None:
        """Refuse to go on with a network whose output was not finite.

        Raises:
            CheckpointError: it was so in some call.
        """
        if bool(self._broken):
            raise CheckpointError(
                "the network's output is not a number (NaN or infinite), so there is nothing to "
                f"draw from: {overflow_advice(self._dtype)}"
            )

    @abstractmethod
    def enter(self, text: Tensor, starts: Tensor, widths: Tensor, frozen: Tensor) -> None:
        """Turns to the next segment of the active rows.

        Args:
            text: [A, W] tokens of the rows from their beginning, final before the segment.
            starts: [A] host position at which each canvas starts.
            widths: [A] host positions of each canvas; what lies beyond is padding.
            frozen: [A, S] bool on the host, canvas positions that the segment does not change.
        """

    @abstractmethod
    def admit(self, text: Tensor, finished: Tensor) -> None:
        """Takes new rows behind the active ones.

        Args:
            text: [a, W] their tokens.
            finished: [a] how many of these are final.
        """

    @abstractmethod
    def keep(self, order: Sequence[int]) -> None:
        """Lets rows go: active row i is from now on what row `order[i]` was."""

    @abstractmethod
    def __call__(self, canvas: Tensor, t: Tensor, positions: Tensor) -> Prediction:
        """Predicts [N] flat host positions of canvas [A, S] at times t [A]."""

    def _alpha(self, t: Tensor) -> Tensor:
        """[r] survival probabilities, as the network may be told them."""
        return self.family.known_alpha(self.family.schedule.alpha(t))

    def _logits(self, tokens: Tensor, sigma: Tensor, at: Tensor, **options: object) -> Tensor:
        """[N, V] logits at flat positions of tokens [r, T]; one network call."""
        self.calls += 1
        self.rows += len(tokens)
        device = tokens.device
        output = self.model(
            tokens,
            sigma=sigma.to(device),
            positions=at.to(device),
            return_dict=True,
            **options,
        )
        logits: Tensor = output.logits
        return logits

    def _predicted(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        """Read logits [N, V] at tokens xt [N], and note if they are not finite."""
        self._dtype = logits.dtype
        if len(logits):
            read = self.family.objective.outputs
            # NaN or infinite if any of a row is. Minus infinity is an impossible token, but in a
            # narrow dtype it is what an overflow leaves.
            finite = logits.masked_fill(~read, -torch.inf).amax(-1).isfinite().all()
            if logits.dtype not in (torch.float32, torch.float64):
                finite = finite & (logits.masked_fill(~read, 0.0) > -torch.inf).all()
            self._broken = self._broken | ~finite.to(self._broken.device)
            if logits.device.type == "cpu":  # elsewhere it would be a synchronisation per call
                self.check()
        return self.family.objective.predict(logits, xt, alpha)


class Denoiser(Predictor):
    """Runs the network on a canvas and, in blocks, on all that comes before.

    Args:
        model: the network.
        family: process, schedule, objective and block size.
        widths: [A] positions of each canvas, where there is nothing before it.
        window: tokens before a block that it sees; None: all.
    """

    def __init__(
        self,
        model: TextDiffusionModel,
        family: Family,
        widths: Tensor | None = None,
        window: int | None = None,
    ):
        super().__init__(model, family)
        self.window = window
        if widths is not None:
            frozen = torch.zeros(len(widths), int(widths.max()), dtype=torch.bool)
            self.enter(frozen[:, :0].long(), 0 * widths, widths, frozen)

    def admit(self, text: Tensor, finished: Tensor) -> None:
        """Nothing is known of rows between segments."""

    def keep(self, order: Sequence[int]) -> None:
        """Likewise."""

    def enter(self, text: Tensor, starts: Tensor, widths: Tensor, frozen: Tensor) -> None:
        """Cuts out what the segments see before their canvas."""
        self.widths = widths
        self.before = torch.zeros_like(starts)
        self.text = text[:, :0]
        if self.layout is not FULL:  # what comes before a full canvas is in it
            self.before = starts if self.window is None else starts.clamp(max=self.window)
            ahead = torch.arange(int(self.before.max()))
            at = (starts - self.before)[:, None] + ahead
            at = at.clamp(max=max(0, text.shape[1] - 1)).to(text.device)
            self.text = text.gather(1, at)

    def __call__(self, canvas: Tensor, t: Tensor, positions: Tensor) -> Prediction:
        """One network call on the rows that own the positions."""
        device, width = canvas.device, canvas.shape[1]
        rows, where = torch.unique(positions // width, return_inverse=True)
        before, widths = self.before[rows], self.widths[rows]
        end = int((before + widths).max())
        tokens = self._compose(canvas, rows, end)
        at = where * end + before[where] + positions % width
        alpha = self._alpha(t[rows])
        logits = self._logits(
            shift_right(tokens, self.family.process.mask_token_id) if self.shifted else tokens,
            self._sigma(alpha, before, end),
            at,
            layout=self.layout.within(self._documents(before + widths, end, device)),
        )
        xt = canvas.flatten()[positions.to(device)]
        return self._predicted(logits, xt, alpha[where].to(device))

    def _compose(self, canvas: Tensor, rows: Tensor, end: int) -> Tensor:
        """[r, end] each row's text before its canvas, its canvas, and what may be anything."""
        chosen = canvas if len(rows) == len(canvas) else canvas[rows.to(canvas.device)]
        before = self.before[rows]
        if not int(before.max()):
            return chosen[:, :end]
        at = torch.arange(end) - before[:, None]  # [r, end] positions in the canvas
        inside = at.clamp(0, canvas.shape[1] - 1).to(canvas.device)
        text = self.text if len(rows) == len(self.text) else self.text[rows.to(canvas.device)]
        missing = end - text.shape[1]
        text = text[:, :end] if missing <= 0 else torch.nn.functional.pad(text, (0, missing))
        return torch.where((at < 0).to(canvas.device), text, chosen.gather(1, inside))

    def _sigma(self, alpha: Tensor, before: Tensor, end: int) -> Tensor:
        """[r, 1], or [r, blocks] with zero noise in the finished ones."""
        sigma = -torch.log(alpha).float().unsqueeze(1)
        size = self.family.block_size
        if size is None:
            return sigma
        levels = torch.zeros(len(alpha), -(-end // size))
        return levels.scatter(1, (before // size)[:, None], sigma)

    @staticmethod
    def _documents(lengths: Tensor, end: int, device: torch.device) -> Tensor | None:
        if int(lengths.min()) >= end:
            return None
        real = torch.arange(end) < lengths[:, None]
        return (real.to(torch.int64) - 1).to(device)


class CachedDenoiser(Predictor):
    """Runs the network on the active block alone, finished ones being in a cache.

    Args:
        model: the network.
        family: in blocks; its finished tokens depend on nothing later.
        slots: rows that are active together, at most.
        room: tokens of the longest row, the end of its last block included.
        window: tokens before a block that it sees, a multiple of the block size; None: all.
    """

    def __init__(
        self, model: TextDiffusionModel, family: Family, slots: int, room: int, window: int | None
    ):
        super().__init__(model, family)
        assert family.block_size is not None
        self.size = family.block_size
        self.window = window
        # Besides the window there must be room for a block to be stored and the active one.
        self.cache = model.new_cache(
            slots, room if window is None else min(room, window + 2 * self.size)
        )
        self.stored = torch.zeros(0, dtype=torch.int64)  # [A] tokens in each slot

    def keep(self, order: Sequence[int]) -> None:
        """Moves rows to the slots of those that left."""
        for slot, source in enumerate(order):
            if slot != source:
                self.cache.copy(source, [slot])
        self.stored = self.stored[list(order)]

    def admit(self, text: Tensor, finished: Tensor) -> None:
        """Stores the whole blocks of prompts, equal ones once."""
        first = len(self.stored)
        known = finished // self.size * self.size
        self.stored = torch.cat([self.stored, known])
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, (ids, length) in enumerate(zip(text.tolist(), known.tolist(), strict=True)):
            if length:
                groups.setdefault(tuple(ids[:length]), []).append(row)
        leaders = torch.tensor([group[0] for group in groups.values()], dtype=torch.int64)
        longest = int(known.max())
        # In a ring, what is written must not lie where its own block still looks.
        step = longest if self.window is None else 2 * self.size
        for start in range(0, longest, max(1, step)):
            rows = leaders[known[leaders] > start]
            length = min(step, longest - start)
            begins = torch.full_like(rows, start)
            self._logits(
                self._inputs(text[rows.to(text.device)], begins, length),
                torch.zeros(len(rows), length // self.size),
                torch.zeros(0, dtype=torch.int64),
                layout=self.layout,
                cache=self._view(begins, length, first + rows),
            )
        for leader, *others in groups.values():
            if others:
                self.cache.copy(first + leader, [first + row for row in others])

    def enter(self, text: Tensor, starts: Tensor, widths: Tensor, frozen: Tensor) -> None:
        """Has the finished blocks at hand, to be stored with the first call.

        A ring has room for one of them: where given text made a row skip blocks, the earlier ones
        are stored now.
        """
        self.text = text
        self.starts = starts
        while self.window is not None and bool((starts - self.stored > self.size).any()):
            late = (starts - self.stored > self.size).nonzero().squeeze(1)
            begins = self.stored[late]
            self._logits(
                self._inputs(text[late.to(text.device)], begins, self.size),
                torch.zeros(len(late), 1),
                torch.zeros(0, dtype=torch.int64),
                layout=self.layout,
                cache=self._view(begins, self.size, late),
            )
            self.stored[late] = begins + self.size

    def __call__(self, canvas: Tensor, t: Tensor, positions: Tensor) -> Prediction:
        """One network call on the rows that own the positions, if they have as much to store."""
        device, width = canvas.device, canvas.shape[1]
        owners = positions // width
        rows, where = torch.unique(owners, return_inverse=True)
        alpha = self._alpha(t[rows])
        found: list[tuple[Tensor, Tensor]] = []
        # Rows whose last block is not stored yet give it along; mostly all do, or none.
        # A network that reads one token late has stored the block itself with the first call.
        lengths = (self.starts + self.size - self.stored).clamp(min=self.size)
        for length in sorted(set(lengths[rows].tolist())):
            mine = rows[lengths[rows] == length]
            wanted = (lengths[owners] == length).nonzero().squeeze(1)
            at = torch.searchsorted(mine, owners[wanted]) * length
            at = at + (length - self.size) + positions[wanted] % width
            logits = self._run(canvas, mine, length, alpha[torch.searchsorted(rows, mine)], at)
            found.append((wanted, logits))
        logits = found[0][1]
        if len(found) > 1:
            order = torch.cat([wanted for wanted, _ in found]).argsort()
            logits = torch.cat([part for _, part in found])[order.to(device)]
        xt = canvas.flatten()[positions.to(device)]
        return self._predicted(logits, xt, alpha[where].to(device))

    def _run(self, canvas: Tensor, rows: Tensor, length: int, alpha: Tensor, at: Tensor) -> Tensor:
        """Logits [n, V] of some rows, their last `length` tokens being new."""
        everyone = len(rows) == len(canvas)
        begins, there = self.starts[rows] + self.size - length, rows.to(canvas.device)
        text = self.text if everyone else self.text[there]
        active = canvas if everyone else canvas[there]
        if self.shifted:  # the network reads tokens one late: never those of the canvas
            tokens = self._inputs(text, begins, length)
        elif length == self.size:
            tokens = active
        else:
            tokens = torch.cat([self._inputs(text, begins, length - self.size), active], dim=1)
        sigma = torch.zeros(len(rows), length // self.size)
        sigma[:, -1] = -torch.log(alpha)
        view = self._view(begins, length, rows)
        self.stored[rows] = self.starts[rows] + (self.size if self.shifted else 0)
        return self._logits(tokens, sigma, at, layout=self.layout, cache=view)

    def _inputs(self, text: Tensor, begins: Tensor, length: int) -> Tensor:
        """[r, length] what the network reads at finished positions, from `begins` on."""
        at = begins[:, None] + torch.arange(length)
        if not self.shifted:
            return text.gather(1, at.to(text.device))
        before = text.gather(1, (at - 1).clamp(min=0).to(text.device))
        return before.masked_fill((at == 0).to(text.device), self.family.process.mask_token_id)

    def _view(self, begins: Tensor, length: int, rows: Tensor) -> CacheSlice:
        first = bool((rows == torch.arange(len(rows))).all())
        return self.cache.exact_slice(
            self.layout, begins, length, None if first else rows, self.window
        )
