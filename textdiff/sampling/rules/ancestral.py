"""Ancestral sampling: x_s drawn from its posterior, down the grid t_0 = 1 > ... > t_T = 0.

Under absorbing noise (Eq. 7, arXiv:2406.07524) a masked position is revealed between t and s with
probability (alpha_s - alpha_t) / (1 - alpha_t), whatever the network says. So the step at which
each position is revealed is drawn ahead, from one uniform; a row calls the network only at steps
that reveal something, and rows do not wait for each other's steps. Under noise that draws tokens
every open position is drawn anew at every step; so is every masked one where some tokens are lost
faster than others, since what the network says then decides when a position is revealed, too. Where
the network may predict the mask, it decides that as well, and each step reveals by its own chance.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.processes import Absorbing
from textdiff.diffusion.randomness import Stream
from textdiff.sampling.rules.knobs import check_switch
from textdiff.sampling.rules.redrawing import Interval, ancestral_law, redraw
from textdiff.sampling.rules.revealing import reveal_by_chance
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.segment import Segment, Step


@dataclass(frozen=True)
class Ancestral(Rule):
    """Fills the open positions in at most `steps` network calls per row.

    Attributes:
        greedy_tail: take the likeliest tokens at the last step (arXiv:2506.10892): less
            noise in the text, and less entropy.
    """

    greedy_tail: bool = False

    processes: ClassVar[tuple[str, ...]] = ("absorbing", "absorbing by token", "uniform", "hybrid")

    def __post_init__(self) -> None:
        check_switch("greedy_tail", self.greedy_tail)

    def suited(self, family: Family) -> Rule:
        return _AncestralOfMasks(self.greedy_tail) if family.objective.predicts_mask else self

    def __call__(self, segment: Segment) -> Iterator[Step]:
        process = segment.process
        if not process.replaces_tokens and not process.by_token:
            yield from _reveal(segment, self.greedy_tail)
            return
        yield from redraw(segment, ancestral_law(segment.process), self.greedy_tail)


@dataclass(frozen=True)
class _AncestralOfMasks(Ancestral):
    """Ancestral sampling where the network may predict the mask.

    The probability of the mask decides when one is revealed: it is plugged into the posterior, as
    in the bound (Eq. 16, arXiv:2406.07524). Only at the last step, which leaves no mask, it is left
    out.
    """

    def __call__(self, segment: Segment) -> Iterator[Step]:
        process = segment.process
        assert isinstance(process, Absorbing)

        def chance(prediction: Prediction, interval: Interval) -> Tensor:
            state = prediction.log_state
            assert state is not None
            alpha_s, alpha_t = (x.to(state.device) for x in (interval.alpha_s, interval.alpha_t))
            return process.reveal_probability(state, alpha_s, alpha_t)

        yield from reveal_by_chance(segment, chance, self.greedy_tail)


def _reveal(segment: Segment, greedy_tail: bool) -> Iterator[Step]:
    """Reveal every open position once, greedily at the last step if asked to."""
    steps, frozen = segment.steps, segment.frozen
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    u = segment.uniforms(Stream.POSITION, 0)
    when = reveal_steps(segment.schedule.alpha(times), u).masked_fill(frozen, steps)
    event, first = _events(when, steps)
    for index in range(first.shape[1]):
        positions = (event == index).flatten().nonzero().squeeze(1)
        t = times[first[:, index].clamp(max=steps)]
        log_x0 = segment.predict(positions, t).log_x0
        tokens = segment.draw(positions, log_x0, t)
        if greedy_tail:
            best = segment.draw(positions, log_x0, t, controls=segment.controls.cold())
            last = when.flatten()[positions] == steps - 1
            tokens = torch.where(last.to(tokens.device), best, tokens)
        segment.put(positions, tokens)
        yield segment.step(positions, t)


def reveal_steps(alphas: Tensor, u: Tensor) -> Tensor:
    """The step (0 … T - 1) at which each position is revealed.

    P(revealed by step j) = (alpha_{j+1} - alpha_0) / (1 - alpha_0), and 1 at the last step.

    Args:
        alphas: [T + 1] survival probabilities on the grid, rising.
        u: uniforms of any shape.
    """
    by = (alphas[1:] - alphas[0]) / (1.0 - alphas[0])
    return torch.searchsorted(by[:-1].contiguous(), u, right=True)


def _events(when: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Numbers each row's own non-empty steps.

    Args:
        when: [R, L] step of each position, `steps` for never.
        steps: T.

    Returns:
        [R, L] number of the event at which each position is revealed (-1: never), and [R, E] the
        step of each event (`steps` where a row has fewer events).
    """
    rows = when.shape[0]
    ordered, where = when.sort(1)
    opens = (ordered < steps) & (ordered.diff(dim=1, prepend=ordered.new_full((rows, 1), -1)) > 0)
    number = (opens.cumsum(1) - 1).where(ordered < steps, -1)
    most = int(opens.sum(1).max()) if rows else 0
    first = ordered.where(opens, steps).sort(1).values[:, :most]
    return torch.empty_like(number).scatter(1, where, number), first
