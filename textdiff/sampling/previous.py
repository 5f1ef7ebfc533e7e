"""Open positions of a segment, and earlier predictions of them, for networks that read these.

A call reads what the last call of the same row predicted at the positions that are still open, and
predicts all of these. The first call of a segment reads nothing, and neither does a position that
was masked again since that call. So a text depends on its own calls alone: not on its batch, on a
cache, or on which positions a rule asks for. Letters: A active rows, S canvas positions, N
positions of one call, H hidden.
"""

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import ForwardProcess
from textdiff.models import Denoiser, Previous
from textdiff.models.devices import to_device
from textdiff.sampling.parts import by_parts
from textdiff.sampling.positions import Positions


class OpenPlaces:
    """Positions of a segment that hold masks; under other noise, all that may change.

    The CPU cannot read a canvas without waiting for its device, and need not: it is the CPU that
    says which positions are written.

    Args:
        frozen: [A, S] bool on the CPU, positions that never change.
        process: the noise.
        followed: whether `close` and `reopen` tell of every change, from a canvas of noise on; else
            the canvas is read.
    """

    def __init__(self, frozen: Tensor, process: ForwardProcess, followed: bool = False):
        self.process, self.followed = process, followed
        self._now = ~frozen  # [A, S] on the CPU, but for what was closed since
        self.closed: list[tuple[Positions, Tensor | None]] = []

    @property
    def now(self) -> Tensor:
        """[A, S] bool on the CPU; may wait for the device, if the network chose what was closed."""
        for positions, which in self.closed:
            closed = positions.known if which is None else positions.known[which.cpu()]
            self._now = self._now.flatten().index_fill(0, closed, False).view_as(self._now)
        self.closed = []
        return self._now

    def on(self, canvas: Tensor) -> Tensor:
        """Return the open positions of the canvas as it is, [A, S] bool on the CPU."""
        if self.followed or self.process.replaces_tokens:
            return self.now
        return self.now & (canvas == self.process.mask_token_id).cpu()

    def close(self, positions: Positions, which: Tensor | None = None) -> None:
        """Note that N positions got tokens, or those of them that `which` [N] bool says."""
        if not self.process.replaces_tokens:
            self.closed.append((positions, which))

    def reopen(self, where: Tensor) -> None:
        """Note that positions [A, S] bool were masked again."""
        self._now = self.now | where


def widened(positions: Positions, still: Tensor) -> Positions:
    """Return positions and all that are open [A, S] in the same rows, in order."""
    asked = torch.zeros(still.numel(), dtype=torch.bool).index_fill(0, positions.known, True)
    asked = asked.view(still.shape)
    return Positions.where(asked | (asked.any(1, keepdim=True) & still))


class PreviousPredictions:
    """Last prediction of each row of a segment, as expected embeddings.

    Args:
        model: the network.
        places: open positions of the segment.
    """

    def __init__(self, model: Denoiser, places: OpenPlaces):
        self.model, self.places, self.process = model, places, places.process
        self.known = torch.zeros_like(places.now).flatten()  # [A * S], on the CPU
        self.open = self.known
        self.expected: Tensor | None = None  # [A * S, H]

    def wanted(self, canvas: Tensor, positions: Positions) -> Positions:
        """Return the positions that a call predicts, of which a rule asks for some."""
        still = self.places.on(canvas)
        self.open = still.flatten()
        return widened(positions, still)

    def keep(self, positions: Positions, prediction: Prediction) -> None:
        """Replace what is known of the rows of these positions."""
        rows = self.process.vocabulary.clean

        def expected(chunk: slice) -> Tensor:
            return self.model.expected(prediction.at(chunk).log_x0)

        new = by_parts(len(positions), len(rows), expected)  # [N, H]
        if self.expected is None:
            self.expected = new.new_zeros(self.known.numel(), new.shape[-1])
        self.expected = self.expected.index_copy(0, positions.on(new.device), new)
        self.known.view(positions.shape)[torch.unique(positions.row)] = False
        self.known[positions.known] = self.open[positions.known]

    def at(self, positions: Positions, places: Tensor) -> Previous | None:
        """Return the inputs of a call; None: nothing is known.

        Args:
            positions: N positions of the canvas.
            places: [N] the same as flat indices into the tokens of the call.
        """
        known = (self.known & self.open)[positions.known]  # [N]
        if self.expected is None or not bool(known.any()):
            return None
        device = self.expected.device
        here = positions[known].on(device)
        return Previous(to_device(places[known], device), self.expected[here])
