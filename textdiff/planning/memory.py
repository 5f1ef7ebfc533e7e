"""Memory of a training step on one device: one equation per function, all in bytes.

The largest of four moments is the peak: the loss, where all activations of a micro-batch and the
head's work space are alive; the start and the end of the backward pass; the update. Weights,
gradients, optimizer state and averages are float32; activations that products read are bfloat16
under autocast (e bytes per value), the residual stream is not.

Letters: T tokens of a micro-batch, both streams and draws counted; H hidden size, V vocabulary.
What a process holds besides (Python and its libraries, measured 0.48 GB; a CUDA context) is not
counted.
"""

from dataclasses import dataclass, replace

import torch

from textdiff.loss import CHUNK_LOGITS
from textdiff.models import Layout
from textdiff.models.block_attention import Chunks
from textdiff.models.fused import CHUNK_BYTES
from textdiff.planning.network import Plan

FLOAT = 4
HALF = 2
ADAMW_STATE = 2 * FLOAT  # two moments per parameter
MUON_STATE = FLOAT  # one momentum
# Float32 tensors of a chunk's [n, V] alive at once: 3 for masked cross-entropy, 6 for other
# objectives (counted by tracing their losses).
LOGIT_TENSORS = 6
STATISTICS = 2 * FLOAT  # mean and inverse deviation of a norm, per position


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: float32 parameters.
        gradients: of all of them, at the update.
        optimizer: its state.
        average: the averaged weights.
        communication: gradient buckets of DDP, or the whole weights that FSDP2 gathers.
        low_precision: bfloat16 copies of the weights that autocast keeps during a micro-batch.
        activations: what the blocks keep for the backward pass.
        backward: work space of one block's backward pass, recomputed activations included.
        head: work space of head and loss: gradients of the head, a chunk of logits.
        peak: the largest moment: what is alive then.
        resident: what the process grows by; on a CPU more than that, see `kept_by_allocator`.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    communication: int
    low_precision: int
    activations: int
    backward: int
    head: int
    peak: int
    resident: int


def peak_memory(plan: Plan) -> Memory:
    """All parts, and the peak that they add up to."""
    share = plan.devices if plan.sharded else 1
    weights = FLOAT * plan.counts.total // share
    gradients, average = weights, weights
    optimizer = optimizer_state(plan) // share
    shared = communication(plan)
    casts, kept, work, head = low_precision(plan), activations(plan), backward(plan), loss(plan)
    always = weights + average + optimizer + shared
    # With accumulation the gradients of earlier micro-batches stay.
    carried = gradients if plan.accumulation > 1 else 0
    moments = (
        always + carried + casts + kept + head,
        always + carried + casts + kept + work + head_gradients(plan),
        always + gradients + casts + kept // layers(plan) + work,
        always + gradients,
    )
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        average=average,
        communication=shared,
        low_precision=casts,
        activations=kept,
        backward=work,
        head=head,
        peak=max(moments),
        resident=max(moments) + (kept_by_allocator(kept, work, head) if plan.chunked else 0),
    )


def kept_by_allocator(activations: int, backward: int, head: int) -> int:
    """Freed memory that glibc's allocator cannot use again: empirical, on a CPU.

    What comes and goes leaves holes between activations. The fit to 15 measured configurations is
    within 15 % (`evals/estimate_check.py`); with MALLOC_MMAP_THRESHOLD_=1048576 in the environment
    nothing is kept and training is a quarter to a half slower.
    """
    return activations // 3 + backward + head


def layers(plan: Plan) -> int:
    """Transformer blocks."""
    return plan.config.model.num_layers


def tokens(plan: Plan) -> int:
    """T: positions that the blocks see in a micro-batch."""
    rows = plan.config.train.micro_batch_size
    return rows * plan.config.data.sequence_length * plan.streams * plan.draws


def optimizer_state(plan: Plan) -> int:
    """AdamW keeps two moments per parameter, Muon one."""
    return ADAMW_STATE * plan.counts.adamw + MUON_STATE * plan.counts.muon


def communication(plan: Plan) -> int:
    """DDP: the gradients once more, in buckets. FSDP2: what is gathered, and its gradients.

    Gathered are the parameters outside the blocks and two blocks (this one, the next), float32.
    """
    if plan.devices == 1:
        return 0
    if not plan.sharded:
        return FLOAT * plan.counts.total
    gathered = plan.counts.root + 2 * plan.counts.block
    return FLOAT * (gathered + plan.counts.root + plan.counts.block)


def low_precision(plan: Plan) -> int:
    """Autocast casts every matrix once per micro-batch and keeps the copy."""
    return HALF * (plan.counts.matrices + plan.counts.head) if plan.half else 0


