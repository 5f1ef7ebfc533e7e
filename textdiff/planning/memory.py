"""Memory of a training step on one device: one equation per function, all in bytes.

The largest of four moments is the peak: the loss, the start of the backward pass, its end, and the
update. At the loss all activations of a micro-batch and the head's work space are alive. Weights,
gradients, optimizer state and averages are float32; activations that products read are bfloat16
under autocast, the residual stream is not. Python and its libraries (0.48 GB measured) and a CUDA
context are not counted.
"""

import torch

from textdiff.config.networks import TextDiffNetwork
from textdiff.loss import chunk_positions
from textdiff.models import Layout
from textdiff.models.cpu_block_attention import Chunks
from textdiff.models.cpu_kernels import CHUNK_BYTES
from textdiff.planning.sizes import FLOAT, HALF, RunSizes

# Float32 tensors of a chunk's [n, V] alive at once: 3 for masked cross-entropy, 6 for other
# objectives (counted by tracing their losses).
LOGIT_TENSORS = 6
MAPPED = 32 * 2**20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64 bits
STATISTICS = 2 * FLOAT  # mean and inverse deviation of a norm, per position


def peak_memory(run: RunSizes) -> dict[str, int]:
    """Return bytes on one device: each part, their `peak`, and the growth of a CPU process.

    On a CPU freed memory leaves holes between activations that glibc's allocator cannot use again:
    `resident` adds a third of the activations and the work spaces once more. The fit to 15 measured
    configurations is within 15 % (`evals/estimate_check.py`). With MALLOC_MMAP_THRESHOLD_=1048576
    in the environment nothing is kept, and training is a quarter to a half slower.
    """
    share, exchanged = run.devices if run.sharded else 1, communication(run)
    weights, trained = (FLOAT * n // share for n in (run.counts.total, run.counts.trained))
    parts = {
        "weights": weights,
        "gradients": trained,
        "optimizer": optimizer_state(run) // share,
        "average": trained,
        "communication": max(exchanged.values()),
        "low_precision": casts_of_weights(run),
        "activations": activations(run),
        "backward": backward(run),
        "head": loss(run),
    }
    casts, kept, work, head = (parts[name] for name in list(parts)[-4:])
    always = weights + trained + parts["optimizer"]
    # With accumulation the gradients of earlier micro-batches stay.
    carried = trained if run.accumulation > 1 else 0
    peak = max(
        always + exchanged["loss"] + carried + casts + kept + head,
        # Gradients of the head's parameters, and their copy on the way to the optimizer.
        always
        + exchanged["start"]
        + (carried + casts + kept + work + 2 * FLOAT * run.counts.head_trained),
        always + exchanged["end"] + trained + casts + kept // run.blocks.layers + work,
        always + exchanged["update"] + trained,
    )
    held = from_heap(run, kept) // 3 + work + head if run.chunked else 0
    return {**parts, "peak": peak, "resident": peak + held}


def from_heap(run: RunSizes, kept: int) -> int:
    """Return the bytes of activations that may leave holes in the heap of glibc.

    Larger tensors are mapped by themselves. Their sizes are known in networks of transformers.
    """
    counted = run.blocks.counted
    if counted is None or run.config.model.gradient_checkpointing:
        return kept
    return kept - run.tokens * (counted.total - counted.up_to(MAPPED // run.tokens))


def optimizer_state(run: RunSizes) -> int:
    """Return the bytes of AdamW's two moments per parameter, and of Muon's one."""
    return 2 * FLOAT * run.counts.adamw + FLOAT * run.counts.muon


def casts_of_weights(run: RunSizes) -> int:
    """Return the bytes of bfloat16 copies: autocast casts a matrix per micro-batch and keeps it.

    The matrices of sharded blocks are gathered in bfloat16, and need no cast.
    """
    if not run.half:
        return 0
    return HALF * (run.counts.head + (0 if run.sharded else run.counts.matrices))


def communication(run: RunSizes) -> dict[str, int]:
    """Return the bytes of DDP's gradient buckets, or of what FSDP2 gathers and its gradients.

    They differ between the four moments. With FSDP2 the groups of `textdiff.train.sharding` are:

    | moment | whole |
    |---|---|
    | all but the update | weights of the root, in float32 |
    | loss | the head, and the buffer that it came in, which the next group frees |
    | start of the backward pass | two blocks (this one, the next), a block's gradients |
    | its end | the same, or gradients of embedding and root |

    Gradients have a copy, which is added up over processes in float32.
    """
    if run.devices == 1 or not run.sharded:
        buckets = 0 if run.devices == 1 else FLOAT * run.counts.trained
        return dict.fromkeys(("loss", "start", "end", "update"), buckets)
    counts = run.counts
    embedding, head = counts.tables
    vectors = counts.vectors if run.half else 0  # of all blocks, gathered with the root
    block = counts.block - vectors // run.blocks.layers
    root = counts.root - embedding - head + vectors
    blocks = 2 * run.value * block + (run.value + FLOAT) * min(block, counts.trained)
    outside = 2 * FLOAT * min(embedding + root, counts.trained)
    return {
        "loss": FLOAT * (root + 2 * head),
        "start": FLOAT * 2 * root + blocks,
        "end": FLOAT * root + max(FLOAT * root + blocks, outside),
        "update": 0,
    }


def activations(run: RunSizes) -> int:
    """Return the bytes that the blocks keep: all that the backward pass reads, or their inputs."""
    layers, second = run.blocks.layers, second_input(run)
    if run.config.model.gradient_checkpointing:
        return run.tokens * layers * FLOAT * run.blocks.hidden + second
    block = block_bytes(run)
    # After its attention our last block goes on with scored positions of the noisy stream alone.
    total = run.tokens * layers * sum(block.values())
    if run.blocks.counted is not None:
        return total
    dropped = round(run.tokens * (1 - run.scored / run.streams))
    return total - dropped * (block["residual"] + block["norms"] // 2 + block["mlp"]) + second


def second_input(run: RunSizes) -> int:
    """Return the bytes that self-conditioning keeps if all rows have a first pass.

    They are the input of its norm and those of two products and an activation. The first pass
    itself keeps nothing.
    """
    if not run.config.model.conditions_itself:
        return 0
    positions = round(run.tokens // run.streams * run.noisy_scored)
    return positions * (FLOAT + 3 * run.value) * run.blocks.hidden


def block_bytes(run: RunSizes) -> dict[str, int]:
    """Return the bytes per position that each part of one block keeps.

    RMS norm consists of elementary operations: it keeps its normalised input as well. A CPU in
    float32 keeps the MLP's values before the activation alone (SwiGLU: gate and up; elsewhere also
    the gate's activation and the product). adaLN keeps norm outputs and branches; noise levels by
    block are spread to every position.
    """
    blocks, e = run.blocks, run.value
    if blocks.counted is not None:
        return {"counted": blocks.counted.total // blocks.layers, "kernel": kernel_bytes(run)}
    hidden, network = blocks.hidden, run.config.model
    assert isinstance(network, TextDiffNetwork)
    mask = (2 if run.chunked else 1) if network.dropout else 0
    statistics = FLOAT * hidden + FLOAT if network.norm == "rmsnorm" else STATISTICS
    fused = run.chunked and not run.half
    levels = 6 + 2 if network.time_conditioning and run.streams == 2 else 0
    return {
        "residual": 2 * (FLOAT + mask) * hidden,
        "norms": 2 * e * hidden + 2 * statistics,
        "attention": attention_bytes(run, network.qk_norm),
        "mlp": (1 if fused else 2) * e * blocks.inner,
        "modulation": (2 * FLOAT + (2 + levels) * e) * hidden if network.adaln else 0,
    }


def attention_bytes(run: RunSizes, qk_norm: bool) -> int:
    """Return the bytes per position of our queries, keys, values, mixture and kernel."""
    blocks, e = run.blocks, run.value
    mixed = blocks.heads * blocks.channels
    kept = 4 * e * mixed + kernel_bytes(run)
    if run.config.model.attn_implementation != "eager" and run.streams == 1 and run.chunked:
        kept += 0 if run.half else e * mixed  # another layout of the mixture
    if qk_norm:  # the projection (float32 copies in half precision), and normalised twice
        kept += 2 * 2 * FLOAT * mixed + 2 * FLOAT * blocks.heads
        kept += 0 if run.half else FLOAT * mixed
    return kept


def kernel_bytes(run: RunSizes) -> int:
    """Return the bytes per position that attention keeps besides its inputs and its output."""
    blocks = run.blocks
    if run.config.model.attn_implementation == "eager":  # probabilities of all pairs
        return run.value * blocks.heads * run.config.data.sequence_length * run.streams
    if run.streams == 1 and not (run.half and run.chunked):
        # The flash kernels keep a log-sum-exp; that of half precision makes scores again.
        return FLOAT * blocks.heads
    return block_probabilities(run) if run.streams == 2 and run.chunked else 0


def block_probabilities(run: RunSizes) -> int:
    """Return the bytes of attention in blocks, at the block size that keeps the most."""
    blocks, length = run.blocks, run.config.data.sequence_length
    dtype = torch.bfloat16 if run.half else torch.float32
    layouts = [
        Layout("block_diffusion", size or length) for size in run.config.diffusion.block_sizes
    ]
    kept = max(Chunks.of(layout, length, dtype).kept(2, blocks.channels) for layout in layouts)
    return run.value * blocks.heads * kept // (2 * length)


def backward(run: RunSizes) -> int:
    """Return the bytes of gradients of stream, branch and MLP, and of recomputed activations."""
    blocks = run.blocks
    inner = run.tokens * run.value * blocks.inner
    if blocks.counted is not None:
        inner = run.tokens * 2 * blocks.counted.widest
    elif run.chunked:  # some rows at a time, in float32 of activations and their gradients too
        together = 1 if run.half else 2
        inner = min(inner, 2 * CHUNK_BYTES * torch.get_num_threads()) * together
    per_position = (FLOAT + run.value) * blocks.hidden
    if run.config.model.gradient_checkpointing:
        per_position += sum(block_bytes(run).values())
    return run.tokens * per_position + inner


def loss(run: RunSizes) -> int:
    """Return the bytes of the head at all scored positions, in chunks with immediate gradients.

    They hold the gradients of its parameters, summed and of this chunk (also in bfloat16), its
    inputs with their gradients, and a chunk of logits.
    """
    # At most: the fullest micro-batch may be all masks. Clean positions may have a loss, too.
    clean = run.config.diffusion.objective.ar_weight > 0.0
    positions = run.tokens // run.streams * (2 if clean else 1)
    chunk = min(positions, chunk_positions(run.vocabulary, on_cpu=run.chunked))
    logits = FLOAT * LOGIT_TENSORS * chunk * run.vocabulary
    gradients = (2 * FLOAT + (HALF if run.half else 0)) * run.counts.head_trained
    return gradients + 2 * FLOAT * positions * run.blocks.hidden + logits


def largest_micro_batch(run: RunSizes, memory: float) -> int:
    """Return the most rows per forward pass that fit `memory` bytes; 0 where one does not."""

    def fits(rows: int) -> bool:
        return peak_memory(run.with_rows(rows))["resident"] <= int(memory)

    low, high = 0, 1
    while fits(high) and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
