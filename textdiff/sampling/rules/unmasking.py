"""The walk that predicts all masks in every call and reveals some of them.

Which masks are revealed is decided before, and apart from, their tokens: no race in float32 cuts
off the tail of the vocabulary. Letters: R rows, S positions of the canvas, N masks, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from textdiff.sampling.rules.redrawing import Interval, grid
from textdiff.sampling.rules.rule import Rule
from textdiff.section import Tensor, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from textdiff.diffusion.objectives import Prediction
    from textdiff.diffusion.schedule import NoiseSchedule
    from textdiff.sampling.positions import Positions
    from textdiff.sampling.segment import Segment
    from textdiff.sampling.step import Step

    Choose = Callable[[Prediction, Positions, int], "Reveal"]
    """choose(prediction, N masks, step) -> which are revealed."""

    Chance = Callable[[Prediction, Interval], Tensor]
    """chance(prediction, interval) -> [N] probability that each mask is revealed in this step."""

    Score = Callable[[Tensor], Tensor]
    """score(log_x0 [N, V]) -> [N]; the highest comes first."""

    Ranked = Callable[[], Tensor]
    """ranked() -> [R, S] CPU scores in order, -inf where none; it waits for the device."""

    Count = Callable[[Ranked, Tensor, int], Tensor]
    """count(ranked, masks left [R], calls left) -> [R] on the CPU."""


class OrderedRule(Rule):
    """A rule in which the network chooses the next masks."""

    processes: ClassVar[tuple[str, ...]] = ("absorbing",)
    task: ClassVar[str] = "reveals masks in an order of its own"
    chance: ClassVar[str] = ""


class Reveal(NamedTuple):
    """Masks that are revealed next; where their number is known, the CPU need not know which.

    Attributes:
        now: [n] their indices among the N masks, in order, on the CPU or on the device.
        later: [N - n] those of the others; all of them are revealed at the last step.
        number: [R] CPU, how many of each row are revealed.
        entropy: [N] nats of every mask, if known.
    """

    now: Tensor
    later: Tensor
    number: Tensor
    entropy: Tensor | None = None


def unmask(
    segment: Segment,
    time: Callable[[Tensor, int], Tensor],
    choose: Choose,
    greedy_tail: bool = False,
) -> Iterator[Step]:
    """Reveal every open position once, in at most `steps` calls.

    Args:
        segment: under absorbing noise.
        time: (masks left [R], step) -> [R] time of each row.
        choose: masks to reveal.
        greedy_tail: take the likeliest tokens at the last step.
    """
    masks = segment.where(~segment.frozen)
    for index in range(segment.steps):
        if not len(masks):
            return
        t = time(masks.number, index)
        prediction = segment.predict(masks, t)
        now, later, number, entropy = choose(prediction, masks, index)
        chosen, masks = masks.take(now, number), masks.take(later, masks.number - number)
        prediction = prediction.at(segment.send(now))
        greedy = greedy_tail and index + 1 == segment.steps
        entropy = None if entropy is None else entropy[now]
        yield segment.write(chosen, prediction, t, greedy=greedy, entropy=entropy)


def unmask_by_chance(segment: Segment, chance: Chance, greedy_tail: bool) -> Iterator[Step]:
    """Reveal each mask at each step with a probability that depends on its prediction."""
    intervals = grid(segment.schedule, segment.steps)

    def choose(prediction: Prediction, masks: Positions, index: int) -> Reveal:
        u = masks.read(segment.position_uniforms(index))

        def chances(chunk: slice) -> Tensor:
            return chance(prediction.at(chunk), intervals[index])

        now = torch.ones(len(u), dtype=torch.bool)
        if not intervals[index].last:
            now = u < segment.by_parts(len(u), chances).cpu()
        chosen, others = now.nonzero().squeeze(1), (~now).nonzero().squeeze(1)
        return Reveal(chosen, others, masks[chosen].number)

    def time(left: Tensor, index: int) -> Tensor:
        return intervals[index].t.expand(len(left))

    yield from unmask(segment, time, choose, greedy_tail)


def unmask_in_order(
    segment: Segment, score: Score | Tensor, count: Count, temperature: float = 0.0
) -> Iterator[Step]:
    """Reveal the first few masks of each row in an order that the network gives.

    The order is read from the raw distributions and the tokens are drawn afterwards, at the chosen
    positions alone. So with one token per call the texts follow the network's chain of
    conditionals, in whatever order. (Published code draws first and orders by the drawn token's
    probability, which prefers likely tokens; at temperature 0 that is the same.)

    Args:
        segment: under absorbing noise; its last call reveals what is left.
        score: what orders the positions; [S] scores that do not depend on predictions.
        count: how many of them are revealed; fewer than one are one.
        temperature: 0 takes the order as it is, else positions are drawn in proportion to
            exp(score / temperature).
    """
    size = (~segment.frozen).sum(1)  # [R]

    def choose(prediction: Prediction, masks: Positions, index: int) -> Reveal:
        left, calls = masks.number, segment.steps - index
        scores = _scores(segment, score, prediction, masks)
        keys = steady(scores, prediction.at(slice(0, 1)).log_x0.dtype)
        if temperature:  # the largest of these are draws without replacement
            noise = -torch.log(-torch.log(segment.position_uniforms(index)))
            keys = scores / temperature + masks.read(noise, scores.device)
            keys = keys.clamp(min=torch.finfo(torch.float64).min)
        order = masks.spread(keys).argsort(dim=1, descending=True, stable=True)  # [R, S]

        def ranked() -> Tensor:
            return masks.spread(scores).gather(1, order).cpu()

        number = count(ranked, left, calls).clamp(min=1).minimum(left) if calls > 1 else left
        now, later = masks.first(order, number)
        return Reveal(now, later, number, -scores if score is low_entropy else None)

    def time(left: Tensor, index: int) -> Tensor:
        return time_left(segment.schedule, left, size)

    yield from unmask(segment, time, choose)


def _scores(
    segment: Segment, score: Score | Tensor, prediction: Prediction, masks: Positions
) -> Tensor:
    """Return [N] float64 scores of masks, on the device if the network gives them."""
    if isinstance(score, torch.Tensor):
        return masks.read(score.expand(masks.shape))

    def read(chunk: slice) -> Tensor:
        return score(prediction.at(chunk).log_x0.detach()).double()

    return segment.by_parts(len(masks), read)


def steady(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scores so far that those equal but for rounding in `dtype` are equal.

    A stable sort takes them from left to right. Equal scores are not an accident: where nothing is
    revealed yet, relative positions do not tell one masked token from another, and kernels round
    them differently from batch to batch.
    """
    quantum = math.sqrt(torch.finfo(dtype).eps)
    return (scores / quantum).round()