def activations(plan: Plan) -> int:
    """What the blocks keep: everything the backward pass reads, or their inputs alone."""
    if plan.config.model.gradient_checkpointing:
        return tokens(plan) * layers(plan) * FLOAT * plan.config.model.hidden_size
    every = tokens(plan) * layers(plan) * block_activations(plan)
    # After its attention the last block goes on with scored positions of the noisy stream alone.
    dropped = round(tokens(plan) * (1 - plan.scored / plan.streams))
    return every - dropped * (residual_bytes(plan) + norm_bytes(plan) // 2 + mlp_bytes(plan))


def block_activations(plan: Plan) -> int:
    """Bytes per position of one block, its parts added up."""
    return (
        residual_bytes(plan)
        + norm_bytes(plan)
        + attention_bytes(plan)
        + mlp_bytes(plan)
        + modulation_bytes(plan)
    )


def value(plan: Plan) -> int:
    """e: bytes of a value that a product reads."""
    return HALF if plan.half else FLOAT


def residual_bytes(plan: Plan) -> int:
    """The stream before both norms, and the dropout masks of both branches."""
    hidden = plan.config.model.hidden_size
    mask = (2 if plan.chunked else 1) if plan.config.model.dropout else 0
    return 2 * FLOAT * hidden + 2 * mask * hidden


def norm_bytes(plan: Plan) -> int:
    """Both norms: their outputs as the products read them, and their statistics.

    RMS norm is made of elementary operations: it keeps its normalised input as well.
    """
    hidden = plan.config.model.hidden_size
    output = value(plan) * hidden
    if plan.config.model.norm == "layernorm":
        return 2 * (output + STATISTICS)
    return 2 * (output + FLOAT * hidden + FLOAT)


def attention_bytes(plan: Plan) -> int:
    """Queries, keys, values and the mixture; what the kernel keeps; normalised queries and keys."""
    model, e = plan.config.model, value(plan)
    kept = 4 * e * model.hidden_size
    if model.attn_implementation == "eager":  # probabilities of all pairs
        length = plan.config.data.sequence_length * plan.streams
        kept += e * model.num_heads * length
    elif plan.streams == 1 and not (plan.half and plan.chunked):
        # The flash kernels keep a log-sum-exp; that of half precision makes scores again.
        kept += FLOAT * model.num_heads
        kept += e * model.hidden_size if plan.chunked else 0  # and another layout of the mixture
    elif plan.streams == 2 and plan.chunked:
        kept += block_probabilities(plan)
    if model.qk_norm:  # the projection (float32 copies in half precision), and normalised twice
        kept += 2 * 2 * FLOAT * model.hidden_size + 2 * FLOAT * model.num_heads
        kept += 0 if plan.half else FLOAT * model.hidden_size
    return kept


def block_probabilities(plan: Plan) -> int:
    """Those that attention in blocks keeps: the most over the block sizes that are trained."""
    model, length = plan.config.model, plan.config.data.sequence_length
    dtype = torch.bfloat16 if plan.half else torch.float32
    sizes = [size or length for size in plan.config.diffusion.block_sizes]
    layouts = [Layout("block_diffusion", size) for size in sizes]
    channels = model.hidden_size // model.num_heads
    kept = max(Chunks.of(layout, length, dtype).kept(2, channels) for layout in layouts)
    return value(plan) * model.num_heads * kept // (2 * length)


def inner_size(plan: Plan) -> int:
    """Channels between the MLP's two products."""
    hidden = plan.config.model.hidden_size
    return 4 * hidden if plan.config.model.mlp == "gelu" else 64 * -(-8 * hidden // 192)


def mlp_bytes(plan: Plan) -> int:
    """Before and after the activation; SwiGLU: gate and up, the gate's activation, the product.

    A CPU in float32 keeps what is before the activation alone.
    """
    before, after = (1, 1) if plan.config.model.mlp == "gelu" else (2, 2)
    tensors = before + (after if plan.half or not plan.chunked else 0)
    return tensors * value(plan) * inner_size(plan)


def modulation_bytes(plan: Plan) -> int:
    """adaLN keeps norm outputs and branches; levels by block are spread to every position."""
    model, e = plan.config.model, value(plan)
    if not model.adaln:
        return 0
    kept = 2 * FLOAT * model.hidden_size + 2 * e * model.hidden_size
    if model.time_conditioning and plan.streams == 2:
        kept += (6 + 2) * e * model.hidden_size
    return kept


def backward(plan: Plan) -> int:
    """Gradients of stream, branch and the MLP's inner values; recomputed activations."""
    width = inner_size(plan) * (1 if plan.config.model.mlp == "gelu" else 2)
    hidden = plan.config.model.hidden_size
    inner = tokens(plan) * value(plan) * width
    if plan.chunked:  # some rows at a time, in float32 of activations and their gradients too
        together = 1 if plan.half else 2
        inner = min(inner, 2 * CHUNK_BYTES * torch.get_num_threads()) * together
    per_position = (FLOAT + value(plan)) * hidden
    if plan.config.model.gradient_checkpointing:
        per_position += block_activations(plan)
    return tokens(plan) * per_position + inner


def head_gradients(plan: Plan) -> int:
    """Gradients of the head's parameters, and their copy on the way to the optimizer."""
    return 2 * FLOAT * plan.counts.head


def loss(plan: Plan) -> int:
    """The head at all scored positions, in chunks whose gradients are taken at once.

    Its parameters' gradients, added up and of this chunk (also in bfloat16); its inputs and their
    gradients; a chunk of logits.
    """
    positions = tokens(plan) // plan.streams  # at most: the fullest micro-batch may be all masks
    chunk = min(positions, max(1, CHUNK_LOGITS // plan.vocabulary))
    logits = FLOAT * LOGIT_TENSORS * chunk * plan.vocabulary
    gradients = (2 * FLOAT + (HALF if plan.half else 0)) * plan.counts.head
    return gradients + 2 * FLOAT * positions * plan.config.model.hidden_size + logits


def largest_micro_batch(plan: Plan, memory: int) -> int:
    """The most rows per forward pass whose peak fits `memory` bytes; 0 where one does not."""

    def fits(rows: int) -> bool:
        return peak_memory(with_rows(plan, rows)).resident <= memory

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_rows(plan: Plan, rows: int) -> Plan:
    """The same run with another micro-batch, and as many of them as it then takes."""
    train = plan.config.train.model_copy(update={"micro_batch_size": rows})
    return replace(plan, config=plan.config.model_copy(update={"train": train}))
