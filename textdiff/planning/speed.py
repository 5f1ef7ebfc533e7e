"""Arithmetic of a training step, and the time it takes at a given speed."""

from textdiff.planning.network import Plan


def visible_pairs(plan: Plan) -> float:
    """Keys that a position of the data attends to, summed over its streams.

    One stream: L. Block diffusion with N blocks of b: (L b + b^2 N (N - 1) / 2 +
    b^2 N (N + 1) / 2) / L, the allowed pairs alone (Sec. 3.1, arXiv:2503.09573).
    """
    length = plan.config.data.sequence_length
    if plan.streams == 1:
        return length
    sizes = [size or length for size in plan.config.diffusion.block_sizes]
    return sum(size + length for size in sizes) / len(sizes)


def training_flops(plan: Plan) -> float:
    """Per data token: forward, twice that backward, and the blocks again where recomputed.

    A product of a position with a matrix of p parameters takes 2 p, attention 4 H per pair and
    layer, the head 2 H V at scored positions.
    """
    model = plan.config.model
    pairs = 4.0 * model.hidden_size * model.num_layers * visible_pairs(plan)
    blocks = 2.0 * plan.counts.products * plan.streams + pairs
    head = 2.0 * model.hidden_size * plan.vocabulary * plan.scored
    again = blocks if model.gradient_checkpointing else 0.0
    return plan.draws * (3.0 * (blocks + head) + again)


def tokens_per_second(plan: Plan, flops: float, efficiency: float) -> float:
    """Tokens per second of all devices.

    Args:
        plan: the run.
        flops: floating-point operations per second that one device is sold with.
        efficiency: the fraction of them that training gets.
    """
    return plan.devices * flops * efficiency / training_flops(plan)
