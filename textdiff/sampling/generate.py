"""The block loop: prompts become canvases, and a decoding rule fills them segment by segment.

Rows are active in slots, together but each at a segment of its own; a row that is done leaves at
the end of its segment and a waiting one takes its slot. What a row becomes does not depend on its
company: its uniforms are keyed by its index in the job, and it sees nothing of the others.
"""

from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.randomness import Stream, signed, uniforms
from textdiff.errors import ConfigError
from textdiff.models import TextDiffusionModel
from textdiff.sampling.approximate import ApproximateDenoiser
from textdiff.sampling.context import Scene
from textdiff.sampling.controls import Controls
from textdiff.sampling.denoiser import CachedDenoiser, Denoiser, Predictor
from textdiff.sampling.guidance import Guided, check_guidance
from textdiff.sampling.job import Job, Segments
from textdiff.sampling.rules import Rule, build_rule
from textdiff.sampling.segment import Segment, Step, Uniforms
from textdiff.sampling.watch import Watch

Cache = bool | Literal["approximate"]
"""Whether keys and values are kept, which in blocks is exact; of a full canvas it never is."""


@torch.no_grad()
def generate(
    model: TextDiffusionModel,
    family: Family,
    job: Job,
    *,
    rule: str,
    steps: int,
    controls: Controls,
    knobs: Mapping[str, Any] | None = None,
    slots: int | None = None,
    cache: Cache = False,
    window: int | None = None,
    stride: int | None = None,
    guidance: float = 0.0,
    parts: Collection[str] = (),
) -> Generator[Step, None, Tensor]:
    """Generates rows, yielding the canvas of the whole job after every network call of a rule.

    Args:
        model: the network, in evaluation mode.
        family: process, schedule, objective and block size.
        job: prompts, lengths and seed.
        rule: name of a decoding rule.
        steps: denoising steps per segment.
        controls: how the law of tokens departs from the model's.
        knobs: the rule's own settings.
        slots: rows that are active together; None: all.
        cache: whether to keep keys and values of finished blocks, which changes nothing but speed;
            "approximate": for full-sequence models, those of what is final when a segment begins.
        window: for models in blocks, tokens before a block that it sees, a multiple of the block
            size; None: all, beyond what the model was trained on too. With a cache a window is an
            approximation: what is seen has itself seen what no longer is.
        stride: for full-sequence models, tokens per segment once a row is longer than the context;
            None: half the context.
        guidance: weight of classifier-free guidance, away from what the network would write without
            the given tokens; other weights than 0 take two network calls.
        parts: optional parts of steps to fill, of `watch.PARTS`; no token depends on it.

    Yields:
        Steps whose canvas [R, W] and positions are those of the whole job, what is not begun being
        noise; `t` is 0 for rows that are not active, `final` counts the tokens of each row that
        were final before the step's segments, `ends` where these end.

    Returns:
        [R] tokens of each row.

    Raises:
        ConfigError: unknown rule or knob, a number out of range, or a cache that would not be
            exact.
        CheckpointError: the network's output is not finite.
    """
    chosen = build_rule(rule, family, knobs)
    if steps < 1:
        raise ConfigError(f"{steps} denoising steps: give at least 1")
    lengths = job.lengths
    segments = Segments.of(family.block_size, model.config.max_position_embeddings, stride)
    room = segments.room(lengths)
    rows = Rows.of(job, slots)
    check_guidance(guidance, family)
    denoise = _predictor(model, family, rows.slots, room, cache, window)
    if guidance:
        ignorant = _predictor(model, family, rows.slots, room, cache, window)
        denoise = Guided(denoise, ignorant, job.given, guidance)
    text = _prior(model, family, job, room)
    seeds, numbers = _keys(job)
    # What lies behind the end of a row is noise that stays where noise is a mask; tokens are drawn
    # there like everywhere, and not looked at.
    ends = lengths if not family.process.replaces_tokens else torch.full_like(lengths, room)
    open_ = torch.nn.functional.pad(~job.given, (0, room - job.given.shape[1]), value=True)
    index = 0
    while rows.active or rows.waiting:
        new = rows.admit()
        if new:
            denoise.admit(text[_on(text, new)], rows.final[new])
        active = torch.tensor(rows.active)
        starts, widths = segments.next(rows.final[active], lengths[active])
        columns = starts[:, None] + torch.arange(int(widths.max()))  # [A, S], in the text
        stops = torch.minimum(starts + widths, ends[active])[:, None]
        here = (columns >= rows.final[active, None]) & (columns < stops)
        place = active[:, None] * room + columns.clamp(max=room - 1)  # [A, S], in the flat text
        here = here & open_.flatten()[place]
        known = text[_on(text, active)]
        denoise.enter(known, starts, widths, ~here)
        ordinals = segments.ordinals(starts, rows.passed[active])
        behind = torch.minimum(starts + widths, lengths[active])
        segment = Segment(
            denoise,
            family.process,
            family.schedule,
            canvas=text.flatten()[_on(text, place)],
            frozen=~here,
            steps=steps,
            uniforms=_uniforms(seeds[active], numbers[active], ordinals, columns),
            controls=controls.within(_scene(job, active, known, starts)),
        )
        for step in _walk(chosen, segment, parts):
            text = _put(text, place[here], step.canvas, here)
            inside = replace(
                step,
                index=index,
                calls=denoise.calls,
                rows=denoise.rows,
                final=rows.final.clone(),
                ends=rows.final.index_copy(0, active, behind),
                done=rows.done.clone(),
            )
            yield _whole(inside, text, active, place, here, lengths)
            index += 1
        denoise.check()
        gone = rows.advance(behind, text)
        if gone:
            denoise.keep(rows.leave(gone))
    return rows.final


