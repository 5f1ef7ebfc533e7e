"""Predictor and corrector for noise that draws tokens: mistakes are noised and drawn again.

Ancestral steps never look back: a token that survives is believed. Here the law of x_s is

    kappa q(x_s | x_t) + (1 - kappa) q(x_s | x_0), x_0 ~ p(x_0 | x_t),

(the Psi-posterior, arXiv:2602.21185), whose second part noises the clean prediction afresh. Both
have the right marginals, and it costs no further calls. kappa = 1 - redraws / T, so that positions
are noised afresh `redraws` times on average at any number of steps T, and the walk is exact in the
limit of many steps.

Finished texts can then be corrected at their least likely tokens (self-correction,
arXiv:2503.04482): each further call draws all positions at a low temperature and a little noise,
and commits the most probable token that differs, until the share of positions that hold the
network's own likeliest token has stopped rising.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import ForwardProcess
from textdiff.errors import ConfigError
from textdiff.sampling.rules.knobs import check_count, check_number, check_switch
from textdiff.sampling.rules.redrawing import Interval, Law, redraw
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.rules.unmasking import steady
from textdiff.sampling.segment import Segment, Step


@dataclass(frozen=True)
class PredictorCorrector(Rule):
    """Fills the open positions in `steps` network calls, and corrects them in some more.

    Attributes:
        redraws: how often a position is noised afresh on the way, on average; 0 is `ancestral`.
        corrections: most calls of self-correction; 0: none.
        correction_temperature: of its draws.
        correction_time: the time that the network is told.
        patience: calls without a higher share of likeliest tokens after which a row is left alone.
        greedy_tail: take the likeliest tokens at the last step.
    """

    redraws: float = 1.0
    corrections: int = 0
    correction_temperature: float = 0.1
    correction_time: float = 0.01
    patience: int = 32
    greedy_tail: bool = False

    processes: ClassVar[tuple[str, ...]] = ("uniform", "hybrid")
    otherwise: ClassVar[str] = "corrects tokens that noise has drawn"

    def __post_init__(self) -> None:
        check_number("redraws", self.redraws, 0.0)
        check_count("corrections", self.corrections)
        check_number("correction_temperature", self.correction_temperature, 0.0)
        check_number("correction_time", self.correction_time, 0.0, 1.0)
        check_count("patience", self.patience, 1)
        check_switch("greedy_tail", self.greedy_tail)

    def __call__(self, segment: Segment) -> Iterator[Step]:
        if segment.controls.constraint is not None and self.corrections:
            raise ConfigError(
                "self-correction changes single tokens of a finished text, which could leave a "
                "pattern or write a banned string; set corrections to 0, or leave them out"
            )
        yield from redraw(segment, self._law(segment.process), self.greedy_tail)
        yield from self._correct(segment)

    def _law(self, process: ForwardProcess) -> Law:
        def law(prediction: Prediction, before: Tensor, interval: Interval) -> Tensor:
            log_x0, mixture = prediction.log_x0, prediction.mixture
            alpha_s = interval.alpha_s.to(before.device).expand(len(before))
            alpha_t = interval.alpha_t.to(before.device).expand(len(before))
            kept = process.posterior(log_x0, before, alpha_s, alpha_t, mixture)
            clean = process.posterior(log_x0, before, torch.ones_like(alpha_s), alpha_t, mixture)
            share = min(1.0, self.redraws / interval.steps)
            return (1.0 - share) * kept + share * process.marginal(clean, alpha_s)

        return law

    def _correct(self, segment: Segment) -> Iterator[Step]:
        """Commit one token per row and call."""
        frozen, steps = segment.frozen, segment.steps
        rows, width = frozen.shape
        t = torch.full((rows,), self.correction_time, dtype=torch.float64)
        cold = segment.controls.tempered(self.correction_temperature)
        best, stale = torch.full((rows,), -1, dtype=torch.int64), torch.zeros(rows).long()
        size = (~frozen).sum(1)
        live = size > 0
        for index in range(steps, steps + self.corrections):
            asked = ~frozen & live[:, None]
            positions = asked.flatten().nonzero().squeeze(1)
            if not len(positions):
                return
            log_x0 = segment.predict(positions, t).log_x0
            before = segment.tokens(positions)
            tokens = segment.draw(positions, log_x0, t, index, cold)
            agree = torch.zeros_like(asked)
            agree[asked] = (log_x0.argmax(-1) == before).cpu()
            agreed = agree.sum(1)
            live = live & (agreed < size)
            gain = log_x0.gather(-1, tokens[:, None]).squeeze(-1).double()
            gains = torch.full((rows, width), -torch.inf, dtype=torch.float64)
            gains[asked] = gain.masked_fill(tokens == before, -torch.inf).cpu()
            most, column = steady(gains, log_x0.dtype).max(1)
            moves = live & (most > -torch.inf)
            changed = (torch.arange(rows) * width + column)[moves]
            rank = torch.searchsorted(positions, changed)
            segment.put(changed, tokens[rank.to(tokens.device)])
            stale = torch.where(agreed > best, 0, stale + 1)
            best = torch.maximum(agreed, best)
            live = live & (stale < self.patience)
            yield segment.step(changed, t)
