"""Nats of noisy rows under a network, a bounded number of tokens at a time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.objectives.objective import pick
from textdiff.errors import CheckpointError, overflow_advice
from textdiff.likelihood.estimators.estimator import Estimator, WindowBatch
from textdiff.loss import Batch, PositionTerms, corrupt
from textdiff.models import Denoiser
from textdiff.models.devices import to_device
from textdiff.sampling.request import Preparer

Reading = Callable[[PositionTerms, slice, Prediction], Tensor]
"""Reads [n] float64 nats off the predictions at one chunk of positions."""


def nelbo(terms: PositionTerms, chunk: slice, prediction: Prediction) -> Tensor:
    """Return the objective's share of the negative ELBO, the noise's weight included."""
    return terms.nelbo(chunk, prediction)


def likelihood(terms: PositionTerms, chunk: slice, prediction: Prediction) -> Tensor:
    """Return -log p(x_0), whatever the weight."""
    return -pick(prediction.log_x0, terms.x0[chunk])


def reconstruction(terms: PositionTerms, chunk: slice, prediction: Prediction) -> Tensor:
    """Return -log p(x_0 | x_t) by the process's posterior at the clean end."""
    alpha, xt = terms.noise.alpha[chunk], terms.xt[chunk]
    process, clean = terms.objective.process, torch.ones_like(alpha)
    if process.replaces_tokens and prediction.log_score is not None:
        # A network's score need not be a distribution's, but the bound holds for any decoder: this
        # one takes the ratios at t for those at 0, which keeps every token possible.
        odds = process.likelihood(xt, clean, alpha).log() + prediction.log_score.double()
        odds = odds.masked_fill(~process.vocabulary.clean, -torch.inf)
        return -pick(odds.log_softmax(-1), terms.x0[chunk])
    posterior = process.posterior(prediction.log_x0, xt, clean, alpha, prediction.mixture)
    return -pick(posterior, terms.x0[chunk]).log()


class Scorer:
    """A network with its family.

    A network with self-conditioning is called twice per sample, and reads its first prediction of
    the same noisy tokens. Nothing that is less noisy enters, so that its bound is a bound.

    Args:
        denoiser: the network.
        family: its process, schedule, objective and block size, on the network's device.
        batch_tokens: tokens per network call.
        preparer: makes requests for estimators that write texts; None: those of tokens alone.

    Attributes:
        rows: rows that the network has been run on.
        calls: network calls of single rows that a decoding rule takes to write the texts.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        family: Family,
        batch_tokens: int,
        preparer: Preparer | None = None,
    ):
        self.denoiser = denoiser
        self.family = family
        self.on_cpu = family.on_cpu
        self.batch_tokens = batch_tokens
        self.preparer = preparer
        self.rows = self.calls = 0

    @torch.no_grad()
    def nats(
        self,
        x0: Tensor,
        noise: Noise,
        real: Tensor,
        read: Reading = nelbo,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Return the nats at every position, [B, L] float64; 0 where nothing is contributed.

        Args:
            x0: [B, L] clean tokens.
            noise: the noise of all rows, on the CPU.
            real: [B, L] bool, False at padding.
            read: what is read off the predictions.
            keep: [B, L] bool, the positions of interest; None: all that contribute.
        """
        result = torch.zeros(x0.shape, dtype=torch.float64)
        size = max(1, self.batch_tokens // x0.shape[1])
        for start in range(0, len(x0), size):
            rows = slice(start, start + size)
            at_rows = noise.map(lambda value, rows=rows: value.expand(x0.shape)[rows])  # type: ignore[misc]
            batch = self._batch(x0[rows], at_rows, real[rows], None if keep is None else keep[rows])
            nats = self._read(batch, read)  # [N]
            result[rows] = (
                result[rows].flatten().index_add(0, batch.positions, nats).view_as(x0[rows])
            )
        passes = 1 if self.denoiser.self_conditioning is None else 2
        self.rows += passes * len(x0)
        return result

    def _batch(self, x0: Tensor, noise: Noise, real: Tensor, keep: Tensor | None) -> Batch:
        ids = None if bool(real.all()) else real.to(torch.int64) - 1
        batch = corrupt(self.on_cpu, x0, noise, ids)
        if self.denoiser.self_conditioning is not None:
            batch = batch.self_conditioned()
        if keep is None:
            return batch
        wanted = keep.flatten()[batch.positions]
        return replace(
            batch,
            positions=batch.positions[wanted],
            noise=batch.noise.map(lambda value: value[wanted]),
        )

    def _read(self, batch: Batch, read: Reading) -> Tensor:
        batch = batch.map(lambda x: to_device(x, self.denoiser.device))
        terms = PositionTerms(self.denoiser, self.family, batch)
        nats = [read(terms, chunk, prediction) for chunk, prediction in terms.predictions()]
        return torch.cat(nats).cpu() if nats else torch.zeros(0, dtype=torch.float64)


def refuse_infinite(
    parts: Mapping[str, Tensor], batch: WindowBatch, estimator: Estimator, scorer: Scorer
) -> None:
    """Refuse nats that are not finite, except of texts that a rule never writes.

    Raises:
        CheckpointError: the network's output is at fault.
    """
    for nats in parts.values():
        bad = ~torch.isfinite(nats) & ~((nats == math.inf) & estimator.writes)
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            cost = float(nats[row, column])
            more = ", more than a float holds" if cost == math.inf else ""
            raise CheckpointError(
                f"document {int(batch.document[row]) + 1}, window {int(batch.index[row]) + 1}: the "
                f"network's output costs {cost} nats at token {column + 1}{more}; "
                + overflow_advice(getattr(scorer.denoiser, "dtype", None)),
                code="output_not_finite",
            )
