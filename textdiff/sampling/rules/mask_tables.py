"""Tables of masks that a rule reveals and sets again, where chance or the device decides.

What a scheduled step reveals follows from the masks before it, and these from earlier calls. So the
device decides before a call begins, and the CPU reads that while the call runs. Where steps needed
no call, the CPU has not read which masks they have set. It makes the next call for all that may be
masked, and learns meanwhile what was. Letters: R rows, S positions of the canvas, N positions of
one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from textdiff.section import torch

if TYPE_CHECKING:
    from torch import Tensor

    from textdiff.models.devices import Readback
    from textdiff.sampling.positions import Positions
    from textdiff.sampling.segment import Segment


class MaskTables:
    """Masks of a segment, at first all its open positions.

    Args:
        segment: holds them.
        ahead: whether the device decides what is masked, and else the CPU.

    Attributes:
        masked: [R, S] bool where it is decided.
        reveal: [R, S] bool where it is decided, what this step reveals.
        possible: [R, S] bool on the CPU, what is masked as far as it has read, or more.
    """

    def __init__(self, segment: Segment, ahead: bool):
        self.segment, self.ahead = segment, ahead
        self.possible = ~segment.frozen
        self.masked = self._open = self.decided(self.possible)
        self.reveal = self._again = self._remasked = torch.zeros_like(self.masked)
        self._told: Readback | None = None

    def decided(self, x: Tensor) -> Tensor:
        """Return numbers where it is decided what is masked."""
        return self.segment.send(x) if self.ahead else x.cpu()

    @property
    def revealed(self) -> Tensor:
        """[R, S] bool where it is decided, open positions that hold tokens."""
        return ~self.masked & self._open

    @property
    def certain(self) -> Tensor:
        """[R, S] bool on the CPU, open positions that hold tokens, or fewer."""
        return ~self.possible & ~self.segment.frozen

    def begin(self, reveal: Tensor, again: Tensor) -> Positions:
        """Begin a scheduled step, and return the N positions that a call is needed for.

        Args:
            reveal: [R, S] bool on the CPU, which are revealed if they are masked.
            again: [R, S] bool where it is decided, which are masked if they hold tokens.
        """
        self.reveal, self._again = self.masked & self.decided(reveal), self.revealed & again
        self.masked = (self.masked | self._again) & ~self.reveal
        self._remasked = (self._remasked | self._again) & ~self.reveal
        positions = self.segment.where(self.possible & reveal)
        if self.ahead and len(positions):
            self._told = self.segment.readback(torch.stack([self.reveal, self.masked]))
            self.segment.places.ended = ~self.reveal.any(1)
        return positions

    def put(self, positions: Positions, tokens: Tensor) -> Tensor | None:
        """Put the tokens [N] of a call at the positions that this step reveals.

        Returns:
            [N] bool on the device, which these are; None: all.
        """
        which = positions.entries(self.reveal) if self.ahead else None
        self.segment.put(positions, tokens, which)
        return which

    def end(self, may: Tensor | None) -> bool:
        """Set the masks of a step, and return whether its call has revealed anything.

        The CPU may wait for the call before.

        Args:
            may: [R, S] bool on the CPU, which may be masked again if they hold tokens; None: it is
                the CPU that decides.
        """
        needed = False
        if self._told is not None:
            reveal, self.possible = self._told.read()
            needed, self._told = bool(reveal.any()), None
            self.segment.discount(reveal.any(1))
        elif may is None:
            needed, self.possible = bool(self.reveal.any()), self.masked
        else:
            self.possible = self.possible | (self.certain & may)
        self.segment.mask(self._again, self.possible)
        return needed

    def remasked(self) -> Tensor:
        """Return what was masked again since this was asked last, [R, S] where it is decided."""
        remasked, self._remasked = self._remasked, torch.zeros_like(self._remasked)
        return remasked
