"""Predictor and corrector for noise that replaces tokens: mistakes are noised and drawn again.

Ancestral steps never look back: a token that survives is believed. Here x_s is drawn from

    kappa q(x_s | x_t) + (1 - kappa) q(x_s | x_0), x_0 ~ p(x_0 | x_t),

(the Psi-posterior, arXiv:2602.21185), whose second term noises the clean prediction afresh. Both
have the right marginals, and it costs no further calls. kappa = 1 - redraws / T, so that positions
are noised afresh `redraws` times on average at any number of steps T, and the walk is exact in the
limit of many steps.

Finished texts can then be corrected at their least likely tokens (self-correction,
arXiv:2503.04482): each further call draws all positions at a low temperature and a little noise,
and commits the most probable token that differs. It ends when the share of positions that hold the
network's own likeliest token has stopped rising.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from textdiff.errors import ConfigError
from textdiff.sampling.rules.redrawing import redraw
from textdiff.sampling.rules.revising import RevisingRule
from textdiff.sampling.rules.unmasking import steady
from textdiff.section import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from textdiff.diffusion.objectives import Prediction
    from textdiff.diffusion.process import ForwardProcess
    from textdiff.sampling.rules.redrawing import Interval, Transition
    from textdiff.sampling.segment import Segment
    from textdiff.sampling.step import Step


class PredictorCorrector(RevisingRule):
    """Noises some positions afresh at each of `steps` calls, and corrects the text in some more."""

    kind: Literal["predictor_corrector"] = "predictor_corrector"
    redraws: float = Field(
        1.0,
        ge=0.0,
        description="how often a position is noised afresh on the way, on average; 0 is ancestral",
    )
    corrections: int = Field(0, ge=0, description="most calls of self-correction")
    correction_temperature: float = Field(0.1, ge=0.0, description="of its draws")
    correction_time: float = Field(
        0.01, ge=0.0, le=1.0, description="time that the network is given in these calls"
    )
    patience: int = Field(
        32,
        ge=1,
        description="calls without a higher share of likeliest tokens after which a row is left "
        "alone",
    )
    greedy_tail: bool = Field(False, description="take the likeliest tokens at the last step")

    processes: ClassVar[tuple[str, ...]] = ("uniform", "hybrid")
    task: ClassVar[str] = "corrects tokens that noise has replaced"
    chance: ClassVar[str] = "writes tokens over others, so that many ways lead to one text"

    def __call__(self, segment: Segment) -> Iterator[Step]:
        if segment.controls.constraint is not None and self.corrections:
            raise ConfigError(
                "self-correction changes single tokens of a finished text, which could leave a "
                "pattern or write a banned string; set corrections to 0, or leave them out",
                code="pattern_with_corrections",
            )
        transition, revision = self._transition(segment.process), self.revision(segment)
        yield from redraw(segment, transition, revision, self.greedy_tail)
        yield from self._correct(segment)

    def _transition(self, process: ForwardProcess) -> Transition:
        def transition(prediction: Prediction, tokens: Tensor, interval: Interval) -> Tensor:
            log_x0, mixture = prediction.log_x0, prediction.mixture
            alpha_s, alpha_t = interval.alphas(tokens)
            kept = process.posterior(log_x0, tokens, alpha_s, alpha_t, mixture)
            clean = process.posterior(log_x0, tokens, torch.ones_like(alpha_s), alpha_t, mixture)
            share = min(1.0, self.redraws / interval.steps)
            return (1.0 - share) * kept + share * process.marginal(clean, alpha_s)

        return transition

    def _correct(self, segment: Segment) -> Iterator[Step]:
        """Commit one token per row and call."""
        is_open = ~segment.frozen  # [R, S]
        size = segment.decided(is_open.sum(1))  # [R]
        t = torch.full((len(is_open),), self.correction_time, dtype=torch.float64)
        controls = segment.controls.tempered(self.correction_temperature)
        best, stale, live = torch.full_like(size, -1), torch.zeros_like(size), size > 0
        ledger, segment.places.ended = segment.ledger(is_open), None  # all rows go on
        for index in range(segment.steps, segment.steps + self.corrections):
            if ledger.none_left:
                return
            positions = segment.where(ledger.begin())
            prediction = segment.predict(positions, t)
            before = segment.tokens(positions)
            tokens = segment.draw(positions, prediction, t, index, controls)
            agree = segment.likeliest(prediction, len(positions)) == before
            agreed = positions.count(segment.decided(agree))
            live = live & (agreed < size)
            gain = segment.log_chances(prediction, tokens).masked_fill(tokens == before, -torch.inf)
            gains = positions.spread(segment.decided(gain))
            most, column = steady(gains, prediction.at(slice(0, 1)).log_x0.dtype).max(1)
            moves = live & (most > -torch.inf)
            which = positions.is_at(column) & positions.of_rows(moves)
            stale = torch.where(agreed > best, 0, stale + 1)
            best = torch.maximum(agreed, best)
            live = live & (stale < self.patience)
            chosen = segment.chosen(positions, which)
            segment.put(chosen.at, tokens[chosen.predicted], chosen.which)
            ledger.close(positions, ~positions.of_rows(live))
            if not bool(ledger.settle().any()):
                return
            yield segment.step(positions, t, moved=which)
