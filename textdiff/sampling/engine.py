"""The engine: prompts become canvases, and a decoding rule fills them segment by segment.

Rows are active in slots, together but each at a segment of its own. A row that is done leaves at
the end of its segment and a waiting one takes its slot. The result of a row does not depend on the
rows beside it: its uniforms are keyed by its index in the job, and it sees none of the others.
Letters: R rows of the job, A active ones, S columns of a canvas, W columns of the texts.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.randomness import Stream, signed, uniforms
from textdiff.errors import ConfigError
from textdiff.models import Denoiser
from textdiff.models.devices import Readback, on_device, to_device
from textdiff.sampling.cached import ApproximatePredictor, CachedPredictor
from textdiff.sampling.context import SegmentInfo
from textdiff.sampling.guidance import GuidedPredictor, check_guidance
from textdiff.sampling.job import ContextLimit, Rows, Segments
from textdiff.sampling.predictor import PlainPredictor, Predictor
from textdiff.sampling.request import Request
from textdiff.sampling.rules import build_rule
from textdiff.sampling.segment import Segment, Uniforms
from textdiff.sampling.step import Step
from textdiff.sampling.watch import Watch


class Engine:
    """Generation of the rows of a request.

    Args:
        model: the network, in evaluation mode.
        family: process, schedule, objective and block size.
        request: rows, rule, controls.
        slots: rows that are active together; None: all.
        parts: optional parts of steps to fill, of `watch.PARTS`; no token depends on it.

    Raises:
        ConfigError: an unknown rule or knob, an option that does not fit the family, or a cache
            that would not be exact.
    """

    def __init__(
        self,
        model: Denoiser,
        family: Family,
        request: Request,
        slots: int | None = None,
        parts: Collection[str] = (),
    ):
        self.model, self.family, self.request, self.parts = model, family, request, parts
        self.job, self.config, self.controls = request.job, request.config, request.controls
        self.lengths = self.job.lengths  # [R]
        self.rule = build_rule(self.config.rule, family, self.config.knobs)
        self.limit = ContextLimit(model.context, family.block_size)
        stride = self.limit.stride(self.config.stride)
        self.segments = Segments(family.block_size, self.limit.context, stride)
        self.width = self.segments.room(self.lengths)
        self.rows = Rows.of(self.job, slots)
        check_guidance(self.config.guidance, family)
        self.predictor = self._guided_predictor()
        seeds, numbers = zip(*self.job.row_keys, strict=True)
        self.seeds = torch.tensor([signed(seed) for seed in seeds])[:, None]  # [R, 1]
        self.numbers = torch.tensor(numbers)[:, None]  # [R, 1] index of each row under its seed
        self.prompts = self._prior()  # stays on the CPU
        self.text = to_device(self.prompts, model.device)
        self.open = self._open_places()
        self.index = 0
        self.vain = 0, 0  # calls that no step followed, and their rows

    @property
    def final(self) -> Tensor:
        """[R] tokens of each row that will not change; in the end all of them."""
        return self.rows.final

    @torch.no_grad()
    def run(self) -> Iterator[Step]:
        """Yield the canvas of all rows after every network call of the rule.

        The canvas [R, W] and the positions of a step are those of all rows; what has not begun
        is noise. `t` is 0 for rows that are not active. `final` counts the tokens of each row that
        were final before the step's segments, `ends` where these end.

        Raises:
            CheckpointError: the network's output is not finite.
        """
        yield from self.walk()

    def walk(self) -> Iterator[Step]:
        """Yield the steps of `run`; unlike there, gradients flow if they are enabled."""
        while self.rows.unfinished:
            if new := self.rows.admit():
                self.predictor.admit(self.prompts[new], self.rows.final[new])
            area = self._next_area()
            yield from self._fill(area)
            written = Readback(self.text[on_device(self.text, area.active)])  # [A, W]
            self.predictor.check()
            if done := self.rows.advance(area.ends, written):
                self.predictor.keep(self.rows.leave(done))

    def _guided_predictor(self) -> Predictor:
        predictor, weight = self._new_predictor(), self.config.guidance
        if not weight:
            return predictor
        return GuidedPredictor(predictor, self._new_predictor(), self.job.given, weight)

    def _new_predictor(self) -> Predictor:
        """Return what runs the network.

        Raises:
            ConfigError: a cache that would not be exact.
        """
        cache, in_blocks = self.config.cache, self.family.block_size is not None
        window = self.limit.window(self.config.window, int(self.lengths.max()))
        if cache == "off" or (cache == "auto" and not in_blocks):
            return PlainPredictor(self.model, self.family, window)
        if not in_blocks and cache == "on":
            raise ConfigError(
                "a cache of a full-sequence model would be an approximation: every token sees all "
                "others, so what a finished one computes changes with each new token; generate "
                "without a cache, accept that with --cache approximate (cache='approximate' in "
                "Python), or train in blocks (diffusion.block_size)",
                code="cache_not_exact",
            )
        if not in_blocks:
            return ApproximatePredictor(self.model, self.family, self.rows.slots, self.width)
        if cache == "approximate":
            raise ConfigError(
                "the cache of a model in blocks is exact, as finished tokens see nothing later: "
                "use --cache on (cache=True in Python); an approximate one is for full-sequence "
                "models",
                code="cache_is_exact",
            )
        return CachedPredictor(self.model, self.family, self.rows.slots, self.width, window)

    def _prior(self) -> Tensor:
        """Return texts [R, W] on the CPU that hold the fixed tokens, and noise elsewhere."""
        job, position = self.job, torch.arange(self.width)
        u = uniforms(self.seeds, Stream.PRIOR, row=self.numbers, position=position)
        text = self.family.on_cpu.process.prior((len(job.prompts), self.width), u)  # [R, W]
        fixed = [token for prompt in job.prompts for token in prompt if token is not None]
        text[:, : job.given.shape[1]][job.given] = torch.tensor(fixed, dtype=torch.int64)
        return text

    def _open_places(self) -> Tensor:
        """Return which places of the texts may be written, [R, W] bool.

        Places beyond the end of a row hold noise. Masks stay there; where noise is tokens, they are
        drawn like all others, and are not read.
        """
        given = self.job.given
        written = torch.nn.functional.pad(~given, (0, self.width - given.shape[1]), value=True)
        if self.family.process.replaces_tokens:
            return written
        return written & (torch.arange(self.width) < self.lengths[:, None])

    def _next_area(self) -> "Area":
        """Return the next segment of every active row."""
        active = torch.tensor(self.rows.active)  # [A]
        final, lengths = self.rows.final[active], self.lengths[active]
        starts, widths = self.segments.next(final, lengths)
        columns = starts[:, None] + torch.arange(int(widths.max()))  # [A, S], in the text
        stops = (starts + widths).clamp(max=self.width)
        inside = (columns >= final[:, None]) & (columns < stops[:, None])
        place = active[:, None] * self.width + columns.clamp(max=self.width - 1)  # [A, S]
        written = inside & self.open.flatten()[place]
        known = self.text[on_device(self.text, active)]  # [A, W]
        self.predictor.enter(known, starts, widths, ~written)
        ordinals = self.segments.ordinals(starts, self.rows.passed[active])
        given, tails = self.job.given[active], self.job.tails[active]
        info = SegmentInfo(known, starts, lengths, given, tails)
        segment = Segment(
            self.predictor,
            self.family.process,
            self.family.schedule,
            canvas=self.text.flatten()[on_device(self.text, place)],
            frozen=~written,
            steps=self.config.steps,
            uniforms=_uniforms(self.seeds[active], self.numbers[active], ordinals, columns),
            controls=self.controls.within(info),
            ahead=self._ahead,
            discount=self.predictor.discount,
        )
        self.predictor.follow(segment.places)
        return Area(segment, active, place, written, torch.minimum(starts + widths, lengths))

    @property
    def _ahead(self) -> bool:
        """True where nothing but the rule reads what a call has changed."""
        return not (self.parts or self.controls.hooks or self.controls.constraint is not None)

    def _fill(self, area: "Area") -> Iterator[Step]:
        """Yield the steps of the rule on the active segments, as steps of all rows."""
        predictor = self.predictor
        calls, rows = predictor.calls - self.vain[0], predictor.rows - self.vain[1]
        for step in self._steps(area.segment):
            calls, rows = predictor.calls - self.vain[0], predictor.rows - self.vain[1]
            self.text = area.put(self.text, step.canvas)
            step = replace(
                step,
                index=self.index,
                calls=calls,
                rows=rows,
                final=self.rows.final.clone(),
                ends=self.rows.final.index_copy(0, area.active, area.ends),
                done=self.rows.done.clone(),
            )
            yield area.step_of_all(step, self.text, self.lengths)
            self.index += 1
        # Whether a call is queued too much depends on how far the device is: it is not counted.
        self.vain = predictor.calls - calls, predictor.rows - rows

    def _steps(self, segment: Segment) -> Iterator[Step]:
        """Yield the steps of the rule, with the parts that were asked for."""
        if not self.parts:
            yield from self.rule(segment)
            return
        watch = Watch(segment.denoise, segment.process, segment.places, self.parts)
        for step in self.rule(replace(segment, denoise=watch)):
            yield watch.fill(step)


@dataclass(frozen=True)
class Area:
    """The segments of the active rows within the texts of all rows.

    Attributes:
        segment: what the rule fills.
        active: [A] row in each slot.
        place: [A, S] place of each canvas position in the flat texts.
        written: [A, S] bool, positions that the rule may write.
        ends: [A] tokens up to the end of each segment.
    """

    segment: Segment
    active: Tensor
    place: Tensor
    written: Tensor
    ends: Tensor

    def put(self, text: Tensor, canvas: Tensor) -> Tensor:
        """Return new texts with the written positions of a canvas at their places."""
        source, place = self.moves
        return text.flatten().index_copy(0, place, canvas.flatten()[source]).view_as(text)

    @cached_property
    def moves(self) -> tuple[Tensor, Tensor]:
        """[N] written positions in the flat canvas, and in the flat texts, on their device."""
        source = self.written.flatten().nonzero().squeeze(1)
        canvas = self.segment.canvas
        return on_device(canvas, source), on_device(canvas, self.place.flatten()[source])

    def step_of_all(self, step: Step, text: Tensor, lengths: Tensor) -> Step:
        """Return a step of the segments as one of all rows, each up to its end."""
        (rows, room), width = text.shape, int(lengths.max())
        at = self.place.flatten()

        def outside(positions: Tensor) -> tuple[Tensor, Tensor]:
            """Return flat positions in [R, width], and which of the arguments they are."""
            row, column = at[positions] // room, at[positions] % room
            inside = column < lengths[row]
            return (row * width + column)[inside], inside

        t = torch.zeros(rows, dtype=step.t.dtype).index_copy(0, self.active, step.t)  # [R]
        draft = None if step.draft is None else self.put(text, step.draft)[:, :width]
        read = partial(step.moved, outside)
        return replace(step, t=t, canvas=text[:, :width], draft=draft, read=read)


def _uniforms(seeds: Tensor, numbers: Tensor, ordinals: Tensor, columns: Tensor) -> Uniforms:
    """Return the uniforms of one segment, keyed by what each is for."""

    @lru_cache(maxsize=2)  # rules read the same ones call after call
    def draw(stream: Stream, step: int) -> Tensor:
        return uniforms(
            seeds, stream, row=numbers, block=ordinals[:, None], step=step, position=columns
        )

    return draw
