"""Suites of measurements by the names that `--suite` uses; one file each."""

from collections.abc import Callable
from dataclasses import dataclass

from textdiff.errors import ConfigError, closest
from textdiff.evaluate.plan import Outcome, Plan, Tell


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        summary: what it measures.
        run: measures what a plan asks for.
        sweeps: whether it goes over a grid of settings, which can be drawn.
    """

    summary: str
    run: Callable[[Plan, Tell], Outcome]
    sweeps: bool = False


def _generation(plan: Plan, tell: Tell) -> Outcome:
    from textdiff.evaluate.generation import generation

    return generation(plan, tell)


def _frontier(plan: Plan, tell: Tell) -> Outcome:
    from textdiff.evaluate.frontier import frontier

    return frontier(plan, tell)


SUITES: dict[str, Suite] = {
    "generation": Suite("texts of one setting, beside real text", _generation),
    "frontier": Suite("perplexity, entropy, tokens per call over a grid", _frontier, sweeps=True),
}


def find_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}; {closest(name, SUITES)}")
    return SUITES[name]
