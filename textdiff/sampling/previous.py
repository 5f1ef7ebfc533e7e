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
from textdiff.models import Denoiser, Previous
from textdiff.models.devices import to_device
from textdiff.sampling.open_places import OpenPlaces, widened
from textdiff.sampling.parts import by_parts
from textdiff.sampling.positions import Positions


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
