"""Earlier predictions of the positions of a segment, for networks with self-conditioning.

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


def open_places(canvas: Tensor, frozen: Tensor, process: ForwardProcess) -> Tensor:
    """Return [A, S] bool: masks, or all that may change under other noise.

    Args:
        canvas: [A, S] tokens.
        frozen: [A, S] bool on the CPU, positions that never change.
        process: the noise.
    """
    still = ~frozen.to(canvas.device)
    if not process.replaces_tokens:
        still = still & (canvas == process.mask_token_id)
    return still


def widened(positions: Tensor, still: Tensor) -> Tensor:
    """Return flat CPU positions and all that are open [A, S] in the same rows, in order."""
    asked = torch.zeros(still.numel(), dtype=torch.bool).index_fill(0, positions, True)
    called = asked.view(still.shape).any(1, keepdim=True)
    return (asked | (called & still.cpu()).flatten()).nonzero().squeeze(1)


class PreviousPredictions:
    """Last prediction of each row of a segment, as expected embeddings.

    Args:
        model: the network.
        process: the noise.
        frozen: [A, S] bool on the CPU, positions that never change.
    """

    def __init__(self, model: Denoiser, process: ForwardProcess, frozen: Tensor):
        self.model, self.process, self.frozen = model, process, frozen
        self.known = torch.zeros_like(frozen).flatten()  # [A * S], on the CPU
        self.open = self.known
        self.expected: Tensor | None = None  # [A * S, H]

    def wanted(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Return the flat positions that a call predicts, of which a rule asks for some."""
        still = open_places(canvas, self.frozen, self.process).cpu()
        self.open = still.flatten()
        return widened(positions, still)

    def keep(self, positions: Tensor, prediction: Prediction) -> None:
        """Replace what is known of the rows of these positions [N]."""
        new = self.model.expected(prediction.log_x0)  # [N, H]
        if self.expected is None:
            self.expected = new.new_zeros(self.known.numel(), new.shape[-1])
        self.expected = self.expected.index_copy(0, positions.to(new.device), new)
        width = self.frozen.shape[1]
        self.known.view(-1, width)[torch.unique(positions // width)] = False
        self.known[positions] = self.open[positions]

    def at(self, positions: Tensor, places: Tensor) -> Previous | None:
        """Return the inputs of a call; None: nothing is known.

        Args:
            positions: [N] flat positions of the canvas.
            places: [N] the same as flat indices into the tokens of the call.
        """
        known = (self.known & self.open)[positions]  # [N]
        if self.expected is None or not bool(known.any()):
            return None
        device = self.expected.device
        return Previous(places[known].to(device), self.expected[positions[known].to(device)])
