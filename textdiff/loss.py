"""The loss of corrupted batches, which training minimises and likelihood sums.

`corrupt` made a `Batch`; `PositionTerms` runs the network on it and applies the objective at the
positions that contribute. `DenoisingLoss` is the module that training wraps. The head and the
objective run in chunks of positions whose gradients are taken at once, so that the logits of a
batch never exist together and nothing is computed twice.

Letters: B rows, L positions, N positions that contribute to the loss, H hidden size.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from textdiff.diffusion.corruption import Batch as Batch
from textdiff.diffusion.corruption import CleanBatch as CleanBatch
from textdiff.diffusion.corruption import corrupt as corrupt
from textdiff.diffusion.corruption import log_mask as log_mask
from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives import Objective, Prediction
from textdiff.diffusion.objectives.objective import clean_log_softmax, pick
from textdiff.models import CAUSAL, Denoiser, Reads, hide_starts, shift_right, training_layout
from textdiff.models.chunked_sum import chunked_sum
from textdiff.models.devices import Readback, refuse_fallbacks
from textdiff.models.layers import Previous

# Logits alive at once: 2 ** 22 of them are 16 MiB in float32, which memory allocators reuse.
CHUNK_LOGITS = 2**22
# Elsewhere every operation of a chunk is a launch, and its gradient of the head's weights is read
# and written again: 2 ** 27 logits, 512 MiB, leave few chunks.
DEVICE_CHUNK_LOGITS = 2**27


def chunk_positions(vocabulary: int, on_cpu: bool) -> int:
    """Return how many positions have their logits at once."""
    return max(1, (CHUNK_LOGITS if on_cpu else DEVICE_CHUNK_LOGITS) // vocabulary)


class HeadTerms:
    """Hidden states for the head, which runs on some of them at a time.

    Attributes:
        inputs: of the head: hidden states [N, H] and, with adaln, conditions [N, C].

    Args:
        denoiser: the network.
        inputs: as above.
    """

    def __init__(self, denoiser: Denoiser, inputs: list[Tensor]):
        self.inputs = inputs
        self.head = denoiser.output_layer
        self.on_cpu = inputs[0].device.type == "cpu"
        self.chunk_size = chunk_positions(denoiser.config.vocab_size, self.on_cpu)
        blocks = None if self.on_cpu else denoiser.blocks
        self.compiled = blocks is not None and blocks[-1]._compiled_call_impl is not None

    def chunks(self) -> list[slice]:
        """Return slices of positions whose logits are alive together."""
        size = self.chunk_size
        return [slice(i, i + size) for i in range(0, len(self.inputs[0]), size)]

    def summed_chunks(self) -> list[tuple[slice, int]]:
        """Return the slices, and how many of their first positions an earlier one has had.

        A compiled chunk is made for one shape: the last one begins earlier instead of being short.
        """
        chunks = [(chunk, 0) for chunk in self.chunks()]
        count, size = len(self.inputs[0]), self.chunk_size
        if self.compiled and count > size and count % size:
            chunks[-1] = slice(count - size, count), size - count % size
        return chunks

    def losses(self, chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return [n] training losses and [n] nats of one chunk, from its logits [n, V]."""
        raise NotImplementedError


