"""Ancestral sampling: x_s drawn from its posterior, down the grid t_0 = 1 > ... > t_T = 0.

Under absorbing noise a mask is revealed between t and s with probability (alpha_s - alpha_t) / (1 -
alpha_t), whatever the network predicts (Eq. 7, arXiv:2406.07524). So the step at which each
position is revealed is drawn ahead, from one uniform. A row calls the network only at steps that
reveal something, and rows do not wait for each other's steps. Under noise that replaces tokens
every open position is drawn anew at every step. So is every mask where some tokens are masked
faster than others, since then the prediction decides when a position is revealed, too. Where the
network may predict the mask, it decides that as well, and each step reveals by its own chance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field

from textdiff.errors import ConfigError
from textdiff.sampling.rules.redrawing import ancestral_transition, even_times, redraw
from textdiff.sampling.rules.revising import RevisingRule
from textdiff.sampling.rules.unmasking import unmask_by_chance
from textdiff.section import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from textdiff.diffusion.family import Family
    from textdiff.diffusion.objectives import Prediction
    from textdiff.diffusion.processes import Absorbing
    from textdiff.sampling.rules.redrawing import Interval
    from textdiff.sampling.rules.rule import Rule
    from textdiff.sampling.segment import Segment
    from textdiff.sampling.step import Step


class Ancestral(RevisingRule):
    """Draws x_s from q(x_s | x_t), in at most `steps` network calls per row."""

    kind: Literal["ancestral"] = "ancestral"
    greedy_tail: bool = Field(
        False,
        description="take the likeliest tokens at the last step (arXiv:2506.10892): fewer odd "
        "tokens, and less entropy",
    )

    processes: ClassVar[tuple[str, ...]] = ("absorbing", "absorbing by token", "uniform", "hybrid")
    chance: ClassVar[str] = "draws the step in which each token is written"

    def suited(self, family: Family) -> Rule:
        rule = super().suited(family)
        if family.objective.predicts_mask:
            return _AncestralOfMasks(greedy_tail=self.greedy_tail)
        return rule

    def __call__(self, segment: Segment) -> Iterator[Step]:
        process = segment.process
        if process.by_token and segment.controls.constraint is not None:
            raise ConfigError(
                "patterns and bans need positions that are chosen before their tokens, and with a "
                "learned schedule a token decides when it is revealed; leave them out",
                code="pattern_with_learned_schedule",
            )
        if process.replaces_tokens or process.by_token:
            transition, revision = ancestral_transition(process), self.revision(segment)
            yield from redraw(segment, transition, revision, self.greedy_tail)
            return
        steps = segment.steps
        times = even_times(steps)
        u = segment.position_uniforms(0)
        when = reveal_steps(segment.schedule.alpha(times), u).masked_fill(segment.frozen, steps)
        event, first = _events(when, steps)
        for index in range(first.shape[1]):
            positions = segment.where(event == index)
            last = positions.read(when) == steps - 1
            yield segment.reveal(positions, times[first[:, index]], last & self.greedy_tail)


class _AncestralOfMasks(Ancestral):
    """Ancestral sampling where the network may predict the mask.

    The probability of the mask decides when one is revealed: it is plugged into the posterior, as
    in the bound (Eq. 16, arXiv:2406.07524), except at the last step, which leaves no mask.
    """

    def __call__(self, segment: Segment) -> Iterator[Step]:
        process = cast("Absorbing", segment.process)

        def chance(prediction: Prediction, interval: Interval) -> Tensor:
            state = prediction.log_state
            assert state is not None
            return process.reveal_probability(state, *interval.alphas(state))

        yield from unmask_by_chance(segment, chance, self.greedy_tail)


def reveal_steps(alphas: Tensor, u: Tensor) -> Tensor:
    """Return the step (0 … T - 1) at which each position is revealed.

    P(revealed by step j) = (alpha_{j+1} - alpha_0) / (1 - alpha_0), and 1 at the last step.

    Args:
        alphas: [T + 1] survival probabilities on the grid, rising.
        u: uniforms of any shape.
    """
    by = (alphas[1:] - alphas[0]) / (1.0 - alphas[0])
    return torch.searchsorted(by[:-1].contiguous(), u, right=True)


def _events(when: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Number each row's own non-empty steps.

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
