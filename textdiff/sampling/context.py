"""Context of drawn tokens: what controls and hooks read besides the predictions.

A rule has its canvas, the positions that it draws and their time. The engine adds their rows and
the text before them. Letters: A active rows, S canvas positions, N drawn ones, W tokens of the
longest row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.diffusion.process import Vocabulary
from textdiff.models.devices import to_device
from textdiff.sampling.positions import Positions


@dataclass(frozen=True)
class SegmentInfo:
    """Surroundings of the canvas of a segment; tensors on the CPU, but for the text.

    Attributes:
        text: [A, W] tokens of each row from its beginning, final before its canvas.
        starts: [A] place in its row at which each canvas begins.
        lengths: [A] tokens of each row in the end.
        given: [A, W] bool, places whose token is given.
        tails: [A] place at which the open end of each row begins; where it ends in given text, its
            length.
    """

    text: Tensor
    starts: Tensor
    lengths: Tensor
    given: Tensor
    tails: Tensor


@dataclass(frozen=True)
class Context:
    """The tokens that are about to be drawn.

    Attributes:
        canvas: [A, S] tokens before the draw; what is not revealed yet is the mask.
        at: N positions in the canvas.
        t: [A] time of each row, falling from 1 to 0; on the CPU for hooks.
        vocabulary: which ids are clean tokens, and which is the mask.
        info: what surrounds the canvas; None where a rule runs on its own.
    """

    canvas: Tensor
    at: Positions
    t: Tensor
    vocabulary: Vocabulary
    info: SegmentInfo | None = None

    @property
    def positions(self) -> Tensor:
        """[N] CPU, flat positions in the canvas; this and what follows may wait for the device."""
        return self.at.known

    @property
    def row(self) -> Tensor:
        """[N] CPU, row of the canvas of each position, which is always known."""
        return self.at.row

    @property
    def column(self) -> Tensor:
        """[N] CPU, column of each position."""
        return self.positions % self.canvas.shape[1]

    @property
    def place(self) -> Tensor:
        """[N] CPU, place of each position in its row's text; without a info, its column."""
        return self.column if self.info is None else self.info.starts[self.row] + self.column

    def before(self, ends: Tensor) -> Tensor | None:
        """Return which positions come before a place of their row's text, [N] bool on the device.

        Args:
            ends: [A] CPU, the place of each row.

        Returns:
            None if none does, as far as the CPU can tell.
        """
        room = ends if self.info is None else ends - self.info.starts
        columns = room[self.row]  # [N] before which a position has to be
        early = self.at.column < to_device(columns, self.at.flat.device)
        may_be = early if early.device.type == "cpu" else columns > 0
        return to_device(early, self.canvas.device) if bool(may_be.any()) else None

    @property
    def tokens(self) -> Tensor:
        """[N] what stands at the positions now."""
        return self.canvas.flatten()[self.at.on(self.canvas.device)]

    def counts(self, size: int) -> Tensor:
        """Count how often each token occurs in the row of each position, elsewhere than there.

        Counted are the text before the canvas and the canvas, up to the end of the row, masks too.

        Returns:
            [N, size] counts.
        """
        device, width = self.canvas.device, self.canvas.shape[1]
        counts = torch.zeros(len(self.canvas), size, dtype=torch.int32, device=device)
        counted = torch.ones_like(self.canvas, dtype=torch.int32)
        if self.info is not None:
            info, at = self.info, torch.arange(width)
            counted = to_device((info.starts[:, None] + at < info.lengths[:, None]).int(), device)
            before = torch.arange(info.text.shape[1]) < info.starts[:, None]
            counts.scatter_add_(1, info.text, to_device(before.int(), device))
        counts.scatter_add_(1, self.canvas, counted)
        own = counted.flatten()[self.at.on(device)]
        return counts[to_device(self.row, device)].scatter_add(
            1, self.tokens[:, None], -own[:, None]
        )
