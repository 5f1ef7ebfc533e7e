"""What a generation is asked for, and what comes out of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.data.texts import checked_texts, one_or_more
from textdiff.errors import ConfigError
from textdiff.export.loading import read_json
from textdiff.sampling import Constraint, Controls, Hook, Job, Step
from textdiff.template import MOST_TOKENS, Form, forms_of
from textdiff.watching import FinishedRow, Watcher
from textdiff.whole_numbers import whole_number

MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class SampleDefaults:
    """What `generate` does unless told otherwise, as `generation_config.json` holds it.

    Attributes:
        rule: decoding rule.
        knobs: the rule's own settings by name; another rule does not take them over.
        max_denoising_steps: steps per block.
        max_new_tokens: tokens to generate.
        temperature: 0 takes the most likely token; "0.8:0.4" falls from the first to the second.
        top_k: draw among the k most likely tokens.
        top_p: draw among this much probability.
        min_p: draw among tokens at least this share as likely as the likeliest.
        repetition_penalty: makes tokens that the row has already less likely; 1: none.
        min_new_tokens: tokens of an open end before the end-of-text token may be.
        guidance: weight of classifier-free guidance by what is given; 0: none.
        regex: pattern that the text of every hole matches; None: any text. Its texts are not
            distributed as the model's own that match.
        ban: strings that no hole holds.
        force: strings that every hole holds.
        window: tokens before a block that it sees, a multiple of the block size; None: all of texts
            no longer than the context, and beyond as many as in training; 0: all.
        stride: tokens that a full-sequence model adds at a time beyond its context; None: half the
            context.
    """

    rule: str = "ancestral"
    knobs: Mapping[str, Any] = field(default_factory=dict)
    max_denoising_steps: int = 64
    max_new_tokens: int = 128
    temperature: float | str = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    guidance: float = 0.0
    regex: str | None = None
    ban: Sequence[str] = ()
    force: Sequence[str] = ()
    window: int | None = None
    stride: int | None = None

    @classmethod
    def read(cls, path: Path) -> "SampleDefaults":
        """Reads an export's file; keys that are not ours are left alone."""
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in read_json(path).items() if key in known}
        for key in ("ban", "force"):
            texts = given.get(key) or ()
            given[key] = (texts,) if isinstance(texts, str) else tuple(texts)
        return cls(**given)

    def changed(self, options: Mapping[str, Any]) -> "SampleDefaults":
        """The same with some fields changed; None keeps a default, `steps` is for short.

        Raises:
            ConfigError: there is no such field.
        """
        given = {key: value for key, value in options.items() if value is not None}
        if "steps" in given:
            given["max_denoising_steps"] = given.pop("steps")
        known = {f.name for f in fields(self)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
        if given.get("rule", self.rule) != self.rule:
            given.setdefault("knobs", {})
        return replace(self, **_plain(given))


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with plain numbers, whichever library they come from.

    Raises:
        ConfigError: no whole number where one is wanted.
    """
    found = dict(options)
    hints = get_type_hints(SampleDefaults)
    for name, value in options.items():
        if hints[name] in (int, int | None):
            said = "steps" if name == "max_denoising_steps" else name
            found[name] = whole_number(said, value)
        elif name == "knobs" and isinstance(value, Mapping):
            found[name] = {k: v.item() if hasattr(v, "item") else v for k, v in value.items()}
    return found


@dataclass(frozen=True)
class Generation:
    """Finished rows.

    Attributes:
        texts: each row whole, special tokens removed.
        completions: what follows the prompt, up to the end-of-text token; of a row with given text
            between or after holes, all from its first hole to its last.
        holes: what was written into each hole of each row; a plain prompt has one, its completion.
        sequences: token ids of each row, given ones included.
        calls: network calls (of all active rows each).
        tokens_per_forward: tokens written per row and network call.
        lost: what the model did not see of the prompts as it is written, in sentences.
    """

    texts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    holes: list[list[str]] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    calls: int = 0
    tokens_per_forward: float = 0.0
    lost: tuple[str, ...] = ()

    def extended(self, rows: Iterable[FinishedRow], calls: int) -> "Generation":
        """The same with further rows, and the calls that they took."""
        rows = list(rows)
        return replace(
            self,
            texts=self.texts + [row.text for row in rows],
            completions=self.completions + [row.completion for row in rows],
            holes=self.holes + [row.holes for row in rows],
            sequences=self.sequences + [row.tokens for row in rows],
            calls=self.calls + calls,
        )


@dataclass(frozen=True)
class Order:
    """Rows to generate, and how.

    Attributes:
        job: the rows.
        settings: rule, steps, temperature, ...
        controls: how the law of tokens departs from the model's.
        stops: strings that end a text.
        lost: what the model does not see of the prompts as it is written, in sentences.
    """

    job: Job
    settings: SampleDefaults
    controls: Controls
    stops: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    @classmethod
    def joined(cls, orders: "Sequence[Order]") -> "Order":
        """The rows of several orders that are alike but for their jobs, as one."""
        return replace(orders[0], job=Job.joined([order.job for order in orders]))


def make_controls(
    settings: SampleDefaults,
    hooks: Sequence[Hook],
    constraint: Constraint | None,
    end_token: int | None,
) -> Controls:
    """How the law of tokens is to depart from the model's.

    Args:
        settings: temperature, truncation, penalty.
        hooks: the user's own; see `sampling.Hook`.
        constraint: what text has to look like.
        end_token: the end-of-text token.

    Raises:
        ConfigError: a value out of range.
    """
    return Controls(
        read_temperature(settings.temperature),
        settings.top_k,
        settings.top_p,
        settings.min_p,
        settings.repetition_penalty,
        end_token=end_token,
        min_new_tokens=settings.min_new_tokens,
        hooks=tuple(hooks),
        constraint=constraint,
    )


def read_temperature(value: float | str) -> float | tuple[float, float]:
    """A temperature, or two from `FIRST:LAST`.

    Raises:
        ConfigError: no number, or more than two.
    """
    try:
        numbers = tuple(float(part) for part in str(value).split(":"))
    except ValueError:
        numbers = ()
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise ConfigError(f"temperature {value}: give a number, or two as FIRST:LAST, such as 0.8:0.4")


def prompt_forms(
    tokenizer: PreTrainedTokenizerFast,
    prompts: str | Sequence[str],
    suffix: str | Sequence[str],
    num_samples: int,
    clean: Tensor,
) -> list[Form]:
    """What is given of every row of a generation.

    Args:
        tokenizer: the model's.
        prompts: one or several beginnings, or templates.
        suffix: what follows each, or all of them.
        num_samples: rows per prompt.
        clean: [V] bool, ids that the model can predict.

    Raises:
        ConfigError: no rows asked for, not as many suffixes as prompts, or a hole without a length.
        DataError: a prompt that is not a string, or has characters the tokenizer does not know.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples {num_samples}: give at least 1")
    texts = one_or_more(prompts, "prompts")
    suffix = "" if suffix is None else suffix
    suffixes = [suffix] * len(texts) if isinstance(suffix, str) else checked_texts(suffix, "suffix")
    if len(suffixes) != len(texts):
        raise ConfigError(
            f"{len(suffixes)} suffixes for {len(texts)} prompts: give one for all, or one for each"
        )
    forms = forms_of(tokenizer, texts, suffixes, clean)
    return [form for form in forms for _ in range(num_samples)]


@dataclass(frozen=True)
class Reach:
    """What a network sees at once.

    Attributes:
        context: tokens it was trained on.
        in_blocks: whether it writes in blocks, and sees all before them.
    """

    context: int
    in_blocks: bool


def make_job(
    forms: Sequence[Form],
    settings: SampleDefaults,
    model: Reach,
    first: int,
    seed: int,
    explicit: bool,
) -> Job:
    """The job of some rows.

    Args:
        forms: what is given of each.
        settings: `max_new_tokens` and `stride` matter here.
        model: what the network sees at once.
        first: index of the first row in the whole job.
        seed: seed of the whole job.
        explicit: whether the length was asked for; one by default shrinks to what the context
            leaves, if that is anything.

    Raises:
        ConfigError: nothing to generate, too much, or given text that would not be seen.
    """
    for name, most in (("max_new_tokens", MOST_TOKENS), ("max_denoising_steps", MOST_STEPS)):
        count, said = getattr(settings, name), "steps" if "steps" in name else name
        if count < 1:
            raise ConfigError(f"{said} {count}: give at least 1")
        if count > most:
            raise ConfigError(f"{said} {count}: give at most {most}")
    prompts: list[tuple[int | None, ...]] = []
    new_tokens: list[int] = []
    for form in forms:
        if form.template:
            _check_template(form, model)
            prompts.append(form.tokens)
            new_tokens.append(0)
            continue
        new = _new_tokens(form, settings, model, explicit)
        prompts.append((*form.tokens, *[None] * new, *form.suffix) if form.suffix else form.tokens)
        new_tokens.append(0 if form.suffix else new)
    return Job(prompts, new_tokens, first, seed)


def _new_tokens(form: Form, settings: SampleDefaults, model: Reach, explicit: bool) -> int:
    """Tokens to generate after a prompt, and before its suffix if it has one.

    Raises:
        ConfigError: given text that would not be seen.
    """
    given, wanted = len(form.tokens) + len(form.suffix), settings.max_new_tokens
    if not model.in_blocks and given >= model.context and (form.suffix or settings.stride is None):
        what = "prompt and suffix" if form.suffix else "a prompt"
        raise ConfigError(
            f"{what} of {given} tokens fill{'' if form.suffix else 's'} the model's context of "
            f"{model.context} tokens and leave{'' if form.suffix else 's'} none to generate; "
            + (
                "shorten them"
                if form.suffix
                else "shorten the prompt, or give a stride: the text then goes on from the end of "
                "the prompt, the beginning of which is not seen"
            )
        )
    room = model.context - given
    new = min(wanted, room) if room > 0 and not explicit else wanted
    if form.suffix and not model.in_blocks and new > room:
        raise ConfigError(
            f"prompt and suffix take {given} of the {model.context} tokens that the model sees at "
            f"once, which leaves {room} to generate, not {wanted}; give fewer max_new_tokens"
        )
    return new


def _check_template(form: Form, model: Reach) -> None:
    """Stops where a full-sequence model would not see all of a template.

    Raises:
        ConfigError: with its length.
    """
    length = len(form.tokens)
    if model.in_blocks or length <= model.context:
        return
    runs = [list(run) for open_, run in groupby(form.tokens, key=lambda t: t is None) if open_]
    longest = max(map(len, runs))
    what = f"a hole of {longest}" if longest > model.context else f"a template of {length}"
    raise ConfigError(
        f"{what} tokens is longer than the model's context of {model.context} tokens; a "
        "full-sequence model has to see all of it at once: shorten it, or use a model in blocks"
    )


class Feed(Watcher):
    """Hands one row to a transformers streamer: prompt, drafts, and what has become final.

    Args:
        streamer: with `put` and `end`, and `put_draft` if it shows drafts.
    """

    def __init__(self, streamer: Any):
        self.streamer = streamer
        self.shows_drafts = hasattr(streamer, "put_draft")
        self.parts = ("draft",) if self.shows_drafts else ()

    def begin(self, job: Job) -> None:
        """Puts the prompt.

        Raises:
            ConfigError: several rows.
        """
        if len(job.prompts) != 1:
            raise ConfigError(
                f"a streamer takes one row, not {len(job.prompts)}; generate one at a time"
            )
        prompt = job.leading(0)
        self.sent = len(prompt)
        self.streamer.put(torch.tensor(prompt, dtype=torch.int64))

    def step(self, step: Step) -> None:
        """Puts what has become final, and a draft of the segment being written."""
        assert step.final is not None
        assert step.ends is not None
        self._put_until(step.canvas[0].cpu(), int(step.final[0]))
        if self.shows_drafts:
            assert step.draft is not None
            self.streamer.put_draft(step.draft[0, self.sent : int(step.ends[0])].cpu())

    def finished(self, row: int, result: FinishedRow) -> None:
        """Puts what is left of the row."""
        self._put_until(torch.tensor(result.tokens, dtype=torch.int64), len(result.tokens))
        self.streamer.end()

    def _put_until(self, row: Tensor, final: int) -> None:
        if final > self.sent:
            self.streamer.put(row[self.sent : final])
            self.sent = final
