"""Base of the estimators, the windows that a replicate scores, and noise for chosen positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from textdiff.diffusion.noise import NEVER as NEVER
from textdiff.diffusion.noise import Noise, NoiseUniforms
from textdiff.errors import ConfigError
from textdiff.section import Section, torch

if TYPE_CHECKING:
    from torch import Tensor

    from textdiff.diffusion.family import Blocks, Family
    from textdiff.diffusion.randomness import Index, Stream
    from textdiff.likelihood.scorer import Scorer
    from textdiff.likelihood.windows import Windows
    from textdiff.models import Denoiser

    Parts = dict[str, Tensor]
    """Nats of each part of a bound at every position, [B, L] float64 each."""


@dataclass(frozen=True)
class WindowBatch:
    """B windows of L positions, the shorter ones padded.

    Attributes:
        family: the family, with its tables on the CPU.
        seed: seed of the noise.
        replicate: index of the replicate.
        window: [B] int64, index of each window in the job.
        document: [B] int64, the document each is of.
        index: [B] int64, its place in that document.
        noise_key: [B] int64, the key of its noise.
        origin: [B] int64, the place that positions of noise count from.
        x0: [B, L] int64 clean tokens.
        real: [B, L] bool, False at padding.
        scorable: [B, L] bool, True where the token's nats are wanted; elsewhere it is context.
        v: [B, S, blocks] float64 stratified uniforms.
        learned: what the estimator has learned about these windows, [B, ...].
        allocation: how it shares its rows out among noise levels, [B, ...].
    """

    family: Family
    seed: int
    replicate: int
    window: Tensor
    document: Tensor
    index: Tensor
    noise_key: Tensor
    origin: Tensor
    x0: Tensor
    real: Tensor
    scorable: Tensor
    v: Tensor
    learned: Tensor | None = None
    allocation: Tensor | None = None

    @cached_property
    def blocks(self) -> Blocks:
        """Blocks of the L positions."""
        return self.family.blocks(self.x0.shape[1])

    @cached_property
    def sizes(self) -> Tensor:
        """[B, blocks] int64, scorable tokens of each block."""
        return self.blocks.split(self.scorable, False).sum(-1)

    def zeros(self) -> Tensor:
        """Return no nats at any position, [B, L] float64."""
        return torch.zeros(self.x0.shape, dtype=torch.float64)

    def uniforms(self, stream: Stream, draw: int = 0, draws: int = 1) -> Tensor:
        """Return the uniforms of draw number `draw` out of `draws` per replicate, [B, L]."""
        from textdiff.diffusion.randomness import uniforms

        keys: dict[str, Index] = {
            "row": self.noise_key[:, None],
            "block": self.index[:, None],
            "step": self.replicate * draws + draw,
            "position": self._places,
        }
        return uniforms(self.seed, stream, **keys)

    @cached_property
    def _places(self) -> Tensor:
        """Positions as noise counts them, [L], or [B, L] where windows count from places apart."""
        places = torch.arange(self.x0.shape[1])
        return places - self.origin[:, None] if bool(self.origin.any()) else places

    def orders(self, draw: int, draws: int) -> Tensor:
        """Return uniforms that put the positions in a random order, [B, L]; see `uniforms`."""
        from textdiff.diffusion.randomness import Stream

        return self.uniforms(Stream.POSITION, draw, draws)

    def noise_uniforms(self, levels: Tensor, draw: int = 0, draws: int = 1) -> NoiseUniforms:
        """Return the uniforms of a draw's noise at given levels [B, blocks]."""
        from textdiff.diffusion.randomness import Stream

        replaces_tokens = self.family.process.replaces_tokens
        token = self.uniforms(Stream.TOKEN, draw, draws) if replaces_tokens else None
        return NoiseUniforms(levels, self.orders(draw, draws), token)

    def ranks(self, u: Tensor) -> Tensor:
        """Return the rank of each position's uniform [B, L] in its block, [B, L] int64.

        Positions that are not scorable come after all that are.
        """
        split = self.blocks.split(u.masked_fill(~self.scorable, NEVER), NEVER)
        return self.blocks.join(split.argsort(stable=True, dim=-1).argsort(-1))


