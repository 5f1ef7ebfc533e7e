"""Requests: rows to generate, and how."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from textdiff.sampling.constraints import Constraint
from textdiff.sampling.controls import NEUTRAL, Controls, Hook
from textdiff.sampling.job import Job
from textdiff.sampling.settings import SamplingConfig


@dataclass(frozen=True)
class Request:
    """Rows to generate, and how.

    Attributes:
        job: the rows as tokens, with their seeds.
        config: rule, steps, temperature, ...
        hooks: the user's own functions of log-weights; see `controls.Hook`.
        constraint: what generated text has to look like; None: anything.
        end_token: the end-of-text token, if the model draws one.
        lost: what the model does not see of the prompts as it is written, in sentences.
    """

    job: Job
    config: SamplingConfig = NEUTRAL
    hooks: tuple[Hook, ...] = ()
    constraint: Constraint | None = None
    end_token: int | None = None
    lost: tuple[str, ...] = ()

    @property
    def controls(self) -> Controls:
        """How the drawing distribution departs from the model's."""
        return Controls(
            self.config,
            hooks=self.hooks,
            constraint=self.constraint,
            end_token=self.end_token,
        )

    def rows(self, start: int, stop: int) -> "Request":
        """Return the request of the rows from `start` to before `stop`."""
        return replace(self, job=self.job.part(start, stop))

    @classmethod
    def joined(cls, requests: "Sequence[Request]") -> "Request":
        """Return the rows of several requests, which differ by their jobs alone, as one."""
        return replace(requests[0], job=Job.joined([request.job for request in requests]))
