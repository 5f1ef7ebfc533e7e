"""Base of the estimators: how one replicate scores some windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from textdiff.errors import ConfigError
from textdiff.likelihood.estimators.window_batch import WindowBatch, strata
from textdiff.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from textdiff.diffusion.family import Family
    from textdiff.likelihood.scorer import Scorer
    from textdiff.likelihood.windows import Windows
    from textdiff.models import TextDiffusionModel

    Parts = dict[str, Tensor]
    """Nats of each part of a bound at every position, [B, L] float64 each."""

BOUNDARY = ("diffusion", "reconstruction", "prior")
"""The parts of a bound whose schedule does not start at clean text and end at pure noise."""


class Estimator(Section, ABC):
    """One way to estimate the negative ELBO (or the likelihood) of windows.

    Attributes:
        kind: its name in the registry.
        exact: whether it has no Monte-Carlo error, so that one replicate is enough.
        attributes: whether its nats belong to single tokens.
        continuous: whether it refuses families whose terms are those of T steps.
        absorbing: whether it refuses processes that do more than mask tokens.
        time_free: whether it refuses networks that read the noise level: their predictions do not
            depend on the visible tokens alone, so that they have no bound by orders.
        caveat: what makes its stated error too small; empty if it is right.
    """

    kind: str
    exact: ClassVar[bool] = False
    attributes: ClassVar[bool] = True
    continuous: ClassVar[bool] = False
    absorbing: ClassVar[bool] = False
    time_free: ClassVar[bool] = False
    caveat: ClassVar[str] = ""

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Options without the name: saved replicates are recognised by this text."""
        return list(self.options().items())

    def options(self) -> dict[str, Any]:
        """Return its options with their values."""
        return self.model_dump(exclude={"kind"})

    @property
    def draws(self) -> int:
        """Stratified uniforms that every window gets per replicate."""
        return 1

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the bound that `score` returns."""
        return ("diffusion",)

    def check(self, denoiser: TextDiffusionModel, family: Family, windows: Windows) -> None:
        """Refuse networks, families and texts that it cannot score.

        Raises:
            ConfigError: with the reason and what to use instead.
        """

        if self.continuous and family.timesteps is not None:
            raise ConfigError(
                f"estimator {self.kind} is of continuous time, but the model has "
                f"{family.timesteps} steps; use finite_t",
                code="model_in_steps",
            )
        if self.absorbing and not family.process.masks_evenly:
            process = type(family.process).__name__.lower()
            raise ConfigError(
                f"estimator {self.kind} is of noise that masks tokens and does nothing else, "
                f"unlike {process} noise; use masked_count or time",
                code="not_absorbing",
            )
        if self.time_free and getattr(denoiser.config, "time_conditioning", False):
            raise ConfigError(
                f"estimator {self.kind} needs predictions that depend on the visible tokens alone, "
                "but this network also reads the noise level; use masked_count",
                code="time_conditioning",
            )

    def missing(self, family: Family) -> str:
        """Return what keeps the result from being a bound; empty if it is one."""
        return ""

    def strata(self, windows: Windows, family: Family, seed: int, replicate: int) -> Tensor:
        """Return the uniforms of one replicate, [W, draws, blocks]."""
        return strata(windows, family, seed, replicate, self.draws)

    def learn(self, batch: WindowBatch, scorer: Scorer) -> Tensor | None:
        """Return what it measures of windows before the first replicate, [B, ...], or None.

        Replicates read it from `batch.learned`. Its random numbers are those of replicate -1.
        """
        return None

    def allocate(self, batch: WindowBatch, scorer: Scorer) -> Tensor | None:
        """Return how rows are shared out among noise levels, measured by a pilot, [B, ...].

        Called after `learn`; replicates read it from `batch.allocation`. Its random numbers are
        those of replicate -2.
        """
        return None

    @abstractmethod
    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        """Return the nats of one replicate; their sum over scorable positions is estimated."""
