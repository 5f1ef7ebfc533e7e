"""Steps of a generation; what they changed is read from the device when it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from textdiff.models.devices import to_device


@dataclass(frozen=True)
class Changes:
    """Positions that a step changed, and what is known of them, on the CPU.

    Attributes:
        positions: [N] flat positions that changed.
        confidence: [N] raw probability of each new token, if asked for; NaN for masks.
        entropy: [N] entropy in nats at these positions, if asked for or known anyway; NaN where a
            token was masked again.
        remasked: [M] flat positions that were masked again, or drawn from the noise again, for
            rules that do so.
    """

    positions: Tensor
    confidence: Tensor | None = None
    entropy: Tensor | None = None
    remasked: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """The canvas after one network call.

    Attributes:
        index: network calls of this kind so far, counted from 0 over the whole generation.
        t: [R] time of each row before the step.
        canvas: [R, L] tokens after the step; a new tensor each time.
        read: reads from the device what has changed; until then the CPU does not wait for it.
        calls: network calls so far, without those that were queued in vain.
        draft: [R, L] canvas with every open position filled by its most likely token, if asked for.
        final: [R] tokens of each row that were final before this step; the engine fills it, as it
            does what follows.
        ends: [R] tokens up to the end of each row's segment; `final` for rows without one.
        done: [R] bool, rows that were finished before this step.
        rows: rows that the network has run on so far.
    """

    index: int
    t: Tensor
    canvas: Tensor
    read: Callable[[], Changes]
    calls: int
    draft: Tensor | None = None
    final: Tensor | None = None
    ends: Tensor | None = None
    done: Tensor | None = None
    rows: int = 0

    @cached_property
    def changes(self) -> Changes:
        """Positions that changed; to read them may wait for the device."""
        return self.read()

    def moved(self, place: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Changes:
        """Return the changes at other positions.

        Args:
            place: flat positions -> their new ones, of those that have any, and which have.
        """
        positions, kept = place(self.changed)
        chances, nats = (None if x is None else x[kept] for x in (self.confidence, self.entropy))
        remasked = None if self.remasked is None else place(self.remasked)[0]
        return Changes(positions, chances, nats, remasked)

    @property
    def changed(self) -> Tensor:
        """[N] flat CPU positions that changed."""
        return self.changes.positions

    @property
    def confidence(self) -> Tensor | None:
        """[N] raw probability of each new token; see `Changes`, as for the next two."""
        return self.changes.confidence

    @property
    def entropy(self) -> Tensor | None:
        """[N] nats at the changed positions."""
        return self.changes.entropy

    @property
    def remasked(self) -> Tensor | None:
        """[M] flat CPU positions that were masked again."""
        return self.changes.remasked

    @property
    def dependence(self) -> Tensor | None:
        """[R] nats that revealing the changed positions at once may cost; needs `entropy`.

        The sum of their entropies less the largest bounds their total correlation. On average over
        texts, the sum over steps bounds the divergence from revealing them one by one. The
        network's conditionals must be those of one joint distribution (arXiv:2505.24857).
        """
        if self.entropy is None:
            return None
        rows, width = self.canvas.shape
        row, nats = self.changed // width, self.entropy.double().nan_to_num(0.0)
        zero = torch.zeros(rows, dtype=torch.float64)
        largest = zero.scatter_reduce(0, row, nats, "amax")
        return zero.index_add(0, row, nats) - largest

    def without_noise(self, mask: int) -> Tensor:
        """Return the canvas with the mask where tokens were masked or noised again."""
        if self.remasked is None:
            return self.canvas
        again = to_device(self.remasked, self.canvas.device)
        return self.canvas.flatten().index_fill(0, again, mask).view_as(self.canvas)
