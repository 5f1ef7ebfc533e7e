"""Predictors: a network as decoding rules call it, the canvas of a segment in, predictions out.

`PlainPredictor` runs the network on all that a segment attends to; those in `cached.py` on new
tokens only. Letters: A active rows, S canvas positions, r rows of one call, N predicted positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.objectives import Prediction
from textdiff.errors import CheckpointError, overflow_advice
from textdiff.models import (
    CAUSAL,
    FULL,
    Denoiser,
    Layout,
    left_neighbours,
    sampling_layout,
    shift_right,
)
from textdiff.models.devices import on_device, to_device
from textdiff.models.graphs import RecordedCalls, replays
from textdiff.sampling.open_places import OpenPlaces
from textdiff.sampling.parts import by_parts, lazily
from textdiff.sampling.positions import Positions
from textdiff.sampling.previous import PreviousPredictions


class Predictor(ABC):
    """A network and the state of the active rows.

    Args:
        model: the network.
        family: process, schedule, objective and block size.

    Attributes:
        calls: network calls so far.
        rows: rows of these calls together.
        last: rows of each network call of the last prediction.
        previous: earlier predictions, for a network that reads them; else None.
    """

    def __init__(self, model: Denoiser, family: Family):
        self.model = model
        self.family = family
        self.shifted = family.objective.shifted
        self.shift = family.objective.shift
        in_blocks = sampling_layout(family.block_size, family.causal_context)
        self.layout: Layout = CAUSAL if self.shifted else in_blocks
        self.calls = 0
        self.rows = 0
        self.last: list[Tensor] = []
        self.previous: PreviousPredictions | None = None
        self._broken = torch.zeros((), dtype=torch.bool, device=model.device)
        self._dtype = torch.float32  # of the network's last output

    @cached_property
    def _recorded(self) -> RecordedCalls | None:
        """Calls that the device repeats; None: it cannot, or is not to."""
        replayed = replays(self.model.device) and self.model.cuda_graphs
        return RecordedCalls(self.model) if replayed else None

    @property
    def broken(self) -> Tensor:
        """[] bool on the device, whether the output of some call was not finite."""
        return self._broken

    def check(self) -> None:
        """Refuse to go on with a network whose output was not finite.

        Raises:
            CheckpointError: it was so in some call.
        """
        if bool(self.broken):
            raise CheckpointError(
                "the network's output is not a number (NaN or infinite), so there is nothing to "
                f"draw from: {overflow_advice(self._dtype)}",
                code="output_not_finite",
            )

    def admit(self, text: Tensor, finished: Tensor) -> None:  # noqa: B027 (most keep nothing)
        """Add rows after the active ones.

        Args:
            text: [a, W] their tokens, on the CPU.
            finished: [a] how many of these are final.
        """

    def keep(self, order: Sequence[int]) -> None:  # noqa: B027
        """Drop rows: active row i is from now on the former row `order[i]`."""

    def enter(self, text: Tensor, starts: Tensor, widths: Tensor, frozen: Tensor) -> None:
        """Turn to the next segment of the active rows, of which nothing was predicted yet.

        Args:
            text: [A, W] tokens of the rows from their beginning, final before the segment.
            starts: [A] CPU position at which each canvas starts.
            widths: [A] CPU positions of each canvas; what is beyond is padding.
            frozen: [A, S] bool on the CPU, canvas positions that the segment does not change.
        """
        self.follow(OpenPlaces(frozen, self.family.process))

    def follow(self, places: OpenPlaces) -> None:
        """Take the open positions of the segment from its rule, rather than from the canvas."""
        if self.model.self_conditioning is not None:
            self.previous = PreviousPredictions(self.model, places)

    def __call__(self, canvas: Tensor, t: Tensor, positions: Positions | Tensor) -> Prediction:
        """Predict N positions of canvas [A, S], or [N] flat CPU ones, at times t [A]."""
        positions, self.last = Positions.of(positions, canvas), []
        if self.previous is None:
            return self._predict(canvas, t, positions)
        wanted = self.previous.wanted(canvas, positions)
        prediction = self._predict(canvas, t, wanted)
        self.previous.keep(wanted, prediction)
        if wanted is positions:
            return prediction
        return prediction.at(on_device(canvas, torch.searchsorted(wanted.known, positions.known)))

    def discount(self, needed: Tensor) -> None:
        """Count the last prediction as one for the rows alone that needed it, [A] bool."""
        for rows in self.last:
            kept = int(needed[rows].sum())
            self.rows -= len(rows) - kept
            self.calls -= kept == 0
        self.last = []

    def _called(self, owners: Tensor) -> Tensor:
        """Return the rows of positions [n], rising, and note that a call is for them."""
        self.last.append(torch.unique(owners))
        return self.last[-1]

    @abstractmethod
    def _predict(self, canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        """Predict positions by network calls, which read `previous`."""

    def _previous(self, positions: Positions, places: Tensor) -> dict[str, Any]:
        """Return options of `_logits` for N positions at flat indices [N] into its tokens."""
        return {} if self.previous is None else {"previous": self.previous.at(positions, places)}

    def _alpha(self, t: Tensor, rows: Tensor) -> Tensor:
        """Return survival probabilities of rows [r] as the network's time input takes them."""
        return self.family.known_alpha(self.family.schedule.alpha(t[on_device(t, rows)]))

    def _joined(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """Return the rows [r] of a call, and idle ones up to a power of two if it is recorded.

        Few numbers of rows occur then. The idle ones are the shortest there are. What the call
        computes of them is not read; what it stores is written over first, or was stored before.

        Args:
            rows: active rows that the call is for, rising.
            lengths: [A] tokens of each active row in such a call.
        """
        if self._recorded is None:
            return rows
        number = min(len(lengths), 1 << (len(rows) - 1).bit_length())
        idle = torch.ones_like(lengths, dtype=torch.bool).index_fill(0, rows, False)
        others = idle.nonzero().squeeze(1)
        shortest = lengths[others].argsort(stable=True)[: number - len(rows)]
        joined = torch.cat([rows, others[shortest]]).sort().values
        if not self._recorded.serves(number * int(lengths[joined].max())):
            return rows
        self.rows -= number - len(rows)  # as if they had not been called
        return joined

    def _logits(self, tokens: Tensor, sigma: Tensor, at: Tensor, **options: Any) -> Tensor:
        """Return [N, V] logits at flat positions of tokens [r, T], by one network call."""
        self.calls += 1
        self.rows += len(tokens)
        device = tokens.device
        sigma, at = to_device(sigma, device), to_device(at, device)
        if self._recorded is not None and self._recorded.serves(tokens.numel()):
            return self._recorded(tokens, sigma, at, **options)
        output = self.model(tokens, sigma=sigma, positions=at, return_dict=True, **options)
        logits: Tensor = output.logits
        return logits

    def _predicted(
        self, logits: Tensor, canvas: Tensor, positions: Positions, alpha: Tensor
    ) -> Prediction:
        """Read logits [N, V] at N positions, and note if they are not finite."""
        self._dtype = logits.dtype
        count, size = logits.shape
        if len(logits):
            broken = by_parts(count, size, lambda chunk: self._is_broken(logits[chunk])[None])
            self._broken = self._broken | broken.any().to(self._broken.device)
            if logits.device.type == "cpu":  # elsewhere it would be a synchronisation per call
                self.check()
        xt = canvas.flatten()[positions.on(canvas.device)]  # [N]
        alpha = to_device(alpha, canvas.device)

        def make(index: Tensor | slice) -> Prediction:
            return self.family.objective.predict(logits[index], xt[index], alpha[index])

        return lazily(count, size, make)

    def _is_broken(self, logits: Tensor) -> Tensor:
        """Return whether any of logits [n, V] that are read is not finite, on their device."""
        read = self.family.objective.outputs
        # NaN or infinite if any of a row is. Minus infinity is an impossible token, but in a
        # narrow dtype it is what an overflow leaves.
        finite = logits.masked_fill(~read, -torch.inf).amax(-1).isfinite().all()
        if logits.dtype not in (torch.float32, torch.float64):
            finite = finite & (logits.masked_fill(~read, 0.0) > -torch.inf).all()
        return ~finite


class PlainPredictor(Predictor):
    """A predictor that runs on a canvas and, in blocks, on all that comes before it.

    Args:
        model: the network.
        family: process, schedule, objective and block size.
        window: tokens before a block that it attends to; None: all.
    """

    def __init__(self, model: Denoiser, family: Family, window: int | None = None):
        super().__init__(model, family)
        self.window = window

    def enter(self, text: Tensor, starts: Tensor, widths: Tensor, frozen: Tensor) -> None:
        """Cut out the tokens before each canvas that the network reads with it."""
        super().enter(text, starts, widths, frozen)
        self.widths = widths
        self.before = torch.zeros_like(starts)
        self.text = text[:, :0]
        if self.layout is not FULL:  # what comes before a full canvas is in it
            self.before = starts if self.window is None else starts.clamp(max=self.window)
            at = (starts - self.before)[:, None] + torch.arange(int(self.before.max()))
            at = at.clamp(max=max(0, text.shape[1] - 1))
            self.text = text.gather(1, to_device(at, text.device))

    def _predict(self, canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        """Predict by one network call on the rows that own the positions."""
        lengths = self.before + self.widths
        rows = self._joined(self._called(positions.row), lengths)
        where = torch.searchsorted(rows, positions.row)  # [N]
        before, lengths = self.before[rows], lengths[rows]
        end = int(lengths.max())
        tokens = self._compose(canvas, rows, end)  # [r, end]
        alpha = self._alpha(t, rows)
        at = positions.after(where * end + before[where])
        layout = self.layout.within(self._documents(lengths, end, canvas.device))
        logits = self._logits(
            shift_right(tokens, self.family.objective.first_input) if self.shifted else tokens,
            self._sigma(alpha, before, end),
            left_neighbours(at, end) if self.shift else at,
            layout=layout.after(to_device(before, canvas.device)),
            **self._previous(positions, at),
        )
        return self._predicted(logits, canvas, positions, alpha[on_device(alpha, where)])

    def _compose(self, canvas: Tensor, rows: Tensor, end: int) -> Tensor:
        """Return [r, end] each row's text before its canvas, its canvas, and any padding."""
        device = canvas.device
        chosen = canvas if len(rows) == len(canvas) else canvas[to_device(rows, device)]
        before = self.before[rows]
        if not int(before.max()):
            return chosen[:, :end]
        at = torch.arange(end) - before[:, None]  # [r, end] positions in the canvas
        inside = to_device(at.clamp(0, canvas.shape[1] - 1), device)
        text = self.text if len(rows) == len(self.text) else self.text[to_device(rows, device)]
        missing = max(0, end - text.shape[1])
        text = torch.nn.functional.pad(text, (0, missing))[:, :end]
        return torch.where(to_device(at < 0, device), text, chosen.gather(1, inside))

    def _sigma(self, alpha: Tensor, before: Tensor, end: int) -> Tensor:
        """Return [r, 1] noise, or [r, blocks] with zero noise in the finished ones."""
        sigma = self.family.network_time(alpha).unsqueeze(1)
        size = self.family.block_size
        if size is None:
            return sigma
        levels = sigma.new_zeros(len(alpha), -(-end // size))
        return levels.scatter(1, on_device(levels, before // size)[:, None], sigma)

    @staticmethod
    def _documents(lengths: Tensor, end: int, device: torch.device) -> Tensor | None:
        if int(lengths.min()) >= end:
            return None
        real = torch.arange(end) < lengths[:, None]
        return to_device(real.to(torch.int64) - 1, device)
