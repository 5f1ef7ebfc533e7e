"""The walk that accepts confident tokens and draws all others from the noise again.

Every call predicts all open positions given the whole canvas, noise included. The most confident
ones get tokens; the others get new noise. No token is final: one that was accepted is drawn again,
or lost, at the next call. The text is the likeliest one given the last canvas. Networks need
training on noise in which clean and random tokens mix. Letters: R rows, S positions of the canvas,
N open positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from textdiff.sampling.parts import posterior_prediction
from textdiff.sampling.rules.redrawing import even_times
from textdiff.sampling.rules.unmasking import in_order, low_entropy
from textdiff.section import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from textdiff.diffusion.objectives import Prediction
    from textdiff.sampling.canvas import Chosen
    from textdiff.sampling.positions import Positions
    from textdiff.sampling.rules.revising import Revision
    from textdiff.sampling.rules.unmasking import Score
    from textdiff.sampling.segment import Segment
    from textdiff.sampling.step import Step


def accept_or_renoise(
    segment: Segment, score: Score, accepted: Callable[[Tensor], Tensor], revision: Revision
) -> Iterator[Step]:
    """Accept some positions of each row and renoise the others, in at most `steps` calls.

    The network reads the noise level that the last call left. The temperature falls with the calls.

    Args:
        segment: under noise that replaces tokens.
        score: confidence of distributions, here of p(x_0 | x_t).
        accepted: (confidences [R, S], falling) -> [R] positions to accept; none counts as one.
        revision: rows that are revised.
    """
    size = segment.decided(revision.size)  # [R]
    alphas = torch.zeros(len(size), dtype=torch.float64, device=size.device)  # at first all noise
    for index, t in enumerate(even_times(segment.steps)[:-1]):
        if revision.none_left:
            return
        positions = revision.positions()
        time = segment.schedule.t_of_alpha(alphas).clamp(0.0, 1.0)
        known = segment.readback(time)
        prediction = segment.predict(positions, time)
        posterior = _posterior(segment, positions, prediction, alphas)
        t = t.expand(len(size))
        still = revision.still(positions)
        ended = revision.end(positions, posterior, t, every=index + 1 == segment.steps)
        live = ~ended if still is None else still & ~ended
        scores, sure = _numbers(segment, posterior, score, len(positions))
        scores = scores if still is None else scores.masked_fill(~still, -torch.inf)
        order = in_order(positions, scores, prediction)
        taken = accepted(positions.spread(scores).gather(1, order)).clamp(min=1).minimum(size)
        kept = positions.leading(order, taken)
        _accept(segment, segment.chosen(positions, live & kept), posterior, t, index)
        alphas, lost = level(size - taken, size), live & ~kept
        _renoise(segment, segment.chosen(positions, lost), alphas, index)
        if not revision.was_needed():
            return
        moved = None if still is None else live | ended
        nats = torch.where(lost, torch.nan, -sure)
        yield segment.step(positions, known.read(), moved, nats, again=lost)


def _posterior(
    segment: Segment, positions: Positions, prediction: Prediction, alphas: Tensor
) -> Prediction:
    """Return p(x_0 | x_t) of N positions, at the survival probabilities of their rows."""
    tokens, alpha = segment.tokens(positions), segment.send(positions.of_rows(alphas))  # [N] each
    return posterior_prediction(segment.process, prediction, tokens, alpha)


def _numbers(segment: Segment, posterior: Prediction, score: Score, count: int) -> Tensor:
    """Return [2, N] scores and negative entropies of positions, where they decide."""

    def read(chunk: slice) -> Tensor:
        log_p = posterior.at(chunk).log_x0
        return torch.stack([score(log_p).double(), low_entropy(log_p)], dim=1)

    return segment.decided(segment.by_parts(count, read)).t()


def level(noisy: Tensor, size: Tensor) -> Tensor:
    """Return [R] survival probabilities at which `noisy` of `size` tokens are noise.

    A rate of noise that is uniform beforehand has the mean (noisy + 1) / (size + 2) afterwards.
    """
    return 1.0 - (noisy.double() + 1.0) / (size + 2.0)


def _accept(segment: Segment, chosen: Chosen, posterior: Prediction, t: Tensor, step: int) -> None:
    # A constraint is on finished text: the canvases before it are free.
    controls = replace(segment.controls, constraint=None)
    tokens = segment.draw(chosen.at, posterior.at(chosen.predicted), t, step, controls)
    segment.put(chosen.at, tokens, chosen.which)


def _renoise(segment: Segment, chosen: Chosen, alphas: Tensor, step: int) -> None:
    u = chosen.at.read(segment.position_uniforms(step))
    alpha = chosen.at.of_rows(alphas)
    tokens = segment.process.corruptions(segment.send(alpha), segment.send(u))
    segment.put(chosen.at, tokens, chosen.which)
