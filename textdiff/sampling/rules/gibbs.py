"""Gibbs corrector: some positions are drawn again given all others, at the noise level reached.

At survival probability alpha, position i of x_t is redrawn from q(x_t^i | the other positions):

    alpha l^i(x) + b(x), l^i the leave-one-out distribution of its clean token, b the noise.

With true conditionals that leaves the distribution of x_t as it is, for one position that is chosen
at random. So a chain of such steps corrects errors of ancestral steps. Several positions in one
call, or the least confident ones (arXiv:2407.21243), are an approximation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from textdiff.diffusion.leave_one_out import leave_one_out_of
from textdiff.diffusion.objectives.objective import pick
from textdiff.diffusion.process import indicator
from textdiff.sampling.rules.redrawing import ancestral_transition, grid, redraw
from textdiff.sampling.rules.revising import RevisingRule
from textdiff.sampling.rules.unmasking import steady
from textdiff.section import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from textdiff.diffusion.objectives import Prediction
    from textdiff.diffusion.process import ForwardProcess
    from textdiff.sampling.rules.redrawing import Interval
    from textdiff.sampling.rules.revising import Revision
    from textdiff.sampling.segment import Segment
    from textdiff.sampling.step import Step


class Gibbs(RevisingRule):
    """Redraws some positions given all others after every ancestral step, `steps` calls in all."""

    kind: Literal["gibbs"] = "gibbs"
    correctors: int = Field(
        1, ge=0, description="calls after each ancestral step that redraw positions; 0 is ancestral"
    )
    positions: int = Field(4, ge=1, description="positions of a row that such a call redraws")
    choice: Literal["confidence", "random"] = Field(
        "confidence",
        description="take the positions whose tokens are the least likely given the others, or any",
    )
    greedy_tail: bool = Field(False, description="take the likeliest tokens at the last step")

    processes: ClassVar[tuple[str, ...]] = ("uniform", "hybrid")
    task: ClassVar[str] = "redraws tokens that noise may have replaced"
    chance: ClassVar[str] = "writes tokens over others, so that many ways lead to one text"

    def __call__(self, segment: Segment) -> Iterator[Step]:
        # P steps and P - 1 times their correctors are at most `steps` calls.
        steps = (segment.steps + self.correctors) // (1 + self.correctors)
        revision, intervals = self.revision(segment), grid(segment.schedule, steps)
        transition = ancestral_transition(segment.process)
        walk = redraw(segment, transition, revision, self.greedy_tail, steps)
        for interval, step in zip(intervals, walk, strict=False):  # no row may be left
            yield step
            for call in range(0 if interval.last else self.correctors):
                if revision.none_left:
                    break
                number = steps + interval.index * self.correctors + call
                correction = self._correct(segment, revision, interval, number)
                if revision.was_needed():
                    yield correction

    def _correct(
        self, segment: Segment, revision: Revision, interval: Interval, number: int
    ) -> Step:
        """Redraw positions of every row at the end of an interval, in one call."""
        alpha, process = interval.alpha_s, segment.process
        t = segment.schedule.t_of_alpha(alpha).clamp(0.0, 1.0).expand(len(segment.canvas))

        def transition(prediction: Prediction, tokens: Tensor) -> Tensor:
            return conditional(process, prediction, tokens, alpha)

        asked, u = revision.positions(), segment.position_uniforms(number)
        prediction = segment.predict(asked, t)
        keys = asked.read(u)  # [N]
        if self.choice == "confidence":
            tokens = segment.tokens(asked)

            def stays(chunk: slice) -> Tensor:
                return pick(transition(prediction.at(chunk), tokens[chunk]), tokens[chunk])

            doubt = -segment.by_parts(len(asked), stays).log()
            keys = steady(doubt, prediction.at(slice(0, 1)).log_x0.dtype)
        number_each = asked.number.clamp(max=self.positions)
        index, _ = asked.first(asked.ranked(keys), number_each)
        few, prediction = asked.take(index, number_each), prediction.at(segment.send(index))
        chosen = segment.chosen(few, revision.still(few))
        moved = segment.redraw(chosen, prediction, t, transition, number)
        return segment.step(chosen.at, t, moved=moved)


def conditional(
    process: ForwardProcess, prediction: Prediction, tokens: Tensor, alpha: Tensor
) -> Tensor:
    """Return [N, V] q(x_t^i | the other positions of x_t) at a noise level.

    Without any noise a posterior says nothing of the other positions: tokens then stay.

    Args:
        process: noise that replaces tokens.
        prediction: of these positions.
        tokens: [N] what they hold.
        alpha: survival probability, a scalar.
    """
    alphas = torch.full((len(tokens),), float(alpha), dtype=torch.float64, device=tokens.device)
    left_out = leave_one_out_of(process, prediction, tokens, alphas).exp()
    unknown = left_out.isnan().any(-1, keepdim=True)
    stays = indicator(tokens, left_out.shape[-1])
    return torch.where(unknown, stays, process.marginal(left_out, alphas))