class PositionTerms(HeadTerms):
    """Hidden states at the positions that contribute, and the objective on top of them.

    Args:
        denoiser: the network; its trunk runs here, its head when called.
        family: process, schedule and objective; the block size is the batch's.
        batch: the corrupted batch.
        training: whether the next-token loss of the clean stream is wanted, too.

    Attributes:
        following: the terms of that loss; None: there is none.
    """

    def __init__(self, denoiser: Denoiser, family: Family, batch: Batch, training: bool = False):
        count = None if batch.count is None else Readback(batch.count)
        tokens, ids, documents = batch.xt, batch.document_ids, batch.documents
        layout = training_layout(batch.block_size, family.causal_context)
        if family.objective.shifted:
            tokens, layout = shift_right(batch.x0, family.objective.first_input, ids), CAUSAL
            if family.objective.has_own_start:
                ids = hide_starts(batch.x0, batch.positions, ids)
                documents = 2 * (len(tokens) if batch.document_ids is None else documents or 0)
        layout = layout.within(ids, documents or None)
        context = batch.x0 if layout.streams == 2 else None
        clean = training and family.objective.ar_weight > 0.0
        reads = Reads.of(batch.positions, batch.x0.shape, layout, family.objective.shift, clean)
        more: Any = {} if reads.clean is None else {"context_positions": reads.clean}
        if batch.first is not None:
            with torch.no_grad():  # a function of the same noisy tokens: a bound stays one
                first = PositionTerms(denoiser, family, batch.first_pass())
                expected = first.expected(denoiser)  # [M, H]
                more["previous"] = Previous(batch.first.at[: len(expected)], expected)
        noisy = reads.noisy if count is None else partial(_counted, reads.noisy, count)
        outputs = denoiser.hidden(tokens, context, batch.sigma, layout, noisy, **more)
        if count is not None:  # it has arrived by now
            batch, reads = batch.counted(int(count.read())), reads.first(int(count.read()))
        states = [x for x in outputs if x is not None]
        super().__init__(denoiser, [reads.ordered(x) for x in states])
        self.following: NextTokenTerms | None = None
        if clean:
            rest = [x[len(reads.noisy) :] for x in states]
            self.following = NextTokenTerms(denoiser, rest, family, batch)
        self.x0 = batch.x0.flatten()[batch.positions]  # [N]
        self.xt = batch.xt.flatten()[batch.positions]  # [N]
        self.noise = batch.noise
        self.objective = family.objective

    def streams(self) -> list[HeadTerms]:
        """Return all terms that the training loss adds: these, and those of the next tokens."""
        return [self] if self.following is None else [self, self.following]

    def predict(self, chunk: slice, *inputs: Tensor) -> Prediction:
        """Predict one chunk of positions.

        Args:
            chunk: the positions.
            *inputs: that chunk of `inputs`, as leaves of a graph where gradients are wanted.
        """
        return self.objective.predict(self.head(*inputs), self.xt[chunk], self.noise.alpha[chunk])

    def nelbo(self, chunk: slice, prediction: Prediction) -> Tensor:
        """Return the negative ELBO terms of one chunk, [n] nats."""
        return self.objective.nelbo_terms(prediction, *self._at(chunk))

    def losses(self, chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return [n] training losses and [n] negative ELBO terms of one chunk."""
        function = _compiled_terms() if self.compiled else objective_terms
        return function(self.objective, logits, *self._at(chunk))

    def _at(self, chunk: slice) -> tuple[Tensor, Tensor, Noise]:
        """Return [n] clean tokens, [n] noisy tokens and the noise of one chunk."""
        return self.x0[chunk], self.xt[chunk], self.noise.map(lambda value: value[chunk])

    def predictions(self) -> Iterator[tuple[slice, Prediction]]:
        """Yield each chunk and its prediction."""
        for chunk in self.chunks():
            yield chunk, self.predict(chunk, *(x[chunk] for x in self.inputs))

    def all(self) -> Tensor:
        """Return [N] nats at every position, without gradients."""
        terms = [self.nelbo(chunk, prediction) for chunk, prediction in self.predictions()]
        return torch.cat(terms) if terms else torch.zeros(0, dtype=torch.float64)

    def expected(self, denoiser: Denoiser) -> Tensor:
        """Return [N, H] expected embeddings of the predicted tokens."""
        expected = [denoiser.expected(p.log_x0) for _, p in self.predictions()]
        return torch.cat(expected) if expected else self.inputs[0][:0]


def _counted(positions: Tensor, count: Readback) -> Tensor:
    """Return the first positions, as many as a device has counted."""
    return positions[: int(count.read())]


def objective_terms(
    objective: Objective, logits: Tensor, x0: Tensor, xt: Tensor, noise: Noise
) -> tuple[Tensor, Tensor]:
    """Return [n] training losses and [n] negative ELBO terms of logits [n, V]."""
    prediction = objective.predict(logits, xt, noise.alpha)
    nelbo = objective.nelbo_terms(prediction, x0, xt, noise)
    return objective.loss_terms(nelbo, prediction, x0, xt, noise), nelbo


@cache
def _compiled_terms() -> Callable[..., tuple[Tensor, Tensor]]:
    refuse_fallbacks()
    return torch.compile(objective_terms)


class NextTokenTerms(HeadTerms):
    """Cross-entropy of each clean token given those before it, at the place before it.

    Without a place before it in its document a token has none. Neither do hidden prompts.

    Args:
        denoiser: the network.
        inputs: of the head, at all B * L places of the clean stream, which is causal.
        family: its objective has the weight.
        batch: the batch.
    """

    def __init__(self, denoiser: Denoiser, inputs: list[Tensor], family: Family, batch: Batch):
        super().__init__(denoiser, inputs)
        self.weight, self.vocabulary = family.objective.ar_weight, family.process.vocabulary
        target = batch.x0.roll(-1, dims=1)  # [B, L]
        scored = self.vocabulary.clean[target]
        scored[:, -1] = False
        if (ids := batch.document_ids) is not None:
            scored = scored & (ids == ids.roll(-1, dims=1)) & (ids >= 0)
        if batch.answers is not None:
            scored = scored & batch.answers.roll(-1, dims=1)
        self.scored = scored.flatten()
        self.target = target.where(scored, self.vocabulary.ids[0]).flatten()

    def losses(self, chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return [n] weighted and [n] unweighted nats of one chunk."""
        log_x0 = clean_log_softmax(logits, self.vocabulary)
        nats = -pick(log_x0, self.target[chunk]) * self.scored[chunk]
        return self.weight * nats, nats


def training_sum(terms: PositionTerms, *learned: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed training loss, next tokens included, and [N] terms; see `_chunked_sum`."""
    loss, nelbo = _chunked_sum(terms, *learned)
    if terms.following is None:
        return loss, nelbo
    return loss + _chunked_sum(terms.following)[0], nelbo


def _chunked_sum(terms: HeadTerms, *learned: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed training loss and [N] detached negative ELBO terms.

    Args:
        terms: the positions and their objective.
        *learned: parameters that the objective itself reads.
    """
    parameters = [p for p in (*terms.head.parameters(), *learned) if p.requires_grad]
    return chunked_sum(terms, parameters)


class HeadSum(nn.Module):
    """`training_sum` as a module around the head, the unit in which sharded weights are gathered.

    The head itself runs once per chunk, with a backward pass each; this module runs once. Hidden
    states are arguments: FSDP reduces a module's gradients when those of its arguments are there.

    Args:
        head: output layer of the network; its parameters keep the network's names.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(
        self, states: list[list[Tensor]], terms: PositionTerms, schedule: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the summed training loss and [N] terms of `training_sum`.

        Args:
            states: inputs of the head, of each of `terms.streams()`.
            terms: the positions and their objective.
            schedule: with parameters that the objective itself reads; None: it has none.
        """
        for stream, inputs in zip(terms.streams(), states, strict=True):
            stream.inputs = inputs
        return training_sum(terms, *(() if schedule is None else schedule.parameters()))

    def of(self, terms: PositionTerms, schedule: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Return the same of terms whose hidden states are their own."""
        states = [stream.inputs for stream in terms.streams()]
        return self(states, terms, schedule)  # type: ignore[no-any-return]


class DenoisingLoss(nn.Module):
    """A denoiser with its family's objective.

    Args:
        denoiser: the network.
        family: process, schedule and objective; the block size is the batch's.
    """

    def __init__(self, denoiser: Denoiser, family: Family):
        super().__init__()
        self.denoiser = denoiser
        self.family = family
        self.head_sum = HeadSum(denoiser.output_layer)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over the micro-batch, in nats and float64.

        Returns:
            The training loss, and the detached negative ELBO sample of the same noise.
        """
        terms = PositionTerms(self.denoiser, self.family, batch, training=True)
        loss, nelbo = self.head_sum.of(terms)
        return loss, nelbo.sum()
