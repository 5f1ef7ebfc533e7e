"""The canvas of a segment: its tokens, and where it is decided which of them change.

On a CPU that is known at once. A device that computes by itself is not asked: tensors there say
which of the positions of a call are written, and the next call is queued before the CPU has read
them (`Ledger`). Letters: R rows, S positions of the canvas, N positions of one call.
"""

from typing import NamedTuple

from torch import Tensor

from textdiff.diffusion.process import ForwardProcess
from textdiff.models.devices import Readback, to_device
from textdiff.sampling.open_places import Ledger, OpenPlaces
from textdiff.sampling.parts import EVERY
from textdiff.sampling.positions import Positions


class Chosen(NamedTuple):
    """Positions that are written, as far as that is known to the CPU.

    Attributes:
        at: n positions, all that may be written.
        predicted: which of the predicted positions they are.
        which: [n] bool on the device, True where they are written; None: everywhere.
    """

    at: Positions
    predicted: Tensor | slice
    which: Tensor | None

    def among(self, flags: Tensor) -> Tensor:
        """Return flags [n] of the device where positions are written."""
        return flags if self.which is None else flags & self.which


class Canvas:
    """Tokens of R rows.

    Attributes:
        canvas: [R, S] tokens.
        process: forward process.
        ahead: whether calls are queued before the CPU has read what the last one changed.
        places: open positions.
    """

    canvas: Tensor
    process: ForwardProcess
    ahead: bool
    places: OpenPlaces

    def send(self, x: Tensor) -> Tensor:
        """Copy a tensor of the CPU to the device of the canvas, without waiting for it."""
        return to_device(x, self.canvas.device)

    def at(self, positions: Positions | Tensor) -> Positions:
        """Return positions of the canvas, which may be [N] flat ones on the CPU."""
        return Positions.of(positions, self.canvas)

    def where(self, chosen: Tensor) -> Positions:
        """Return the chosen positions of the canvas, from [R, S] bool on the CPU."""
        return Positions.where(chosen)

    def ledger(self, is_open: Tensor) -> Ledger:
        """Return a ledger of positions [R, S] that a rule closes itself."""
        return Ledger(is_open, self.ahead)

    def decided(self, x: Tensor) -> Tensor:
        """Return numbers where rules decide: on the device if calls are queued ahead of it."""
        return self.send(x) if self.ahead else x.cpu()

    def readback(self, x: Tensor) -> Readback:
        """Begin to copy numbers to the CPU, which may read them once a call is queued."""
        return Readback(x)

    def chosen(self, positions: Positions, which: Tensor | None) -> Chosen:
        """Return the positions that `which` [N] bool names, or all of them and where it does."""
        if which is None or self.ahead:
            return Chosen(positions, EVERY, None if which is None else self.send(which))
        index = which.cpu().nonzero().squeeze(1)
        return Chosen(positions[index], self.send(index), None)

    def masked(self, positions: Positions) -> Tensor | None:
        """Return which of the positions hold masks, [N] bool on the device; None: as yet all."""
        if not self.ahead or self.process.replaces_tokens:
            return None
        return self.tokens(positions) == self.process.mask_token_id

    def tokens(self, positions: Positions) -> Tensor:
        """Return the tokens at positions, [N] int64."""
        return positions.entries(self.canvas)

    def put(
        self, positions: Positions | Tensor, tokens: Tensor, which: Tensor | None = None
    ) -> None:
        """Replace the canvas by one with other tokens at some positions.

        Args:
            positions: N positions.
            tokens: [N] on the device, no masks where they are put.
            which: [N] bool on the device, True where they are put; None: everywhere.
        """
        at = self.at(positions)
        self.canvas = at.replaced(self.canvas, tokens, which)
        self.places.close(at, which)

    def mask(self, where: Tensor, is_open: Tensor) -> None:
        """Replace the canvas by one with masks at some positions.

        Args:
            where: [R, S] bool, these positions.
            is_open: [R, S] bool on the CPU, what holds masks then, or may do so.
        """
        self.canvas = self.canvas.masked_fill(self.send(where), self.process.mask_token_id)
        self.places.replace(is_open)
