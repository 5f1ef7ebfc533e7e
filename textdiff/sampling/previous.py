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
        self.first = to_device(places.now, model.device)  # [A, S] open at first
        self.open = self.first
        self.known = torch.zeros_like(self.first)  # [A, S] predicted by the last call of the row
        self.expected: Tensor | None = None  # [A * S, H]

    def wanted(self, canvas: Tensor, positions: Positions) -> Positions:
        """Return the positions that a call predicts, of which a rule asks for some."""
        self.open = self.first
        if not self.process.replaces_tokens:
            self.open = self.first & (canvas == self.process.mask_token_id)
        if positions.flat.device.type != "cpu":  # rules that leave the choice there ask for all
            return positions
        return widened(positions, self.open if canvas.device.type == "cpu" else self.places.known)

    def keep(self, positions: Positions, prediction: Prediction) -> None:
        """Replace what is known of the rows of these positions, unless they have ended."""
        rows = self.process.vocabulary.clean

        def expected(chunk: slice) -> Tensor:
            return self.model.expected(prediction.at(chunk).log_x0)

        new = by_parts(len(positions), len(rows), expected)  # [N, H]
        if self.expected is None:
            self.expected = new.new_zeros(self.known.numel(), new.shape[-1])
        here, going = positions.on(new.device), None
        left_out = to_device(positions.number == 0, self.known.device)  # [A]
        if (ended := self.places.ended) is not None:
            going, left_out = positions.of_rows(~ended), left_out | ended
            new = torch.where(going[:, None], new, self.expected[here])
        self.expected = self.expected.index_copy(0, here, new)
        kept = self.known & left_out[:, None]
        self.known = positions.replaced(kept, positions.entries(self.open), going)

    def at(self, positions: Positions, places: Tensor) -> Previous | None:
        """Return the inputs of a call; None: nothing is known.

        Args:
            positions: N positions of the canvas.
            places: [N] the same as flat indices into the tokens of the call.
        """
        if self.expected is None:
            return None
        known = positions.entries(self.known & self.open)  # [N]
        here = positions.on(known.device)
        if known.device.type != "cpu":  # which of them are known is decided there
            return Previous(to_device(places, known.device), self.expected[here], known)
        return Previous(places[known], self.expected[here[known]]) if bool(known.any()) else None
