"""The walk that predicts all masks in every call and reveals some of them.

Which masks are revealed is decided before, and apart from, their tokens: no race in float32 cuts
off the tail of the vocabulary. Letters: R rows, S positions of the canvas, N masks, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
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

    Time = Callable[[Tensor, int], Tensor]
    """time(masks left [R], step) -> [R] time of each row, where the first is."""

    Choose = Callable[[Prediction, "Masks", int], "Reveal"]
    """choose(prediction, N masks, step) -> which are revealed."""

    Chance = Callable[[Prediction, Interval], Tensor]
    """chance(prediction, interval) -> [N] probability that each mask is revealed in this step."""

    Score = Callable[[Tensor], Tensor]
    """score(log_x0 [N, V]) -> [N]; the highest comes first."""

    Count = Callable[[Tensor, int], Tensor]
    """count(masks left [R], calls left) -> [R] on the CPU, how many of them are revealed."""

    Accepted = Callable[[Tensor], Tensor]
    """accepted(scores [R, S], falling, -inf where none) -> [R] how many are good enough."""


class OrderedRule(Rule):
    """A rule in which the network chooses the next masks."""

    processes: ClassVar[tuple[str, ...]] = ("absorbing",)
    task: ClassVar[str] = "reveals masks in an order of its own"
    chance: ClassVar[str] = ""


class Masks(NamedTuple):
    """Positions of a call that hold masks, and with them others that the last one may have closed.

    Attributes:
        at: N positions.
        still: [N] bool on the device, which hold masks; None: all.
        left: [R] masks of each row, on the CPU or on the device.
    """

    at: Positions
    still: Tensor | None
    left: Tensor

    @staticmethod
    def of(segment: Segment) -> Masks:
        """Return those that are left."""
        at = segment.where(segment.places.begin())
        still = segment.masked(at)
        return Masks(at, still, at.number if still is None else at.count(still))

    def among(self, which: Tensor) -> Tensor:
        """Return `which` [N] bool where there are masks."""
        return which if self.still is None else which & self.still


class Reveal(NamedTuple):
    """Masks that are revealed next.

    Attributes:
        which: [N] bool, on any device.
        entropy: [N] nats of every mask, if known.
    """

    which: Tensor
    entropy: Tensor | None = None


def unmask(
    segment: Segment, time: Time, choose: Choose, greedy_tail: bool = False
) -> Iterator[Step]:
    """Reveal every open position once, in at most `steps` calls; the network says how many in each.

    Args:
        segment: under absorbing noise.
        time: times of the rows.
        choose: masks to reveal; all of them at the last step.
        greedy_tail: take the likeliest tokens at the last step.
    """
    for index in range(segment.steps):
        if segment.places.none_left:
            return
        masks = Masks.of(segment)
        t = time(masks.left, index)
        prediction = segment.predict(masks.at, t)
        which, entropy = choose(prediction, masks, index)
        chosen = segment.chosen(masks.at, masks.among(which))
        step = segment.write(
            chosen.at,
            prediction.at(chosen.predicted),
            t,
            greedy=greedy_tail and index + 1 == segment.steps,
            which=chosen.which,
            entropy=None if entropy is None else entropy[chosen.predicted],
        )
        left = segment.places.settle().sum(1)
        if not left.any():  # a call too many, which has changed nothing
            return
        yield replace(step, t=time(left, index))


def unmask_by_chance(segment: Segment, chance: Chance, greedy_tail: bool) -> Iterator[Step]:
    """Reveal each mask at each step with a probability that depends on its prediction."""
    intervals = grid(segment.schedule, segment.steps)

    def choose(prediction: Prediction, masks: Masks, index: int) -> Reveal:
        u = masks.at.read(segment.position_uniforms(index), segment.canvas.device)
        if intervals[index].last:
            return Reveal(torch.ones_like(u, dtype=torch.bool))

        def chances(chunk: slice) -> Tensor:
            return chance(prediction.at(chunk), intervals[index])

        return Reveal(u < segment.by_parts(len(u), chances))

    def time(left: Tensor, index: int) -> Tensor:
        return intervals[index].t.expand(len(left))

    yield from unmask(segment, time, choose, greedy_tail)


def unmask_accepted(segment: Segment, score: Score, accepted: Accepted) -> Iterator[Step]:
    """Reveal the first masks in an order, as many as are accepted, and at least an even share.

    Args:
        segment: under absorbing noise; its last call reveals what is left.
        score: what orders the positions.
        accepted: how many of them are good enough; fewer than one are one.
    """
    size = (~segment.frozen).sum(1)  # [R]
    sent = segment.send(size)

    def choose(prediction: Prediction, masks: Masks, index: int) -> Reveal:
        calls = segment.steps - index
        scores = _scores(segment, score, prediction, masks.at)
        if masks.still is not None:
            scores = scores.masked_fill(~masks.still, -torch.inf)
        order = in_order(masks.at, scores, prediction)
        number = left = masks.left if segment.ahead else segment.send(masks.left)
        if calls > 1:
            enough = accepted(masks.at.spread(scores).gather(1, order))
            number = torch.maximum(enough, even_share(left, calls)).clamp(min=1).minimum(left)
        which = masks.at.leading(order, number)
        return Reveal(which, -scores if score is low_entropy else None)

    def time(left: Tensor, index: int) -> Tensor:
        return time_left(segment.schedule, left, sent if left.device == sent.device else size)

    yield from unmask(segment, time, choose)


def unmask_in_order(
    segment: Segment, score: Score | Tensor, count: Count, temperature: float = 0.0
) -> Iterator[Step]:
    """Reveal the first masks in an order, in at most `steps` calls.

    The order is read from the raw distributions and the tokens are drawn afterwards, at the chosen
    positions alone. So with one token per call the texts follow the network's chain of
    conditionals, in whatever order. How many positions are revealed is known beforehand, so the CPU
    need not read which. (Published code draws first and orders by the drawn token's probability,
    which prefers likely tokens; at temperature 0 that is the same.)

    Args:
        segment: under absorbing noise; its last call reveals what is left.
        score: what orders the positions; [S] scores that do not depend on predictions.
        count: how many of them are revealed; fewer than one are one.
        temperature: 0 takes the order as it is, else positions are drawn in proportion to
            exp(score / temperature).
    """
    size = (~segment.frozen).sum(1)  # [R]
    masks = segment.where(~segment.frozen)
    for index in range(segment.steps):
        if not len(masks):
            return
        left, calls = masks.number, segment.steps - index
        t = time_left(segment.schedule, left, size)
        prediction = segment.predict(masks, t)
        scores = _scores(segment, score, prediction, masks)
        if temperature:  # the largest of these are draws without replacement
            noise = -torch.log(-torch.log(segment.position_uniforms(index)))
            keys = scores / temperature + masks.read(noise, scores.device)
            keys = keys.clamp(min=torch.finfo(torch.float64).min)
            order = masks.ranked(keys)
        else:
            order = in_order(masks, scores, prediction)
        number = count(left, calls).clamp(min=1).minimum(left) if calls > 1 else left
        now, later = masks.first(order, number)
        entropy = -scores[now] if score is low_entropy else None
        chosen, masks = masks.take(now, number), masks.take(later, left - number)
        yield segment.write(chosen, prediction.at(segment.send(now)), t, entropy=entropy)


def in_order(positions: Positions, scores: Tensor, prediction: Prediction) -> Tensor:
    """Return the columns of each row by falling scores [N], [R, S]; see `steady` for equal ones."""
    return positions.ranked(steady(scores, prediction.at(slice(0, 1)).log_x0.dtype))


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
