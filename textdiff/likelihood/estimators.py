"""Monte-Carlo estimators of the negative ELBO.

A replicate is one complete, randomised stratification: every window gets one noise draw, the draws
of a document's windows (and blocks) fall into different strata. Replicates are independent, so the
error comes from their means. Noise depends on (seed, document, replicate, window, position) alone:
not on the batch size, and two models are compared under common random numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.diffusion.family import Family, draw_noise
from textdiff.diffusion.randomness import Index, Stream, uniforms
from textdiff.errors import DataError
from textdiff.likelihood.bound import Bound, student_t_quantile
from textdiff.likelihood.protocols import Windows
from textdiff.likelihood.terms import PositionTerms, corrupt
from textdiff.models import TextDiffusionModel

MIN_REPLICATES = 8
_MAX_REPLICATES = 4096


@dataclass(frozen=True)
class Estimates:
    """Nats of every replicate and document, [R, D] float64, and what they are of."""

    nats: Tensor
    windows: Windows
    family: Family

    def bound(self) -> Bound:
        """The bound over all documents."""
        return self._of(self.nats, self.windows.document_tokens, self.windows.document_bytes)

    def document(self, index: int) -> Bound:
        """The bound of one document.

        Raises:
            DataError: the document has no token.
        """
        part = slice(index, index + 1)
        tokens = self.windows.document_tokens[part]
        if not bool(tokens.any()):
            raise DataError(
                f"document {index + 1} has no token to score, so it has no bound; give a text with "
                "at least one character"
            )
        return self._of(self.nats[:, part], tokens, self.windows.document_bytes[part])

    def _of(self, nats: Tensor, tokens: Tensor, size: Tensor) -> Bound:
        total = int(tokens.sum())
        per_token = nats.sum(1) / total
        boundary = {"reconstruction": 0.0, "prior": 0.0}
        diffusion = float(per_token.mean())
        mean = diffusion + sum(boundary.values())
        documents = len(tokens)
        text_stderr = None
        if documents > 1:  # a ratio of sums: linearised over documents
            residual = nats.mean(0) - diffusion * tokens
            text_stderr = float(
                (residual.square().sum() * documents / (documents - 1)).sqrt() / total
            )
        return Bound(
            mean=mean,
            stderr=float(per_token.std(correction=1) / math.sqrt(len(per_token))),
            text_stderr=text_stderr,
            tokens=total,
            bytes=int(size.sum()),
            documents=documents,
            estimator="masked_count",
            replicates=len(per_token),
            terms={"diffusion": diffusion, **boundary},
            is_bound=True,
        )


def masked_count(
    denoiser: TextDiffusionModel,
    family: Family,
    windows: Windows,
    *,
    seed: int,
    replicates: int = MIN_REPLICATES,
    precision: float | None = None,
    batch_tokens: int = 8192,
    shard: tuple[int, int] = (0, 1),
    reduce: Callable[[Tensor], Tensor] = lambda nats: nats,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Estimates:
    """The unbiased masked-count estimator: k ~ U{1..n} masked tokens, weight n / k, no cut-off.

    Args:
        denoiser: the network, in the mode and dtype it is to be evaluated in.
        family: its process, schedule, objective and block size.
        windows: what to score.
        seed: seed of the noise.
        replicates: independent replicates, at least 8.
        precision: adds replicates until the 95 % interval of the perplexity is within this fraction
            of it on either side.
        batch_tokens: tokens per network call; results do not depend on it beyond rounding.
        shard: (rank, processes): this process scores every `processes`-th window.
        reduce: adds [D] nats over processes.
        progress: told (windows done, windows planned) after each call.
    """
    shares: list[Tensor] = []
    planned = max(replicates, MIN_REPLICATES)
    while len(shares) < planned:
        scored, total = len(shares) * len(windows.tokens), planned * len(windows.tokens)
        shares.append(
            reduce(
                _replicate(
                    denoiser,
                    family,
                    windows,
                    seed,
                    len(shares),
                    batch_tokens,
                    shard,
                    _counting_on(progress, scored, total),
                )
            )
        )
        if precision is not None and len(shares) == planned:
            planned = _replicates_for(torch.stack(shares), windows, precision)
    return Estimates(torch.stack(shares), windows, family)


def _counting_on(
    progress: Callable[[int, int], None], before: int, total: int
) -> Callable[[int], None]:
    """Tells `progress` the windows done in one replicate on top of those `before` it."""
    return lambda done: progress(before + done, total)


def _replicates_for(nats: Tensor, windows: Windows, precision: float) -> int:
    """Replicates that the wanted precision takes, judged from those at hand."""
    per_token = nats.sum(1) / windows.document_tokens.sum()
    have = len(per_token)
    width = student_t_quantile(0.975, have - 1) * float(per_token.std()) / math.sqrt(have)
    if width <= math.log1p(precision):
        return have
    need = math.ceil(have * (width / math.log1p(precision)) ** 2)
    return min(max(need, have + 1), 2 * have, _MAX_REPLICATES) if have < _MAX_REPLICATES else have


@torch.no_grad()
def _replicate(
    denoiser: TextDiffusionModel,
    family: Family,
    windows: Windows,
    seed: int,
    replicate: int,
    batch_tokens: int,
    shard: tuple[int, int],
    progress: Callable[[int], None],
) -> Tensor:
    """One draw for every window: [D] nats."""
    device = denoiser.device
    nats = torch.zeros(len(windows.document_tokens), dtype=torch.float64)
    v = _strata(windows, family, seed, replicate)
    done = 0
    for which in _batches(windows, batch_tokens, shard):
        x0, real = windows.batch(which, family.process.vocabulary.mask_token_id)
        at = torch.tensor(which)
        keys: dict[str, Index] = {
            "row": windows.document[at, None],
            "block": windows.index[at, None],
            "step": replicate,
            "position": torch.arange(x0.shape[1]),
        }
        u = uniforms(seed, Stream.POSITION, **keys)
        blocks = family.blocks(x0.shape[1])
        u_token = None
        if family.process.draws_tokens:
            u_token = uniforms(seed, Stream.TOKEN, **keys)
        noise = draw_noise(
            family.host, "count", v[at][:, : blocks.count], u, blocks, real, u_token=u_token
        )
        ids = None if bool(real.all()) else real.to(torch.int64) - 1
        batch = corrupt(family.host, x0, noise, ids)
        terms = PositionTerms(denoiser, family, batch.to(device)).all().cpu()
        rows = windows.document[at][batch.positions // x0.shape[1]]
        nats.index_add_(0, rows, terms)
        done += len(which)
        progress(done * shard[1])
    return nats


def _strata(windows: Windows, family: Family, seed: int, replicate: int) -> Tensor:
    """[W, blocks] uniforms, stratified over the windows and blocks of each document."""
    lengths = torch.tensor([len(tokens) for tokens in windows.tokens])
    size = family.blocks(int(lengths.max())).size
    block = torch.arange(-(-int(lengths.max()) // size))
    real = block * size < lengths[:, None]
    owner = windows.document[:, None].expand(real.shape)[real]
    entry: dict[str, Index] = {
        "row": owner,
        "block": windows.index[:, None].expand(real.shape)[real],
        "step": replicate,
        "position": block.expand(real.shape)[real],
    }
    by_key = uniforms(seed, Stream.STRATA, **entry).argsort()
    order = by_key[owner[by_key].argsort(stable=True)]  # by document, then by key
    sizes = torch.bincount(owner)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    v = torch.full(real.shape, 0.5, dtype=torch.float64)
    jitter = uniforms(seed, Stream.JITTER, **entry)
    v[real] = (rank - starts[owner] + jitter) / sizes[owner]
    return v


def _batches(windows: Windows, batch_tokens: int, shard: tuple[int, int]) -> list[list[int]]:
    """Windows of like length together, about `batch_tokens` tokens each."""
    lengths = [len(tokens) for tokens in windows.tokens]
    order = sorted(range(len(lengths)), key=lambda w: (-lengths[w], w))[shard[0] :: shard[1]]
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // lengths[order[start]])
        batches.append(order[start : start + size])
        start += size
    return batches