def even_share(left: Tensor, calls: int) -> Tensor:
    """Return [R] masks to reveal now, of `left` in `calls`; the first calls take the remainder."""
    return -(-left // calls)


def time_left(schedule: NoiseSchedule, left: Tensor, size: Tensor) -> Tensor:
    """Return [R] times at which `left` of `size` tokens are masked, for time-conditioned networks.

    The mean noise level under which exactly k of n positions are masked is k / (n + 1), as in
    training by count.
    """
    return schedule.t_of_alpha(1.0 - left.double() / (size + 1.0)).clamp(0.0, 1.0)


def most_likely(log_x0: Tensor) -> Tensor:
    """Return [N] largest log-probabilities."""
    return log_x0.amax(-1)


def margin(log_x0: Tensor) -> Tensor:
    """Return [N] log of the difference of the two largest probabilities."""
    first, second = log_x0.topk(2).values.double().exp().unbind(-1)
    return (first - second).clamp(min=torch.finfo(torch.float64).tiny).log()


def place_scores(places: Sequence[int], width: int) -> Tensor:
    """Return [S] scores in which some places come first, in their order; others are equal.

    Args:
        places: distinct; those that the canvas lacks are passed over.
        width: positions of the canvas.
    """
    scores = torch.full((width,), -float(len(places)), dtype=torch.float64)
    for turn, place in enumerate(places):
        scores[place : place + 1] = -float(turn)  # empty behind the canvas
    return scores


def low_entropy(log_x0: Tensor) -> Tensor:
    """Return [N] negative entropies in nats."""
    nats: Tensor = torch.special.entr(log_x0.exp()).sum(-1, dtype=torch.float64)
    return -nats