def strata(
    windows: Windows,
    family: Family,
    seed: int,
    replicate: int,
    draws: int = 1,
    by_document: bool = True,
) -> Tensor:
    """Return [W, draws, blocks] uniforms, stratified over a document's windows and blocks.

    The S draws of a window are in different parts [s / S, (s + 1) / S) of the unit interval. Within
    each part the windows and blocks of a document are dealt out to strata at random. The
    mean over draws is that of one uniform. Unless `by_document`, strata are those of all documents
    together, and numbers depend on the other documents.
    """
    from textdiff.diffusion.randomness import Stream, uniforms

    lengths = windows.sizes  # [W]
    size = family.blocks(int(lengths.max())).size
    block = torch.arange(-(-int(lengths.max()) // size))
    draw = torch.arange(draws)[:, None]
    real = (block * size < lengths[:, None, None]).expand(-1, draws, -1)  # [W, S, blocks]

    def entries(x: Tensor) -> Tensor:
        return x.expand(real.shape)[real]

    document = windows.document[:, None, None]
    entry: dict[str, Index] = {
        "row": entries(windows.noise_keys[:, None, None]),
        "block": entries(windows.index[:, None, None]),
        "step": entries(replicate * draws + draw),
        "position": entries(block - (windows.origins // size)[:, None, None]),
    }
    group = entries((document if by_document else 0 * document) * draws + draw)
    keys, jitter = (uniforms(seed, s, **entry) for s in (Stream.STRATA, Stream.JITTER))
    v = ((draw + 0.5) / draws).to(torch.float64).expand(real.shape).clone()
    v[real] = (entries(draw) + _dealt(group, keys, jitter)) / draws
    return v


def _dealt(group: Tensor, keys: Tensor, jitter: Tensor) -> Tensor:
    """Return a uniform for each of N entries, one per stratum of its group, [N].

    Args:
        group: [N] int64.
        keys: [N], which order the entries of a group.
        jitter: [N] uniforms within strata.
    """
    by_key = keys.argsort()
    order = by_key[group[by_key].argsort(stable=True)]  # by group, then by key
    counts = torch.bincount(group)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return (rank - starts[group] + jitter) / counts[group]


def mask_lowest(
    rank: Tensor, count: Tensor, weight: Tensor, blocks: Blocks, scorable: Tensor, u: Tensor
) -> Noise:
    """Return noise that masks the `count` scorable positions of lowest rank in each block.

    The mask rate that a network reads is the count-th smallest of the block's uniforms: Beta(k, n -
    k + 1), whichever positions the ranks put first.

    Args:
        rank: [B, L] ranks, a permutation of 0..n-1 on the n scorable positions of a block.
        count: [B, blocks] int64 positions to mask, at most n each; 0 masks none.
        weight: [B, blocks] float64 weight of a masked position.
        blocks: how L falls into blocks.
        scorable: [B, L] bool.
        u: [B, L] uniforms, of which only the values are used, not the order.
    """
    ordered = blocks.split(u.masked_fill(~scorable, NEVER), NEVER).sort(-1).values
    level = ordered.gather(-1, (count - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    level = level.masked_fill(count == 0, 0.0)
    # Half-way between whole ranks, scaled into (0, 1): nothing is decided by rounding.
    scale = blocks.size + 1.0
    place = ((rank + 0.5) / scale).masked_fill(~scorable, NEVER)
    threshold = blocks.spread(count.to(torch.float64) / scale)
    return Noise(blocks.spread(1.0 - level), threshold, place, blocks.spread(weight))


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
        writes: whether it scores what a decoding rule writes: a text may have probability 0.
        caveat: what makes its stated error too small; empty if it is right.
    """

    kind: str
    exact: ClassVar[bool] = False
    attributes: ClassVar[bool] = True
    continuous: ClassVar[bool] = False
    absorbing: ClassVar[bool] = False
    time_free: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    caveat: ClassVar[str] = ""

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Return the options without the name: saved replicates are recognised by this text."""
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

    def check(self, denoiser: Denoiser, family: Family, windows: Windows) -> None:
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
        if self.time_free and denoiser.time_conditioning:
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

        Called after `learn`; replicates read `batch.allocation`. Its random numbers: replicate -2.
        """
        return None

    @abstractmethod
    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        """Return the nats of one replicate; their sum over scorable positions is estimated."""
