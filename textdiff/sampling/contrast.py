"""Two predictions of the same positions, of which guidance makes one.

Where a mask is revealed, the two laws of the clean token are mixed; where noise has put a token,
the two laws of the *next* token are (Sec. 3.1, arXiv:2412.10193), and no one law of the clean token
gives what comes of it. Letters: N positions, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction


def mix(told: Tensor, blind: Tensor, weight: float) -> Tensor:
    """[N, V] normalised mixture of log-probabilities; what either thinks impossible is so."""
    possible = (told > -torch.inf) & (blind > -torch.inf)
    # Where they have no token in common, the one that knows more is believed.
    possible = torch.where(possible.any(-1, keepdim=True), possible, told > -torch.inf)
    mixed = torch.where(blind > -torch.inf, blind + (1.0 + weight) * (told - blind), told)
    overflows = (possible & ~mixed.isfinite()).any(-1, keepdim=True)
    mixed = torch.where(overflows, _scaled_mixture(told, blind, weight, possible), mixed)
    return mixed.masked_fill(~possible, -torch.inf).log_softmax(-1)


def _scaled_mixture(told: Tensor, blind: Tensor, weight: float, possible: Tensor) -> Tensor:
    """[N, V] the same, less its largest value, where the products above overflow."""
    dtype, scale = told.dtype, max(1.0, 1.0 + weight)
    told, blind = told.double(), blind.double()
    mixed = blind / scale + (1.0 + weight) / scale * (told - blind)
    mixed = torch.where(blind > -torch.inf, mixed, told / scale).where(possible, -torch.inf)
    mixed = (mixed - mixed.amax(-1, keepdim=True)) * scale
    return mixed.clamp(min=torch.finfo(dtype).min).to(dtype)


class Contrast(Prediction):
    """What two predictions say of clean tokens, mixed; and the two, for laws of noisy tokens.

    Args:
        log_x0: [N, V] the mixture.
        log_score: [N, V] its log ratios where told has any, else None. How likely the mask is,
            where it may be predicted, is as told has it.
        told: of a network that sees what is given.
        blind: of one that does not.
        weight: w of log p = log p_blind + (1 + w) (log p_told - log p_blind).
    """

    def __init__(
        self,
        log_x0: Tensor | Callable[[], Tensor],
        log_score: Tensor | None,
        told: Prediction,
        blind: Prediction,
        weight: float,
    ):
        super().__init__(log_x0, log_score, told.mixture, told.log_state)
        self.told, self.blind, self.weight = told, blind, weight

    @classmethod
    def of(cls, told: Prediction, blind: Prediction, weight: float) -> "Contrast":
        """The contrast of two predictions."""
        score, log_x0 = told.log_score, mix(told.log_x0, blind.log_x0, weight)
        # How fast masks are revealed stays as it was; what they become is guided.
        score = None if score is None else log_x0 + score.logsumexp(-1, keepdim=True)
        return cls(log_x0, score, told, blind, weight)

    def at(self, index: Tensor) -> "Contrast":
        """The predictions of some of the positions."""
        whole = super().at(index)
        told, blind = self.told.at(index), self.blind.at(index)
        return Contrast(lambda: whole.log_x0, whole.log_score, told, blind, self.weight)

    def mixed(self, law: Callable[[Prediction], Tensor]) -> Tensor:
        """[N, V] float64, the two laws of the next token mixed.

        Args:
            law: weights [N, V] of the next token, by a prediction.
        """
        told, blind = (law(part).double() for part in (self.told, self.blind))
        told, blind = (w / w.sum(-1, keepdim=True) for w in (told, blind))
        return mix(told.log(), blind.log(), self.weight).exp()

    def reweighed(self, drawn: Prediction, keep_scores: bool) -> "Contrast":
        """The contrast whose mixture is what controls have made of this one's.

        Both predictions are multiplied by what the mixture was multiplied by, so that a temperature
        or a ban acts once, on what is drawn at last, and not on each side of a quotient.

        Args:
            drawn: [N, V] log-probabilities of the clean token that take the mixture's place.
            keep_scores: whether scores are still those of the predictions.
        """
        before, after = self.log_x0.double(), drawn.log_x0
        factor = torch.where(before > -torch.inf, after - before, -torch.inf)
        fresh = (factor == -torch.inf).all(-1, keepdim=True)  # none of its tokens was left

        def changed(part: Prediction) -> Prediction:
            log_x0 = torch.where(fresh, after, part.log_x0.double() + factor).log_softmax(-1)
            return Prediction(log_x0, part.log_score if keep_scores else None, part.mixture)

        told, blind = changed(self.told), changed(self.blind)
        return Contrast(after, drawn.log_score, told, blind, self.weight)
