"""Number of replicates, for an interval to be right and as narrow as asked, and their file.

A precision is reached in two stages (Stein, 1945). The spread s of a pilot of P replicates decides
the number R: t s / sqrt(R) must be narrow enough, t being Student's quantile for P - 1 degrees of
freedom. R replicates with noise of their own are the number, and that is its interval. It is never
wider than asked, and it is right: R depends on the pilot alone, so that the mean of the R is
unbiased and does not depend on s.

Going on until the spread of counted replicates is small enough is not. Costs are skewed: few draws
with large weights make mean and spread large together. Replicates that decide how many follow are
stopped where they are low, which biases their mean and narrows their interval.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.errors import CheckpointError, ConfigError
from textdiff.likelihood.bound import student_t_quantile
from textdiff.likelihood.estimators.estimator import Estimator
from textdiff.likelihood.windows import Windows
from textdiff.models import Denoiser
from textdiff.sampling.request import Preparer
from textdiff.storage import whole_file

MIN_REPLICATES = 8
MAX_REPLICATES = 4096

LEAST_DRAWS = 64
"""Draws of noise in all replicates together below which their mean is far from normal."""

PILOT = 2**42
"""Number of the first replicate of a pilot: random numbers that no counted replicate has."""

LEAST_PILOT = 16
"""Replicates of a pilot: not knowing the spread any better takes a fifth more than knowing it."""


@dataclass(frozen=True)
class EstimateOptions:
    """Number of replicates, and the way they are drawn, shared and saved.

    Attributes:
        replicates: independent replicates; at least 8, and as many as draw noise 64 times in all
            (32 for one window of one block under the default). Exact estimators take one.
        precision: as many replicates as bring the 95 % interval of the perplexity within this
            fraction of it on either side; at least `replicates`, at most 4096. A pilot with noise
            of its own decides how many, and the interval is of its spread.
        each_document: whether every document draws noise 64 times, so that its own interval is
            right too.
        attribute: whether to keep the nats of every token.
        first: number of the first replicate; from `PILOT` on they have noise of their own.
        batch_tokens: tokens per network call; results do not depend on it beyond rounding.
        state: a file that every replicate is saved to, and that an interrupted job continues from.
        shard: (rank, processes): this process scores every `processes`-th window.
        reduce: adds nats over processes.
        preparer: makes requests for estimators that write texts; None: those of tokens alone.
        progress: called with (windows done, windows planned) after each network call.
    """

    replicates: int = MIN_REPLICATES
    precision: float | None = None
    each_document: bool = False
    attribute: bool = False
    first: int = 0
    batch_tokens: int = 8192
    state: Path | None = None
    shard: tuple[int, int] = (0, 1)
    reduce: Callable[[Tensor], Tensor] = lambda nats: nats
    preparer: Preparer | None = None
    progress: Callable[[int, int], None] = lambda done, total: None

    def __post_init__(self) -> None:
        if self.precision is not None and not 0.0 < self.precision < math.inf:
            raise ConfigError(
                f"precision {self.precision}: give a share above 0, such as 0.005",
                code="precision_out_of_range",
            )


@dataclass(frozen=True)
class Stopping:
    """Number of replicates that is enough.

    Attributes:
        least: replicates for Student's t to be right about their mean.
        planned: replicates without a precision, and at least with one.
        precision: share of the perplexity that its 95 % interval reaches on either side; None:
            any.
    """

    least: int
    planned: int
    precision: float | None = None

    @classmethod
    def of(
        cls, windows: Windows, family: Family, estimator: Estimator, run: EstimateOptions
    ) -> "Stopping":
        """Return the rule for an estimator's replicates; exact ones take one."""
        if estimator.exact:
            return cls(1, 1)
        least = least_replicates(windows, family, estimator.draws, run.each_document)
        return cls(least, max(run.replicates, least), run.precision)

    @property
    def pilot(self) -> int:
        """Replicates of the pilot; 0: there is none."""
        return 0 if self.precision is None else max(self.planned, LEAST_PILOT)

    def after(self, pilot: Tensor, windows: Windows) -> int:
        """Return how many replicates follow a pilot's nats [P, W]."""
        assert self.precision is not None
        per_token = pilot.sum(1) / windows.document_tokens.sum().clamp(min=1)
        return max(self.planned, replicates_for(self.precision, per_token))


