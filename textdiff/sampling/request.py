"""Requests: rows to generate, and how; prompts and options become one without the network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerFast

from textdiff.checks import checked_texts, one_or_more
from textdiff.data.tokenizer import end_id, token_bytes
from textdiff.diffusion.family import Family
from textdiff.errors import ConfigError
from textdiff.models import Denoiser
from textdiff.sampling.constraints import Constraint
from textdiff.sampling.constraints.pattern import Pattern, build_pattern
from textdiff.sampling.controls import NEUTRAL, Controls, Hook
from textdiff.sampling.guidance import check_guidance
from textdiff.sampling.job import ContextLimit, Job
from textdiff.sampling.rules import build_rule
from textdiff.sampling.settings import SamplingConfig
from textdiff.sampling.template import ParsedPrompt, parse_prompts

Prompts = str | ParsedPrompt | Sequence[str] | Sequence[ParsedPrompt]


@dataclass(frozen=True)
class Request:
    """Rows to generate, and how.

    Attributes:
        job: the rows as tokens, with their seeds.
        config: rule, steps, temperature, ...
        hooks: the user's own functions of log-weights; see `controls.Hook`.
        constraint: what generated text has to look like; None: anything.
        end_tokens: tokens that end a text: end-of-text, and those that end a turn of a
            conversation; as far as the model draws them.
        lost: what the model does not see of the prompts as it is written, in sentences.
    """

    job: Job
    config: SamplingConfig = NEUTRAL
    hooks: tuple[Hook, ...] = ()
    constraint: Constraint | None = None
    end_tokens: tuple[int, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def controls(self) -> Controls:
        """Departures of the drawing distribution from the model's."""
        return Controls(
            self.config,
            hooks=self.hooks,
            constraint=self.constraint,
            end_tokens=self.end_tokens,
        )

    def rows(self, start: int, stop: int) -> "Request":
        """Return the request of the rows from `start` to before `stop`."""
        return replace(self, job=self.job.part(start, stop))

    @classmethod
    def joined(cls, requests: "Sequence[Request]") -> "Request":
        """Return the rows of several requests, which differ by their jobs alone, as one."""
        return replace(requests[0], job=Job.joined([request.job for request in requests]))


class Preparer:
    """Builder of requests for one model.

    Args:
        model: the network.
        family: process, schedule, objective and block size.
        tokenizer: encodes prompts.
    """

    def __init__(self, model: Denoiser, family: Family, tokenizer: PreTrainedTokenizerFast):
        self.model, self.family, self.tokenizer = model, family, tokenizer
        self.clean = family.process.vocabulary.clean.cpu()  # [V]

    def parse(
        self, prompts: Prompts, suffix: str | Sequence[str] | None, num_samples: int
    ) -> list[ParsedPrompt]:
        """Return the fixed text of every row.

        Args:
            prompts: one or several beginnings, or templates, or what was parsed before.
            suffix: what follows each, or all of them.
            num_samples: rows per prompt.

        Raises:
            ConfigError: no rows, not as many suffixes as prompts, a suffix to a conversation, or a
                hole without a length.
            DataError: a prompt that is not a string, or has characters that the tokenizer was not
                trained on.
        """
        if num_samples < 1:
            raise ConfigError(f"num_samples {num_samples}: give at least 1", code="no_rows")
        read = [prompts] if isinstance(prompts, ParsedPrompt) else prompts
        if isinstance(read, list | tuple) and read and isinstance(read[0], ParsedPrompt):
            return [prompt for prompt in _parsed(read, suffix) for _ in range(num_samples)]
        texts = one_or_more(read, "prompts")
        if suffix is None or isinstance(suffix, str):
            suffix = [suffix or ""] * len(texts)
        suffixes = checked_texts(suffix, "suffix")
        if len(suffixes) != len(texts):
            raise ConfigError(
                f"{len(suffixes)} suffixes for {len(texts)} prompts: give one for all, or one for "
                "each",
                code="not_one_suffix_each",
            )
        parsed = parse_prompts(self.tokenizer, texts, suffixes, self.clean)
        return [prompt for prompt in parsed for _ in range(num_samples)]

    def request(
        self,
        job: Job,
        config: SamplingConfig,
        hooks: Sequence[Hook] = (),
        constraint: Constraint | None = None,
        lost: Sequence[str] = (),
        ends: Sequence[int] = (),
    ) -> Request:
        """Return a request for rows.

        Args:
            job: the rows.
            config: rule, steps, ...
            hooks: the user's own; see `controls.Hook`.
            constraint: the user's own; None: that of the config.
            lost: what the model does not see of the prompts, in sentences.
            ends: tokens that end a text besides the end-of-text token.

        Raises:
            ConfigError: options that do not fit the family or the rows.
        """
        build_rule(config.rule, self.family, config.knobs)
        check_guidance(config.guidance, self.family)
        if config.stop and bool((job.tails == job.lengths).all()):
            raise ConfigError(
                "stop strings end a text in the hole that nothing follows, and here fixed text "
                "follows every hole; leave the stop strings out"
            )
        if constraint is None and (config.regex is not None or config.ban or config.force):
            constraint = self._pattern(
                config.regex, config.ban, config.force, config.min_new_tokens
            )
        if constraint is not None:
            constraint.check(job)
        drawn = [end_id(self.tokenizer, self.clean), *(end for end in ends if self.clean[end])]
        end_tokens = tuple(dict.fromkeys(end for end in drawn if end is not None))
        lost = tuple(dict.fromkeys(lost))
        return Request(job, config, tuple(hooks), constraint, end_tokens, lost)

    @cached_property
    def _pattern(
        self,
    ) -> Callable[[str | None, tuple[str, ...], tuple[str, ...], int], Pattern]:
        """Maker of the pattern of a regex, bans and forced strings; it keeps the last ones.

        One takes seconds at 50,000 tokens, and the lines of a file mostly share theirs.
        """
        tokens = token_bytes(self.tokenizer)
        tokens += [None] * (len(self.clean) - len(tokens))
        spelled = [t if ok else None for t, ok in zip(tokens, self.clean.tolist(), strict=True)]
        end = end_id(self.tokenizer, self.clean)

        @lru_cache(maxsize=16)
        def pattern(
            regex: str | None, ban: tuple[str, ...], force: tuple[str, ...], least: int
        ) -> Pattern:
            return build_pattern(regex, ban, spelled, end, least, self.model.device, force)

        return pattern


