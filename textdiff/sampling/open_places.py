"""Positions of a segment that are still open; where a device decides, the CPU learns it later.

A CPU that asked after each call would let the device run dry. It queues one call more, and reads
meanwhile what the call before has closed. So a call may be made for positions that are closed
already; they stay as they are. Letters: A active rows, S canvas positions, N positions of one call.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from textdiff.diffusion.process import ForwardProcess
from textdiff.models.devices import Readback
from textdiff.sampling.positions import Positions


class Ledger:
    """Open positions, and those that were closed since the CPU has known them.

    Args:
        is_open: [A, S] bool on the CPU.
        ahead: whether calls are queued before the CPU has read what the last one closed.
    """

    def __init__(self, is_open: Tensor, ahead: bool = False):
        self.ahead = ahead
        self._known = self._begun = is_open
        # What the device copies, and what becomes of the open positions once that is there.
        self._news: list[tuple[Readback | None, Callable[[Tensor], Tensor]]] = []
        self._before = 0  # news from before the call that has begun

    def close(self, positions: Positions, which: Tensor | None = None) -> None:
        """Note that N positions are closed, or those of them that `which` [N] bool says."""
        told = None if which is None else Readback(which)

        def closed(known: Tensor) -> Tensor:
            at = positions.known if told is None else positions.known[told.read()]
            return known.flatten().index_fill(0, at, False).view_as(known)

        self._news.append((told, closed))
        if not self.ahead and positions.flat.device.type == "cpu" and (not told or told.immediate):
            self._after(len(self._news))  # at once: the owner of these flags may change them

    def replace(self, is_open: Tensor) -> None:
        """Note that of all positions those are open that [A, S] bool on the CPU says, or fewer."""
        self._known, self._news, self._before = is_open.clone(), [], 0

    @property
    def now(self) -> Tensor:
        """[A, S] bool on the CPU; may wait for the device."""
        return self._after(len(self._news))

    @property
    def known(self) -> Tensor:
        """[A, S] bool on the CPU, what is open as far as it has read, or more."""
        told = [told is None or told.immediate for told, _ in self._news]
        return self._after((*told, False).index(False))

    @property
    def none_left(self) -> bool:
        """True where nothing is open, as far as the CPU can tell without waiting."""
        if not bool(self._known.any()):  # what is news can only close more
            return True
        waits = self.ahead and not all(told is None or told.arrived for told, _ in self._news)
        return not waits and not bool(self.now.any())

    def begin(self) -> Tensor:
        """Return [A, S] bool what a call is made for: all that is open, and no more if known."""
        self._before = len(self._news)
        self._begun = self._known if self.ahead else self.now
        return self._begun

    def settle(self) -> Tensor:
        """Return [A, S] bool what was open when the call began, which is queued by now.

        Of a call that `now` was asked in, the answer is what it was made for.
        """
        if self._before:
            self._begun = self._after(self._before)
        return self._begun

    def _after(self, count: int) -> Tensor:
        """Return what is open after the first news, which are known from now on."""
        for _, change in self._news[:count]:
            self._known = change(self._known)
        self._news, self._before = self._news[count:], max(0, self._before - count)
        return self._known


class OpenPlaces(Ledger):
    """Positions of a segment that hold masks; under other noise, all that may change.

    The CPU cannot read a canvas without waiting for its device, and need not: it is the CPU that
    says which positions are written.

    Args:
        frozen: [A, S] bool on the CPU, positions that never change.
        process: the noise.
        followed: whether `close` and `replace` tell of every change, from a canvas of noise on;
            else the canvas is read.
        ahead: see `Ledger`.

    Attributes:
        ended: [A] bool on the device, rows of which further calls are in vain; None: it is the CPU
            that leaves them out.
    """

    ended: Tensor | None = None

    def __init__(
        self, frozen: Tensor, process: ForwardProcess, followed: bool = False, ahead: bool = False
    ):
        super().__init__(~frozen, ahead)
        self.process, self.followed = process, followed

    def on(self, canvas: Tensor) -> Tensor:
        """Return the open positions of the canvas as it is, [A, S] bool on the CPU."""
        if self.followed or self.process.replaces_tokens:
            return self.now
        return self.now & (canvas == self.process.mask_token_id).cpu()

    def close(self, positions: Positions, which: Tensor | None = None) -> None:
        """Note that N positions got tokens, or those of them that `which` [N] bool says."""
        if not self.process.replaces_tokens:
            super().close(positions, which)


def widened(positions: Positions, still: Tensor) -> Positions:
    """Return positions and all that are open [A, S] in the same rows, in order."""
    asked = torch.zeros(still.numel(), dtype=torch.bool).index_fill(0, positions.known, True)
    asked = asked.view(still.shape)
    return Positions.where(asked | (asked.any(1, keepdim=True) & still))