def least_replicates(
    windows: Windows, family: Family, draws: int, each_document: bool = False
) -> int:
    """Return how many replicates it takes for Student's t to be right about their mean.

    Args:
        windows: what is scored.
        family: decides how windows fall into blocks, each of which draws noise of its own.
        draws: noise draws per block and replicate.
        each_document: for it to be right about every document; else about all of them together.
    """
    totals = document_draws(windows, family, draws)
    least = int(totals[totals > 0].min() if each_document else totals.sum())
    return max(MIN_REPLICATES, -(-LEAST_DRAWS // least))


def document_draws(windows: Windows, family: Family, draws: int) -> Tensor:
    """Return the noise draws of every document in a replicate, [D] int64.

    Args:
        windows: what is scored.
        family: decides how windows fall into blocks.
        draws: noise draws per block and replicate.
    """
    size = family.blocks(int(windows.lengths.max())).size
    blocks = torch.tensor([_scored_blocks(windows, w, size) for w in range(len(windows.tokens))])
    totals = torch.zeros(len(windows.document_tokens), dtype=torch.int64)
    return totals.index_add(0, windows.document, blocks) * draws


def _scored_blocks(windows: Windows, window: int, size: int) -> int:
    """Return the blocks of a window that have a token to score."""
    if windows.scored is None:
        return -(-len(windows.tokens[window]) // size)
    return len(np.unique(np.flatnonzero(windows.scored[window]) // size))


def replicates_for(precision: float, pilot: Tensor) -> int:
    """Return the replicates that bring the perplexity's 95 % interval within `precision` of it.

    Args:
        precision: the share of the perplexity on either side.
        pilot: [P] nats per token of the pilot's replicates, whose spread the interval is of.
    """
    width = student_t_quantile(0.975, len(pilot) - 1) * float(pilot.std())
    return math.ceil(min((width / math.log1p(precision)) ** 2, MAX_REPLICATES))


@dataclass
class SavedReplicates:
    """Replicates so far; each that a stream adds is saved before the next is drawn.

    Attributes:
        path: where they are saved; None: nowhere.
        fingerprint: what they are of.
        split: returns the [parts, W] nats and [T or 0] nats per token of a replicate.
        writes: whether this process is the one that saves.
        shares: [parts, W] nats of every window in each replicate.
        tokens: [T] nats of every token, summed over replicates; empty unless they are kept.
        pilot: [W] nats of every window in each replicate of a precision's pilot.
    """

    path: Path | None
    fingerprint: dict[str, str]
    split: Callable[[Tensor], tuple[Tensor, Tensor]]
    writes: bool = True
    shares: list[Tensor] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    pilot: list[Tensor] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        path: Path | None,
        fingerprint: dict[str, str],
        split: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> "SavedReplicates":
        """Load what is saved at `path`, if there is anything.

        Raises:
            CheckpointError: the file is of another job, or holds no replicates.
        """
        state = cls(path, fingerprint, split)
        if path is None or not path.exists():
            return state
        try:
            with safe_open(path, "pt") as file:
                known = file.metadata() or {}
                state.shares = list(file.get_tensor("shares").unbind(0))
                state.tokens = file.get_tensor("tokens")
                state.pilot = list(file.get_tensor("pilot").unbind(0))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a saved estimate ({error}); delete it", code="not_a_saved_estimate"
            ) from None
        for key, value in fingerprint.items():
            if known.get(key) != value:
                raise CheckpointError(
                    f"{path} was saved with another {key}; delete it or name another file",
                    code=f"saved_with_another_{key.replace(' ', '_')}",
                )
        return state

    def take(self, stream: Iterator[Tensor], count: int) -> Tensor:
        """Return at least `count` replicates [R, parts, W]; the missing ones come from a stream."""
        for replicate in islice(stream, max(0, count - len(self.shares))):
            nats, tokens = self.split(replicate)
            self.tokens = self.tokens + tokens if self.shares else tokens
            self.shares.append(nats)
            self._save()
        return torch.stack(self.shares)

    def take_pilot(self, stream: Iterator[Tensor], count: int) -> Tensor:
        """Return `count` replicates of a pilot [P, W]; the missing ones come from a stream."""
        for replicate in islice(stream, max(0, count - len(self.pilot))):
            nats, _ = self.split(replicate)
            self.pilot.append(nats.sum(0))
            self._save()
        return torch.stack(self.pilot[:count]) if count else torch.zeros(0, 0)

    def _save(self) -> None:
        """Write all of them to the file, whole or not at all."""
        if self.path is None or not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "shares": _stacked(self.shares),
            "tokens": self.tokens,
            "pilot": _stacked(self.pilot),
        }
        with whole_file(self.path) as file:
            save_file(tensors, file, metadata=self.fingerprint)


def _stacked(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0)


def model_digest(denoiser: Denoiser, family: Family) -> str:
    """Return a hash of a network's weights and of the family it is evaluated in."""
    digest = hashlib.sha256()
    for name, value in sorted(denoiser.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    kind, said = type(family.objective), family.objective.to_export()
    del said["kind"]
    process = type(family.process).__name__
    digest.update(f"{process} {kind.__name__} {said}".encode())
    digest.update(f"{family.block_size} {family.timesteps}".encode())
    if family.time_input != "sigma":
        digest.update(family.time_input.encode())
    if family.learned is not None:
        for name, value in sorted(family.learned.state_dict().items()):
            digest.update(f"{name} {value.tolist()}".encode())
    # A schedule is what it computes, whether its numbers are settings or learned.
    grid = family.schedule.alpha(torch.linspace(0.0, 1.0, 33, dtype=torch.float64))
    digest.update(grid.detach().numpy().tobytes())
    return digest.hexdigest()
