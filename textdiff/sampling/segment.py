"""A segment of the active rows, which the engine builds and a decoding rule fills.

A rule predicts positions, draws tokens for some of them and yields the step that writes them. This
is here once, for clean tokens (`reveal`, `write`) and noisy ones (`redraw`). Letters: R rows, S
positions of the canvas, N positions of one call, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.objectives.objective import pick
from textdiff.diffusion.process import ForwardProcess
from textdiff.diffusion.randomness import Stream
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.models.devices import UNPINNED
from textdiff.sampling.canvas import Canvas, Chosen
from textdiff.sampling.context import Context
from textdiff.sampling.controls import Controls
from textdiff.sampling.draws import draw_tokens, draw_weighed
from textdiff.sampling.guidance import Transition, next_token_weights
from textdiff.sampling.open_places import OpenPlaces
from textdiff.sampling.parts import EVERY, by_parts, parts
from textdiff.sampling.positions import Positions
from textdiff.sampling.step import Changes, Step

Denoise = Callable[[Tensor, Tensor, Positions], Prediction]
"""denoise(canvas [R, S], t [R], N positions) -> Prediction.

It runs the network on the rows that own the positions.
"""

Uniforms = Callable[[Stream, int], Tensor]
"""uniforms(stream, scheduled step) -> [R, S] float64, whatever rows share the batch."""


CleanTokens = Literal["drawn", "likeliest"]


@dataclass
class Segment(Canvas):
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
        ahead: whether calls may be queued before the CPU has read what the last one changed.
        discount: takes rows out of the count that the last call was not needed for.
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
    ahead: bool = False
    discount: Callable[[Tensor], None] = field(default=lambda needed: None)
    calls: int = 0
    places: OpenPlaces = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        # A CPU has nothing to wait for. Where tables are large a call takes far longer than the
        # wait, and tokens are drawn only for positions that get one.
        tables = parts(int((~self.frozen).sum()), len(self.process.vocabulary.clean))
        self.ahead = self.ahead and self.canvas.device.type not in UNPINNED and len(tables) == 1
        if self.places is None:
            self.places = OpenPlaces(self.frozen, self.process, followed=True, ahead=self.ahead)

    def position_uniforms(self, step: int) -> Tensor:
        """Return the uniforms that choose positions in a scheduled step, [R, S] float64."""
        return self.uniforms(Stream.POSITION, step)

    def token_uniforms(self, positions: Positions, step: int) -> Tensor:
        """Return the uniforms that choose tokens at positions in a scheduled step, [N] float64."""
        return positions.read(self.uniforms(Stream.TOKEN, step), self.canvas.device)

    def context(self, positions: Positions, t: Tensor) -> Context:
        """Return where positions are, for controls that depend on it."""
        return Context(self.canvas, positions, t, self.process.vocabulary)

    def predict(self, positions: Positions | Tensor, t: Tensor) -> Prediction:
        """Predict positions [N] at times t [R], in one network call."""
        self.calls += 1
        return self.denoise(self.canvas, t, self.at(positions))

    def by_parts(
        self, count: int, read: Callable[[slice], Tensor], together: bool = False
    ) -> Tensor:
        """Return what a function makes of positions, some at a time, or of all of them together."""
        if together:
            return read(EVERY)
        return by_parts(count, len(self.process.vocabulary.clean), read)

    def draw(
        self,
        positions: Positions | Tensor,
        prediction: Prediction | Tensor,
        t: Tensor,
        step: int = 0,
        controls: Controls | None = None,
    ) -> Tensor:
        """Draw a clean token for each position, [N] int64.

        Args:
            positions: N positions.
            prediction: of these positions, or [N, V] raw log-probabilities.
            t: [R] time of each row.
            step: scheduled step whose uniforms choose the tokens; 0 where every position is drawn
                once.
            controls: other controls than the segment's.
        """
        at = self.at(positions)
        used, u = controls or self.controls, self.token_uniforms(at, step)
        if isinstance(prediction, Tensor):
            prediction = Prediction(prediction)

        def draw(chunk: slice) -> Tensor:
            context = self.context(at[chunk], t)
            return draw_tokens(prediction.at(chunk).log_x0, u[chunk], used, context)

        # A constraint decides on all of them together.
        return self.by_parts(len(at), draw, together=used.constraint is not None)

    def likeliest(self, prediction: Prediction, count: int) -> Tensor:
        """Return the likeliest clean token at each of the positions, [N]."""
        return self.by_parts(count, lambda chunk: prediction.at(chunk).log_x0.argmax(-1))

    def log_chances(self, prediction: Prediction, tokens: Tensor) -> Tensor:
        """Return the raw log-probabilities of clean tokens [N] at their positions, [N] float64."""
        return self.by_parts(
            len(tokens), lambda chunk: pick(prediction.at(chunk).log_x0, tokens[chunk])
        )

    def step(
        self,
        positions: Positions | Tensor,
        t: Tensor,
        moved: Tensor | None = None,
        entropy: Tensor | None = None,
        again: Tensor | None = None,
    ) -> Step:
        """Return the step that ends with the canvas as it is.

        Args:
            positions: N positions that may have changed.
            t: [R] time of each row; it and what follows may be on any device.
            moved: [N] bool, which of them have; None: all.
            entropy: [N] nats, if known.
            again: [N] bool, which were masked again; None: a rule that does not do so.
        """
        at = self.at(positions)

        def read() -> Changes:
            changed: Tensor | slice = EVERY if moved is None else moved.cpu()
            nats = None if entropy is None else entropy.cpu()[changed]
            hidden = None if again is None else at.known[again.cpu()]
            return Changes(at.known[changed], None, nats, hidden)

        return Step(self.calls - 1, t, self.canvas, read, self.calls)

    def write(
        self,
        positions: Positions | Tensor,
        prediction: Prediction | Tensor,
        t: Tensor,
        greedy: bool | Tensor = False,
        which: Tensor | None = None,
        **options: Any,
    ) -> Step:
        """Draw tokens for positions and put them on the canvas; see `draw`.

        Args:
            positions: N positions.
            prediction: of these positions, or [N, V] raw log-probabilities.
            t: [R] time of each row.
            greedy: whether to take the likeliest tokens, or [N] bool on the CPU, where to.
            which: [N] bool on the device, positions that are written; None: all.
            options: see `step`.
        """
        positions = self.at(positions)
        tokens = self.draw(positions, prediction, t)
        greedy = torch.as_tensor(greedy).expand(len(positions))
        if bool(greedy.any()):  # on the CPU
            best = self.draw(positions, prediction, t, controls=self.controls.cold())
            tokens = torch.where(self.send(greedy), best, tokens)
        self.put(positions, tokens, which)
        return self.step(positions, t, moved=which, **options)

    def reveal(
        self, positions: Positions | Tensor, t: Tensor, greedy: bool | Tensor = False
    ) -> Step:
        """Predict masked positions [N] at times t [R], and write their tokens; see `write`."""
        positions = self.at(positions)
        return self.write(positions, self.predict(positions, t), t, greedy)

    def redraw(
        self,
        chosen: Chosen,
        prediction: Prediction,
        t: Tensor,
        transition: Transition,
        step: int,
        clean: CleanTokens | None = None,
    ) -> Tensor:
        """Draw the next tokens of positions, noisy ones until the end.

        Args:
            chosen: n of N positions.
            prediction: of all N.
            t: [R] time of each row.
            transition: distribution of the next tokens.
            step: scheduled step whose uniforms choose the tokens.
            clean: how the tokens come about where they are to be clean; None: they are noisy.

        Returns:
            [n] bool on the device, True where the token is another one.
        """
        positions, prediction = chosen.at, prediction.at(chosen.predicted)
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

        # A constraint decides on all of them together.
        tokens = self.by_parts(len(positions), draw, drawing.constraint is not None)
        moved = chosen.among(tokens != before)
        self.put(positions, tokens, moved)
        return moved


def _possible(weights: Tensor, log_x0: Tensor) -> Tensor:
    """Return weights [N, V] in which rounding gives impossible tokens no chance."""
    possible = weights.where(log_x0 > -torch.inf, 0.0)
    empty = possible.sum(-1, keepdim=True) == 0.0
    return torch.where(empty, log_x0.double().exp(), possible)
