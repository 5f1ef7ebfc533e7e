"""Classifier-free guidance: away from what the network would write without the given text.

Two predictions of every position, one that knows the given tokens and one that does not, are mixed
in log-probabilities (Sec. 3.1, arXiv:2412.10193; unsupervised, arXiv:2502.09992):

    log p = log p_without + (1 + w) (log p_with - log p_without), normalised.

Not to know a token is to see a mask in its place. Networks of masked diffusion are trained to;
those of uniform noise are if training hid prompts (`diffusion.noise.prompt_dropout`). In blocks,
whole blocks before the first open place are not there at all, and the text begins behind them, so
that the network sees no stretches of masks among finished blocks, which it does not know.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.objectives import Prediction
from textdiff.errors import ConfigError
from textdiff.sampling.contrast import Contrast
from textdiff.sampling.denoiser import Predictor


def check_guidance(weight: float, family: Family) -> None:
    """Stops whoever asks for a guidance that is not defined.

    Raises:
        ConfigError: a weight that is not finite or below -1, or noise without a mask in a network
            that has never seen one in a prompt's place.
    """
    if not -1.0 <= weight < float("inf"):
        raise ConfigError(
            f"guidance {weight}: give -1 or more (0 is none, -1 ignores what is given)"
        )
    if weight and not family.process.has_mask and not family.hides_prompts:
        raise ConfigError(
            "guidance compares with a text whose given tokens are masked, "
            f"{family.process.name} noise has no mask, and this model was not trained with hidden "
            "prompts (diffusion.noise.prompt_dropout); leave guidance out, or use a hook"
        )


class Guided(Predictor):
    """Two predictors as one.

    Args:
        informed: sees what is given.
        ignorant: does not; of the same kind.
        given: [R, W] bool on the host, places whose token is given.
        weight: w; 0 is the informed one alone.
    """

    def __init__(self, informed: Predictor, ignorant: Predictor, given: Tensor, weight: float):
        super().__init__(informed.model, informed.family)
        self.informed, self.ignorant, self.weight = informed, ignorant, weight
        self.given = given
        self.admitted = 0
        self.row = torch.zeros(0, dtype=torch.int64)  # [A] row of the job in each slot
        self.hidden = torch.zeros(0, dtype=torch.int64)  # [A] tokens that are not there

    def admit(self, text: Tensor, finished: Tensor) -> None:
        """Rows are admitted in the order of the job."""
        size = self.family.block_size
        hidden = torch.zeros_like(finished) if size is None else finished // size * size
        self.row = torch.cat([self.row, self.admitted + torch.arange(len(text))])
        self.hidden = torch.cat([self.hidden, hidden])
        self.admitted += len(text)
        self.informed.admit(text, finished)
        new = slice(len(self.row) - len(text), None)
        self.ignorant.admit(self._without(text, new), finished - hidden)
        self._count()

    def keep(self, order: Sequence[int]) -> None:
        """Both let the same rows go."""
        self.row, self.hidden = self.row[list(order)], self.hidden[list(order)]
        self.informed.keep(order)
        self.ignorant.keep(order)

    def enter(self, text: Tensor, starts: Tensor, widths: Tensor, frozen: Tensor) -> None:
        """Both turn to the next segment, the one at an earlier place if tokens are not there."""
        columns = starts[:, None] + torch.arange(int(widths.max()))
        last = self.given.shape[1] - 1
        known = self.given[self.row[:, None], columns.clamp(max=last)] & (columns <= last)
        self.known = known.to(text.device)
        self.informed.enter(text, starts, widths, frozen)
        self.ignorant.enter(self._without(text, slice(None)), starts - self.hidden, widths, frozen)
        self._count()

    def __call__(self, canvas: Tensor, t: Tensor, positions: Tensor) -> Prediction:
        """Two network calls on the rows that own the positions."""
        mask = self.family.process.mask_token_id
        told = self.informed(canvas, t, positions)
        blind = self.ignorant(canvas.masked_fill(self.known, mask), t, positions)
        self._count()
        return Contrast.of(told, blind, self.weight)

    def _without(self, text: Tensor, slots: slice) -> Tensor:
        """The text of some slots with masks for what is given, and without what is not there."""
        given = torch.nn.functional.pad(
            self.given[self.row[slots]], (0, max(0, text.shape[1] - self.given.shape[1]))
        )[:, : text.shape[1]]
        masked = text.masked_fill(given.to(text.device), self.family.process.mask_token_id)
        at = self.hidden[slots, None] + torch.arange(text.shape[1])
        return masked.gather(1, at.clamp(max=text.shape[1] - 1).to(text.device))

    def _count(self) -> None:
        self.calls = self.informed.calls + self.ignorant.calls
        self.rows = self.informed.rows + self.ignorant.rows
