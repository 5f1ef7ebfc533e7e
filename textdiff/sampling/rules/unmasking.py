"""What the rules share that let the network say which masked positions come next.

Every call predicts all masked positions of the rows that have any; each row's are put in order by
what the network says there, and the first few are revealed. The order is read from the raw
distributions and the tokens are drawn afterwards, at the chosen positions alone, so with one token
per call the law is the network's chain of conditionals, in whatever order. (Published code draws
first and orders by the drawn token's probability, which prefers likely tokens; at temperature 0
that is the same.) Letters: R rows, S positions of the canvas, N masked positions, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from textdiff.diffusion.randomness import Stream
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.sampling.segment import Segment, Step

Score = Callable[[Tensor], Tensor]
"""score(log_x0 [N, V]) -> [N]; what is highest comes first."""

Count = Callable[[Tensor, Tensor, int], Tensor]
"""count(scores [R, S] in order, -inf where none, masks left [R], calls left) -> [R] to reveal."""


def unmask(segment: Segment, score: Score, count: Count, spread: float = 0.0) -> Iterator[Step]:
    """Reveal every open position once, in at most `segment.steps` calls.

    Args:
        segment: under absorbing noise; its last call reveals what is left.
        score: what orders the positions.
        count: how many of them are revealed; fewer than one are one.
        spread: temperature of the order; 0 takes it as it is, else positions are drawn in
            proportion to exp(score / spread).
    """
    masked = ~segment.frozen  # [R, S]
    size, steps = masked.sum(1), segment.steps
    for index in range(steps):
        positions = masked.flatten().nonzero().squeeze(1)
        if not len(positions):
            return
        left = masked.sum(1)
        t = time_left(segment.schedule, left, size)
        prediction = segment.predict(positions, t)
        scores = torch.full(masked.shape, -torch.inf, dtype=torch.float64)
        scores[masked] = score(prediction.log_x0).double().cpu()
        keys = steady(scores, prediction.log_x0.dtype)
        if spread:  # the largest of these are draws without replacement by exp(score / spread)
            u = segment.uniforms(Stream.POSITION, index)
            keys = scores / spread - torch.log(-torch.log(u))
            keys = keys.clamp(min=torch.finfo(torch.float64).min).where(masked, -torch.inf)
        order = keys.argsort(dim=1, descending=True, stable=True)
        ranked = scores.gather(1, order)
        number = count(ranked, left, steps - index).clamp(min=1) if index + 1 < steps else left
        first = torch.arange(masked.shape[1]) < number.minimum(left)[:, None]
        now = torch.zeros_like(masked).scatter(1, order, first)
        picked = now[masked]
        log_x0 = prediction.log_x0[picked.to(segment.canvas.device)]
        step = segment.write(positions[picked], log_x0, t)
        masked = masked & ~now
        yield replace(step, entropy=-scores[now]) if score is low_entropy else step


def steady(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores rounded so far that what is equal but for rounding in `dtype` is equal, and in a
    stable sort goes from left to right.

    Equal scores are no accident: where nothing is revealed yet, relative positions tell no masked
    token from another. Kernels round them differently from batch to batch.
    """
    quantum = math.sqrt(torch.finfo(dtype).eps)
    return (scores / quantum).round()


def even_share(left: Tensor, calls: int) -> Tensor:
    """[R] masks to reveal now, of `left` in `calls`, the first calls taking what is left over."""
    return -(-left // calls)


def time_left(schedule: NoiseSchedule, left: Tensor, size: Tensor) -> Tensor:
    """[R] time at which `left` of `size` tokens are masked, for networks that are told.

    The mean noise level under which exactly k of n positions are hit is k / (n + 1), as in training
    by count.
    """
    return schedule.t_of_alpha(1.0 - left.double() / (size + 1.0)).clamp(0.0, 1.0)


def most_likely(log_x0: Tensor) -> Tensor:
    """[N] largest log-probability."""
    return log_x0.amax(-1)


def margin(log_x0: Tensor) -> Tensor:
    """[N] log of how much likelier the first token is than the second."""
    first, second = log_x0.topk(2).values.double().exp().unbind(-1)
    return (first - second).clamp(min=torch.finfo(torch.float64).tiny).log()


def entropy(log_x0: Tensor) -> Tensor:
    """[N] entropy in nats."""
    nats: Tensor = torch.special.entr(log_x0.exp()).sum(-1, dtype=torch.float64)
    return nats


def low_entropy(log_x0: Tensor) -> Tensor:
    """[N] minus the entropy."""
    return -entropy(log_x0)


ORDERS: dict[str, Score] = {
    "probability": most_likely,
    "margin": margin,
    "entropy": low_entropy,
}
"""What a row's masked positions can be ordered by; all take the raw distributions."""