@dataclass
class Rows:
    """Who is waiting, who is active, and how far everyone is.

    Attributes:
        job: what is to be generated.
        slots: rows that are active together, at most.
        waiting: rows that have not begun, in order.
        active: the row in each slot.
        final: [R] tokens of each row that will not change.
        passed: [R] segments that each row has finished.
        done: [R] bool, rows that are as long as they become.
    """

    job: Job
    slots: int
    waiting: deque[int]
    active: list[int]
    final: Tensor
    passed: Tensor
    done: Tensor

    @classmethod
    def of(cls, job: Job, slots: int | None) -> "Rows":
        """Everyone waiting."""
        count = len(job.prompts)
        final = job.onwards[:, 0].clone()
        room = count if slots is None else max(1, min(slots, count))
        done = torch.zeros(count, dtype=torch.bool)
        return cls(job, room, deque(range(count)), [], final, torch.zeros_like(final), done)

    def admit(self) -> list[int]:
        """Gives free slots to waiting rows, and says to which."""
        new = [
            self.waiting.popleft()
            for _ in range(min(len(self.waiting), self.slots - len(self.active)))
        ]
        self.active += new
        return new

    def advance(self, ends: Tensor, text: Tensor) -> list[int]:
        """The active rows have finished their segments, up to `ends`.

        Returns:
            Slots whose rows are done: as long as wanted, or with an end in their open end.
        """
        active = torch.tensor(self.active)
        tails = self.job.tails[active]
        fresh = ends - torch.maximum(self.final[active], tails)
        self.final[active] = ends = self.job.onwards[active, ends]
        self.passed[active] += 1
        done = (ends >= self.job.lengths[active]).tolist()
        if self.job.ended is not None:
            tokens = text[_on(text, active)].tolist()  # one synchronisation per segment
            spans = zip(tails.tolist(), ends.tolist(), fresh.tolist(), strict=True)
            for slot, (tail, end, new) in enumerate(spans):
                done[slot] = done[slot] or (new > 0 and self.job.ended(tokens[slot][tail:end], new))
        gone = [slot for slot, is_done in enumerate(done) if is_done]
        self.done[[self.active[slot] for slot in gone]] = True
        return gone

    def leave(self, slots: list[int]) -> list[int]:
        """Frees slots; the last rows move into the gaps.

        Returns:
            Which slot each row that stays was in.
        """
        gone = set(slots)
        staying = [slot for slot in range(len(self.active)) if slot not in gone]
        order = list(range(len(staying)))
        moving = [slot for slot in staying if slot >= len(staying)]
        for gap in sorted(gone.intersection(order)):
            order[gap] = moving.pop()
        self.active = [self.active[slot] for slot in order]
        return order


