"""Score entropy: the network's output is the log ratio of probabilities (arXiv:2310.16834).

Under absorbing noise only masked positions contribute. Their outputs are scaled by 1 / (e^sigma -
1) (App. C.1 there) and by 1 / K. So they need not grow with the noise and start near the truth. The
ratio alpha / (1 - alpha) then cancels from the loss. It is cross-entropy plus Z - 1 - ln Z for
scores that add up to Z times what they should. Under uniform noise every position contributes.
Published uniform models, and absorbing ones with `scale_by_sigma: false`, have outputs that are the
log ratios themselves: `scaled: false`.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives.objective import (
    Objective,
    Prediction,
    clean_log_softmax,
    pick,
    wide,
)
from textdiff.diffusion.process import ForwardProcess
from textdiff.section import Tensor, torch


class SEDD(Objective):
    """Score entropy: the network predicts log ratios (arXiv:2310.16834)."""

    kind: Literal["sedd"] = "sedd"
    scaled: bool = Field(
        True,
        description="scale outputs by the noise level; false: they are the log ratios themselves",
    )

    processes = ("absorbing", "uniform")
    reason = "its score entropy is written for noise of one kind; gidd takes both"
    predicts_score = True

    def _implementation(self, process: ForwardProcess) -> type[Objective]:
        return SEDDUniform if process.replaces_tokens else SEDDAbsorbing


class SEDDAbsorbing(SEDD):
    """Score entropy under absorbing noise (Eq. 5 and 9, arXiv:2310.16834)."""

    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        score = wide(logits).masked_fill(~self.vocabulary.clean, -torch.inf)
        if self.scaled:
            ratio = torch.log(alpha) - torch.log1p(-alpha) - math.log(self.vocabulary.count)
            score = score + ratio[:, None].to(score.dtype)
        return Prediction(lambda: clean_log_softmax(logits, self.vocabulary), score)

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        from textdiff.diffusion.objectives.exponentials import sum_of_exponentials

        assert prediction.log_score is not None
        ratio = torch.log(noise.alpha) - torch.log1p(-noise.alpha)
        scaled = prediction.log_score - ratio[:, None].to(prediction.log_score.dtype)
        return noise.weight * (sum_of_exponentials(scaled) - 1.0 - pick(scaled, x0))


class SEDDUniform(SEDD):
    """Score entropy under uniform noise (Eq. 5, arXiv:2310.16834), at every position.

    With b = (1 - alpha) / K the true ratios at x_t = x0 are all b / (alpha + b). Elsewhere they are
    1, and the inverse of that at x0. All of them tend to 1 as alpha does to 0, and the bound is
    infinite for scores that do not. So outputs are scaled by alpha / (alpha + b), which is about 1
    until hardly any clean token is left.
    """

    scores_all_positions = True

    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        score = wide(logits).masked_fill(~self.vocabulary.clean, -torch.inf)
        if self.scaled:
            score = score * self.scale(alpha)[:, None].to(score.dtype)
        score = score.scatter(-1, xt[:, None], 0.0)
        return Prediction(lambda: self.process.log_x0(score, xt, alpha).to(score.dtype), score)

    def scale(self, alpha: Tensor) -> Tensor:
        """Return the [N] factor from the network's outputs to log scores."""
        kept = self.vocabulary.count * alpha
        scale: Tensor = kept / (kept + 1.0 - alpha)
        return scale

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        from textdiff.diffusion.objectives.exponentials import sum_of_excess, total

        score = prediction.log_score
        assert score is not None
        count, alpha = self.vocabulary.count, noise.alpha
        b = (1.0 - alpha) / count
        ratio = b / (alpha + b)
        # Sums of s - 1 - ln s, small when scores are about 1: sums of s itself would cancel.
        score = score.masked_fill(~self.vocabulary.clean, 0.0)
        excess, logs = sum_of_excess(score), total(score)
        stays = (1.0 - ratio) * logs + (count - 1) * (1.0 + ratio * (ratio.log() - 1.0))
        moves = 1.0 - (ratio.log() + 1.0) / ratio - (1.0 / ratio - 1.0) * pick(score, x0)
        rate = (1.0 - alpha) / (alpha * count)
        return noise.weight * rate * (excess + torch.where(xt == x0, stays, moves))