def _parsed(prompts: Any, suffix: object) -> Sequence[ParsedPrompt]:
    """Return prompts that were parsed before.

    Raises:
        ConfigError: one was not, or there is a suffix, which none of them has.
    """
    if suffix or not all(isinstance(prompt, ParsedPrompt) for prompt in prompts):
        raise ConfigError(
            "prompts of conversations take no suffix, and no plain prompts beside them; leave them "
            "out",
            code="not_a_conversation_alone",
        )
    checked: Sequence[ParsedPrompt] = prompts
    return checked


def make_job(
    prompts: Sequence[ParsedPrompt], config: SamplingConfig, limit: ContextLimit, explicit: bool
) -> Job:
    """Return the rows of prompts, with room for what is generated.

    Args:
        prompts: the fixed text of each row.
        config: `max_new_tokens` and `stride` matter here.
        limit: what the network sees at once.
        explicit: whether the length was asked for; one by default shrinks to what the context
            leaves, if that is anything.

    Raises:
        ConfigError: too much, or fixed text that would not be seen.
    """
    rows: list[tuple[int | None, ...]] = []
    new_tokens: list[int] = []
    for prompt in prompts:
        if prompt.template:
            _check_template(prompt, limit)
        new = 0 if prompt.template else _new_tokens(prompt, config, limit, explicit)
        hole = [None] * new if prompt.suffix else []
        rows.append((*prompt.tokens, *hole, *prompt.suffix))
        new_tokens.append(0 if prompt.suffix else new)
    return Job(rows, new_tokens)


def _new_tokens(
    prompt: ParsedPrompt, config: SamplingConfig, limit: ContextLimit, explicit: bool
) -> int:
    """Return the tokens to generate after a prompt, and before its suffix if it has one.

    Raises:
        ConfigError: fixed text that would not be seen.
    """
    given, wanted = len(prompt.tokens) + len(prompt.suffix), config.max_new_tokens
    sliding = config.stride is not None and not prompt.suffix
    if limit.block_size is None and given >= limit.context and not sliding:
        what = "prompt and suffix" if prompt.suffix else "a prompt"
        raise ConfigError(
            f"{what} of {given} tokens fill{'' if prompt.suffix else 's'} the model's context of "
            f"{limit.context} tokens and leave{'' if prompt.suffix else 's'} none to generate; "
            + (
                "shorten them"
                if prompt.suffix
                else "shorten the prompt, or give a stride: the text then goes on from the end of "
                "the prompt, the beginning of which is not seen"
            ),
            code="no_room",
        )
    room = limit.context - given
    new = min(wanted, room) if room > 0 and not explicit else wanted
    if prompt.suffix and limit.block_size is None and new > room:
        raise ConfigError(
            f"prompt and suffix take {given} of the {limit.context} tokens that the model sees at "
            f"once, which leaves {room} to generate, not {wanted}; give fewer max_new_tokens",
            code="too_little_room",
        )
    return new


def _check_template(prompt: ParsedPrompt, limit: ContextLimit) -> None:
    """Refuse a template that a full-sequence model would not see as a whole.

    Raises:
        ConfigError: with its length.
    """
    length = len(prompt.tokens)
    if limit.block_size is not None or length <= limit.context:
        return
    runs = [list(run) for open_, run in groupby(prompt.tokens, key=lambda t: t is None) if open_]
    longest = max(map(len, runs))
    what = f"a hole of {longest}" if longest > limit.context else f"a template of {length}"
    raise ConfigError(
        f"{what} tokens is longer than the model's context of {limit.context} tokens; a "
        "full-sequence model has to see all of it at once: shorten it, or use a model in blocks",
        code="template_too_long",
    )
