"""The loss of corrupted batches, which training minimises and likelihood sums.

`corrupt` made a `Batch`; `PositionTerms` runs the network on it and applies the objective at the
positions that contribute. `DenoisingLoss` is the module that training wraps; `LearnedScheduleLoss`
replaces it where the noise schedule has parameters too. The head and the objective run in chunks
of positions whose gradients are taken at once, so that the logits of a batch never exist together
and nothing is computed twice.

Letters: B rows, L positions, N positions that contribute to the loss, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from textdiff.diffusion.corruption import Batch as Batch
from textdiff.diffusion.corruption import CleanBatch as CleanBatch
from textdiff.diffusion.corruption import corrupt as corrupt
from textdiff.diffusion.corruption import log_mask as log_mask
from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import ByTime, Noise, draw_noise
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.objectives.objective import clean_log_softmax, pick
from textdiff.models import CAUSAL, Denoiser, Reads, hide_starts, shift_right, training_layout

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
        on_cpu = inputs[0].device.type == "cpu"
        self.chunk_size = chunk_positions(denoiser.config.vocab_size, on_cpu)

    def chunks(self) -> list[slice]:
        """Return slices of positions whose logits are alive together."""
        size = self.chunk_size
        return [slice(i, i + size) for i in range(0, len(self.inputs[0]), size)]

    def losses(self, chunk: slice, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return [n] training losses and [n] nats of one chunk.

        Args:
            chunk: the positions.
            *inputs: that chunk of `inputs`, as leaves of a graph where gradients are wanted.
        """
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
        tokens, ids = batch.xt, batch.document_ids
        layout = training_layout(batch.block_size, family.causal_context)
        if family.objective.shifted:
            tokens, layout = shift_right(batch.x0, family.objective.first_input, ids), CAUSAL
            if family.objective.has_own_start:
                ids = hide_starts(batch.x0, batch.positions, ids)
        layout = layout.within(ids)
        context = batch.x0 if layout.streams == 2 else None
        clean = training and family.objective.ar_weight > 0.0
        reads = Reads.of(batch.positions, batch.x0.shape, layout, family.objective.shift, clean)
        more: Any = {} if reads.clean is None else {"context_positions": reads.clean}
        outputs = denoiser.hidden(tokens, context, batch.sigma, layout, reads.noisy, **more)
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

    def losses(self, chunk: slice, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return [n] training losses and [n] negative ELBO terms of one chunk."""
        prediction = self.predict(chunk, *inputs)
        nelbo = self.nelbo(chunk, prediction)
        return self.objective.loss_terms(nelbo, prediction, *self._at(chunk)), nelbo

    def _at(self, chunk: slice) -> tuple[Tensor, Tensor, Noise]:
        """Return [n] clean tokens, [n] noisy tokens and the noise of one chunk."""
        return self.x0[chunk], self.xt[chunk], self.noise.map(lambda value: value[chunk])

    def all(self) -> Tensor:
        """Return [N] nats at every position, without gradients."""
        terms = [
            self.nelbo(chunk, self.predict(chunk, *(x[chunk] for x in self.inputs)))
            for chunk in self.chunks()
        ]
        return torch.cat(terms) if terms else torch.zeros(0, dtype=torch.float64)


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

    def losses(self, chunk: slice, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return [n] weighted and [n] unweighted nats of one chunk."""
        log_x0 = clean_log_softmax(self.head(*inputs), self.vocabulary)
        nats = -pick(log_x0, self.target[chunk]) * self.scored[chunk]
        return self.weight * nats, nats


class _ChunkedSum(torch.autograd.Function):
    """Sums the training loss over chunks of positions, taking each chunk's gradient at once.

    Its inputs are those of the head, then the parameters of head and schedule. It returns the
    training loss, summed, and [N] terms of the negative ELBO without gradient.
    """

    @staticmethod
    def forward(ctx: Any, terms: HeadTerms, count: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        inputs, parameters = tensors[:count], tensors[count:]
        total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
        nelbos = total.new_zeros(len(inputs[0]))
        input_grads = [torch.empty_like(x) for x in inputs]
        parameter_grads = [torch.zeros_like(p) for p in parameters]
        for chunk in terms.chunks():
            with torch.enable_grad():
                leaves = [x[chunk].detach().requires_grad_() for x in inputs]
                losses, nelbo = terms.losses(chunk, *leaves)
                loss = losses.sum()
                grads = torch.autograd.grad(loss, [*leaves, *parameters])
            total += loss.detach()
            nelbos[chunk] = nelbo.detach()
            for whole, grad in zip(input_grads, grads, strict=False):
                whole[chunk] = grad
            if parameters:  # none where adapters are trained, and the head is frozen
                torch._foreach_add_(parameter_grads, list(grads[count:]))
            del grads, losses, nelbo, loss  # before the next chunk allocates its own
        ctx.save_for_backward(*input_grads, *parameter_grads)
        ctx.mark_non_differentiable(nelbos)
        return total, nelbos

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad.mul_(grad_loss) for grad in ctx.saved_tensors)


def _training_sum(terms: PositionTerms, *learned: Tensor) -> tuple[Tensor, Tensor]:
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
    inputs = terms.inputs
    return _ChunkedSum.apply(terms, len(inputs), *inputs, *parameters)  # type: ignore[no-any-return,no-untyped-call]


def training_loss(denoiser: Denoiser, family: Family) -> nn.Module:
    """Return the module that a family trains with."""
    return (LearnedScheduleLoss if family.learned else DenoisingLoss)(denoiser, family)


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

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over the micro-batch, in nats and float64.

        Returns:
            The training loss, and the detached negative ELBO sample of the same noise.
        """
        terms = PositionTerms(self.denoiser, self.family, batch, training=True)
        loss, nelbo = _training_sum(terms)
        return loss, nelbo.sum()


class LearnedScheduleLoss(nn.Module):
    """A denoiser and the schedule it is trained with, by two masks z_1, z_2 of every example.

    Let f be the loss of a mask in nats and q its probability at time t, which both depend on the
    schedule's w. The gradient of E_q[f] is E_q[f' + f (ln q)']. The second term is estimated by
    (f_1 - f_2) ((ln q_1)' - (ln q_2)') / 2. Each mask's loss is the other's baseline (leave-one-out
    REINFORCE, App. I.2, arXiv:2406.04329). It is taken per block, because the loss of a block
    depends on its own mask alone. Nothing is differentiated through the masks.

    Args:
        denoiser: the network.
        family: its schedule is `learned`.
    """

    def __init__(self, denoiser: Denoiser, family: Family):
        super().__init__()
        assert family.learned is not None
        self.denoiser = denoiser
        self.family = family
        self.schedule = family.learned

    def forward(self, batch: CleanBatch) -> tuple[Tensor, Tensor]:
        """Sum over the micro-batch, in nats and float64, means over the two masks.

        Returns:
            The training loss, whose gradient is the estimate and whose value is the bound's, and
            the detached sample of the negative ELBO.
        """
        family = self.family.with_block_size(batch.block_size)
        blocks = family.blocks(batch.x0.shape[1])
        with torch.no_grad():
            x0 = batch.x0.repeat(2, 1)
            noise = draw_noise(family, x0, batch.uniforms, ByTime())
            ids = batch.document_ids
            masked = corrupt(family, x0, noise, None if ids is None else ids.repeat(2, 1))
        terms = PositionTerms(self.denoiser, family, masked, training=True)
        loss, nelbo = _training_sum(terms, *self.schedule.parameters())
        nats = nelbo.new_zeros(x0.numel()).index_add(0, masked.positions, nelbo).view(x0.shape)
        f_1, f_2 = blocks.split(nats, 0.0).sum(-1).chunk(2)  # [B, blocks] each
        log_q = blocks.split(log_mask(noise, self.schedule()[x0]), 0.0).sum(-1)
        log_q = log_q - log_q.detach()  # 0, with a gradient
        q_1, q_2 = log_q.chunk(2)
        score = ((f_1 - f_2) * (q_1 - q_2)).sum() / 2
        return loss / 2 + score, nelbo.sum() / 2