def _predictor(
    model: TextDiffusionModel,
    family: Family,
    slots: int,
    room: int,
    cache: Cache,
    window: int | None,
) -> Predictor:
    """What runs the network."""
    if cache not in (True, False, "approximate"):
        raise ConfigError(f"cache {cache!r}: give True, False or 'approximate'")
    size = family.block_size
    if window is not None and (size is None or window < size or window % size):
        raise ConfigError(
            f"window {window}: "
            + (
                "a full-sequence model always sees its whole context; give a stride instead"
                if size is None
                else f"give a multiple of the block size, {size}"
            )
        )
    if not cache:
        return Denoiser(model, family, window=window)
    if size is None:
        if cache == "approximate":
            return ApproximateDenoiser(model, family, slots, room)
        raise ConfigError(
            "a cache of a full-sequence model would be an approximation: every token sees all "
            "others, so what a finished one computes changes with each new token; generate without "
            "a cache, accept that with --cache approximate (cache='approximate' in Python), or "
            "train in blocks (diffusion.block_size)"
        )
    if cache == "approximate":
        raise ConfigError(
            "the cache of a model in blocks is exact, as finished tokens see nothing later: use "
            "--cache on (cache=True in Python); an approximate one is for full-sequence models"
        )
    return CachedDenoiser(model, family, slots, room, window)


def _prior(model: TextDiffusionModel, family: Family, job: Job, room: int) -> Tensor:
    """[R, W] what is given, and noise elsewhere."""
    seeds, numbers = _keys(job)
    u = uniforms(seeds, Stream.PRIOR, row=numbers, position=torch.arange(room))
    text = family.on_cpu.process.prior((len(job.prompts), room), u)
    text[:, : job.given.shape[1]][job.given] = torch.tensor(
        [token for prompt in job.prompts for token in prompt if token is not None],
        dtype=torch.int64,
    )
    return text.to(model.device)


def _keys(job: Job) -> tuple[Tensor, Tensor]:
    """[R, 1] seed of each row, and [R, 1] its index under that seed."""
    seeds, numbers = zip(*job.row_keys, strict=True)
    return torch.tensor([signed(seed) for seed in seeds])[:, None], torch.tensor(numbers)[:, None]


def _scene(job: Job, active: Tensor, text: Tensor, starts: Tensor) -> Scene:
    """What controls are told of a segment."""
    return Scene(
        text=text,
        starts=starts,
        lengths=job.lengths[active],
        given=job.given[active],
        tails=job.tails[active],
    )


def _walk(rule: Rule, segment: Segment, parts: Collection[str]) -> Iterator[Step]:
    """Yield the steps of a rule on one segment, with the parts that were asked for."""
    if not parts:
        yield from rule(segment)
        return
    watch = Watch(segment.denoise, segment.process, segment.frozen, parts)
    for step in rule(replace(segment, denoise=watch)):
        yield watch.fill(step)


def _uniforms(seeds: Tensor, numbers: Tensor, ordinals: Tensor, columns: Tensor) -> Uniforms:
    """The numbers of one segment, keyed by what each is for."""

    @lru_cache(maxsize=2)  # rules read the same ones call after call
    def draw(stream: Stream, step: int) -> Tensor:
        return uniforms(
            seeds, stream, row=numbers, block=ordinals[:, None], step=step, position=columns
        )

    return draw


def _on(like: Tensor, index: Tensor | Sequence[int]) -> Tensor:
    """An index where the tensor that it is for lies."""
    return torch.as_tensor(index, dtype=torch.int64).to(like.device)


def _put(text: Tensor, place: Tensor, canvas: Tensor, here: Tensor) -> Tensor:
    """The text with the open positions of a canvas at their places; a new tensor."""
    inside = canvas[here.to(canvas.device)]
    return text.flatten().index_copy(0, _on(text, place), inside).view_as(text)


def _whole(
    step: Step, text: Tensor, active: Tensor, place: Tensor, here: Tensor, lengths: Tensor
) -> Step:
    """A step of some segments as one of the whole job, of each row what belongs to it."""
    (rows, room), width = text.shape, int(lengths.max())
    at = place.flatten()

    def outside(positions: Tensor) -> tuple[Tensor, Tensor]:
        """Flat positions in [R, width], and which of those given they are."""
        row, column = at[positions] // room, at[positions] % room
        inside = column < lengths[row]
        return (row * width + column)[inside], inside

    changed, kept = outside(step.changed)
    t = torch.zeros(rows, dtype=step.t.dtype).index_copy(0, active, step.t)
    draft = None if step.draft is None else _put(text, place[here], step.draft, here)
    return replace(
        step,
        t=t,
        canvas=text[:, :width],
        changed=changed,
        draft=None if draft is None else draft[:, :width],
        confidence=None if step.confidence is None else step.confidence[kept],
        entropy=None if step.entropy is None else step.entropy[kept],
        remasked=None if step.remasked is None else outside(step.remasked)[0],
    )
