"""What an estimator is: how one replicate scores some windows."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.process import Absorbing
from textdiff.errors import ConfigError
from textdiff.likelihood.estimators.strata import strata
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.windows import Windows
from textdiff.models import TextDiffusionModel

Parts = dict[str, Tensor]
"""Nats of each part of a bound at every position, [B, L] float64 each."""

BOUNDARY = ("diffusion", "reconstruction", "prior")
"""The parts of a bound whose ends of time are not ideal."""


@dataclass(frozen=True)
class Estimator(ABC):
    """One way to estimate the negative ELBO (or the likelihood) of windows.

    Attributes:
        name: its name in the registry.
        exact: whether it has no Monte-Carlo error, so that one replicate is enough.
        attributes: whether its nats belong to single tokens.
        caveat: what makes its stated error too small; empty if it is right.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    attributes: ClassVar[bool] = True
    caveat: ClassVar[str] = ""

    @property
    def draws(self) -> int:
        """Stratified uniforms that every window gets per replicate."""
        return 1

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the bound that `score` returns."""
        return ("diffusion",)

    def check(  # noqa: B027 - most have something to refuse, but need not
        self, denoiser: TextDiffusionModel, family: Family, windows: Windows
    ) -> None:
        """Refuses networks, families and texts that it cannot score.

        Raises:
            ConfigError: with the reason and what to use instead.
        """

    def missing(self, family: Family) -> str:
        """What keeps the result from being a bound; empty if it is one."""
        return ""

    def strata(self, windows: Windows, family: Family, seed: int, replicate: int) -> Tensor:
        """[W, draws, blocks] uniforms of one replicate."""
        return strata(windows, family, seed, replicate, self.draws)

    def learn(self, batch: WindowBatch, scorer: Scorer) -> Tensor | None:
        """What it wants to know about windows before the first replicate, [B, ...]; or nothing.

        Replicates find it in `batch.learned`. Its random numbers are those of replicate -1.
        """
        return None

    def allocate(self, batch: WindowBatch, scorer: Scorer) -> Tensor | None:
        """How it deals its rows out to noise levels, by a pilot of its own, [B, ...]; or not.

        Called after `learn`, whose result is in `batch.learned`; replicates find this one in
        `batch.allocation`. Its random numbers are those of replicate -2.
        """
        return None

    @abstractmethod
    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        """Nats of one replicate; their sum over scorable positions is what is estimated."""


def require_continuous(name: str, family: Family) -> None:
    """Refuses families whose terms are those of T steps.

    Raises:
        ConfigError: the family has steps.
    """
    if family.timesteps is not None:
        raise ConfigError(
            f"estimator {name} is of continuous time, but the model has {family.timesteps} steps; "
            "use finite_t"
        )


def require_absorbing(name: str, family: Family) -> None:
    """Refuses processes other than absorbing noise.

    Raises:
        ConfigError: the process draws tokens.
    """
    if not isinstance(family.process, Absorbing):
        kind = type(family.process).__name__.lower()
        raise ConfigError(
            f"estimator {name} is of noise that masks tokens and does nothing else, unlike {kind} "
            "noise; use masked_count or time"
        )


def require_time_free(name: str, denoiser: TextDiffusionModel, family: Family) -> None:
    """Refuses what has no bound by orders: other noise, and networks that see the noise level.

    Raises:
        ConfigError: with the reason.
    """
    require_absorbing(name, family)
    if getattr(denoiser.config, "time_conditioning", False):
        raise ConfigError(
            f"estimator {name} needs predictions that depend on the visible tokens alone, but this "
            "network also sees the noise level; use masked_count"
        )
