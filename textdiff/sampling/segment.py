"""A segment of the active rows, which the engine builds and a decoding rule fills.

A rule predicts positions, draws tokens for some of them and yields the step that writes them. This
is here once, for clean tokens (`reveal`, `write`) and noisy ones (`redraw`). Letters: R rows, S
positions of the canvas, N positions of one call, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.objectives.objective import pick
from textdiff.diffusion.process import ForwardProcess
from textdiff.diffusion.randomness import Stream
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.models.devices import to_device
from textdiff.sampling.context import Context
from textdiff.sampling.controls import Controls
from textdiff.sampling.draws import draw_tokens, draw_weighed
from textdiff.sampling.guidance import Transition, next_token_weights
from textdiff.sampling.parts import EVERY, by_parts
from textdiff.sampling.previous import OpenPlaces

Denoise = Callable[[Tensor, Tensor, Tensor], Prediction]
"""denoise(canvas [R, S], t [R], positions [N]) -> Prediction.

It runs the network on the rows that own the positions.
"""

Uniforms = Callable[[Stream, int], Tensor]
"""uniforms(stream, scheduled step) -> [R, S] float64, whatever rows share the batch."""


CleanTokens = Literal["drawn", "likeliest"]


@dataclass(frozen=True)
class Step:
    """The canvas after one network call.

    Attributes:
        index: network calls of this kind so far, counted from 0 over the whole generation.
        t: [R] time of each row before the step.
        canvas: [R, L] tokens after the step; a new tensor each time.
        changed: [N] flat CPU positions that changed.
        calls: network calls so far.
        draft: [R, L] canvas with every open position filled by its most likely token, if asked for.
        confidence: [N] raw probability of each new token, if asked for; NaN for masks.
        entropy: [N] entropy in nats at the changed positions, if asked for or known anyway; NaN
            where a token was masked again.
        remasked: [M] flat CPU positions that were masked again, or drawn from the noise again, for
            rules that do so.
        final: [R] tokens of each row that were final before this step; the engine fills it, as it
            does what follows.
        ends: [R] tokens up to the end of each row's segment; `final` for rows without one.
        done: [R] bool, rows that were finished before this step.
        rows: rows that the network has run on so far.
    """

    index: int
    t: Tensor
    canvas: Tensor
    changed: Tensor
    calls: int
    draft: Tensor | None = None
    confidence: Tensor | None = None
    entropy: Tensor | None = None
    remasked: Tensor | None = None
    final: Tensor | None = None
    ends: Tensor | None = None
    done: Tensor | None = None
    rows: int = 0

    @property
    def dependence(self) -> Tensor | None:
        """[R] nats that revealing the changed positions at once may cost; needs `entropy`.

        The sum of their entropies less the largest bounds their total correlation. On average over
        texts, the sum over steps bounds the divergence from revealing them one by one. The
        network's conditionals must be those of one joint distribution (arXiv:2505.24857).
        """
        if self.entropy is None:
            return None
        rows, width = self.canvas.shape
        row, nats = self.changed // width, self.entropy.double().nan_to_num(0.0)
        zero = torch.zeros(rows, dtype=torch.float64)
        largest = zero.scatter_reduce(0, row, nats, "amax")
        return zero.index_add(0, row, nats) - largest

    def without_noise(self, mask: int) -> Tensor:
        """Return the canvas with the mask where tokens were masked or noised again."""
        if self.remasked is None:
            return self.canvas
        again = to_device(self.remasked, self.canvas.device)
        return self.canvas.flatten().index_fill(0, again, mask).view_as(self.canvas)


@dataclass
class Segment:
    """The open positions of R rows, and everything that fills them.

    Attributes:
        denoise: the network behind its objective, cache and layout.
        process: forward process.
        schedule: noise schedule.
        canvas: [R, S] tokens, open positions in the process's prior state at first.
        frozen: [R, S] bool on the CPU, positions that never change.
        steps: denoising steps, and most network calls of a row.
        uniforms: source of randomness.
        controls: how tokens are drawn from predictions.
        calls: network calls so far.
        places: its open positions, followed as it is filled.
    """

    denoise: Denoise
    process: ForwardProcess
    schedule: NoiseSchedule
    canvas: Tensor
    frozen: Tensor
    steps: int
    uniforms: Uniforms
    controls: Controls
    calls: int = 0
    places: OpenPlaces = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.places is None:
            self.places = OpenPlaces(self.frozen, self.process, followed=True)

    def send(self, x: Tensor) -> Tensor:
        """Copy a tensor of the CPU to the device of the canvas, without waiting for it."""
        return to_device(x, self.canvas.device)

    def tokens(self, positions: Tensor) -> Tensor:
        """Return the tokens at flat CPU positions, [N] int64."""
        return self.canvas.flatten()[self.send(positions)]

    def position_uniforms(self, step: int) -> Tensor:
        """Return the uniforms that choose positions in a scheduled step, [R, S] float64."""
        return self.uniforms(Stream.POSITION, step)

    def token_uniforms(self, positions: Tensor, step: int) -> Tensor:
        """Return the uniforms that choose tokens at positions in a scheduled step, [N] float64."""
        u = self.uniforms(Stream.TOKEN, step).flatten()[positions]
        return self.send(u)

    def context(self, positions: Tensor, t: Tensor) -> Context:
        """Return where positions are, for controls that depend on it."""
        return Context(self.canvas, positions, t, self.process.vocabulary)

    def predict(self, positions: Tensor, t: Tensor) -> Prediction:
        """Predict positions [N] at times t [R], in one network call."""
        self.calls += 1
        return self.denoise(self.canvas, t, positions)

    def by_parts(
        self, count: int, read: Callable[[slice], Tensor], together: bool = False
    ) -> Tensor:
        """Return what a function makes of positions, some at a time, or of all of them together."""
        if together:
            return read(EVERY)
        return by_parts(count, len(self.process.vocabulary.clean), read)

    def draw(
        self,
        positions: Tensor,
        prediction: Prediction | Tensor,
        t: Tensor,
        step: int = 0,
        controls: Controls | None = None,
    ) -> Tensor:
        """Draw a clean token for each position, [N] int64.

        Args:
            positions: [N] flat CPU positions.
            prediction: of these positions, or [N, V] raw log-probabilities.
            t: [R] time of each row.
            step: scheduled step whose uniforms choose the tokens; 0 where every position is drawn
                once.
            controls: other controls than the segment's.
        """
        used, u = controls or self.controls, self.token_uniforms(positions, step)
        if isinstance(prediction, Tensor):
            prediction = Prediction(prediction)

        def draw(chunk: slice) -> Tensor:
            context = self.context(positions[chunk], t)
            return draw_tokens(prediction.at(chunk).log_x0, u[chunk], used, context)

        # A constraint decides on all of them together.
        return self.by_parts(len(positions), draw, together=used.constraint is not None)

    def likeliest(self, prediction: Prediction, count: int) -> Tensor:
        """Return the likeliest clean token at each of the positions, [N]."""
        return self.by_parts(count, lambda chunk: prediction.at(chunk).log_x0.argmax(-1))

    def log_chances(self, prediction: Prediction, tokens: Tensor) -> Tensor:
        """Return the raw log-probabilities of clean tokens [N] at their positions, [N] float64."""
        return self.by_parts(
            len(tokens), lambda chunk: pick(prediction.at(chunk).log_x0, tokens[chunk])
        )

    def put(self, positions: Tensor, tokens: Tensor, closed: Tensor | None = None) -> None:
        """Replace the canvas by one with other tokens at some positions.

        Args:
            positions: [N] flat CPU positions.
            tokens: [N] on the device.
            closed: those of the positions whose tokens are not the mask; None: all of them.
        """
        at = self.send(positions)
        self.canvas = self.canvas.flatten().index_copy(0, at, tokens).view_as(self.canvas)
        self.places.close(positions if closed is None else closed)

    def mask(self, where: Tensor) -> None:
        """Replace the canvas by one with masks at positions [R, S] bool on the CPU."""
        self.canvas = self.canvas.masked_fill(self.send(where), self.process.mask_token_id)
        self.places.reopen(where)

    def step(self, changed: Tensor, t: Tensor, **options: Any) -> Step:
        """Return the step that ends with the canvas as it is."""
        return Step(self.calls - 1, t, self.canvas, changed, self.calls, **options)

    def write(
        self,
        positions: Tensor,
        prediction: Prediction | Tensor,
        t: Tensor,
        greedy: bool | Tensor = False,
        **options: Any,
    ) -> Step:
        """Draw tokens for positions and put them on the canvas; see `draw`.

        Args:
            positions: [N] flat CPU positions.
            prediction: of these positions, or [N, V] raw log-probabilities.
            t: [R] time of each row.
            greedy: whether to take the likeliest tokens, or [N] bool on the CPU, where to.
            options: optional fields of the step.
        """
        tokens = self.draw(positions, prediction, t)
        greedy = torch.as_tensor(greedy).expand(len(positions))
        if bool(greedy.any()):  # on the CPU
            best = self.draw(positions, prediction, t, controls=self.controls.cold())
            tokens = torch.where(self.send(greedy), best, tokens)
        self.put(positions, tokens)
        return self.step(positions, t, **options)

    def reveal(self, positions: Tensor, t: Tensor, greedy: bool | Tensor = False) -> Step:
        """Predict masked positions [N] at times t [R], and write their tokens; see `write`."""
        return self.write(positions, self.predict(positions, t), t, greedy)

    def redraw(
        self,
        positions: Tensor,
        prediction: Prediction,
        t: Tensor,
        transition: Transition,
        step: int,
        clean: CleanTokens | None = None,
    ) -> Tensor:
        """Draw the next tokens of positions, noisy ones until the end; return those that changed.

        Args:
            positions: [N] flat CPU positions.
            prediction: of these positions.
            t: [R] time of each row.
            transition: distribution of the next tokens.
            step: scheduled step whose uniforms choose the tokens.
            clean: how the tokens come about where they are to be clean; None: they are noisy.
        """
        controls = self.controls.cold() if clean == "likeliest" else self.controls
        # A constraint is on finished text: the noisy states before it are free.
        drawing = replace(controls, constraint=controls.constraint if clean else None)
        before, u = self.tokens(positions), self.token_uniforms(positions, step)

        def draw(chunk: slice) -> Tensor:
            context = self.context(positions[chunk], t)
            shaped = controls.applied(prediction.at(chunk), context)
            weights = next_token_weights(shaped, before[chunk], transition, self.process)
            weights = _possible(weights, shaped.log_x0) if clean else weights
            return draw_weighed(weights, u[chunk], drawing, context)

        together = drawing.constraint is not None  # it decides on all of them together
        tokens = self.by_parts(len(positions), draw, together)
        changed = positions[(tokens != before).cpu()]
        self.put(positions, tokens, closed=changed)
        return changed


def _possible(weights: Tensor, log_x0: Tensor) -> Tensor:
    """Return weights [N, V] in which rounding gives impossible tokens no chance."""
    possible = weights.where(log_x0 > -torch.inf, 0.0)
    empty = possible.sum(-1, keepdim=True) == 0.0
    return torch.where(empty, log_x0.double().exp(), possible)
