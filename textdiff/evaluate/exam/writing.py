"""Generated answers: settings of their texts, and room for them in a network's context."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textdiff.data.encode import Ids
from textdiff.evaluate.exam.answered import WrittenAnswer
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.callbacks import RowReader
from textdiff.sampling.job import Job
from textdiff.sampling.request import Preparer, Request
from textdiff.sampling.rules import build_rule
from textdiff.sampling.settings import SamplingConfig

Progress = Callable[[int], None]


@dataclass(frozen=True)
class WritingRequest:
    """An answer to write.

    Attributes:
        ids: [n] int32 tokens of its context.
        key: number of its random numbers.
        tokens: most tokens of the answer.
        options: those of `SamplingConfig` that it takes, by name.
    """

    ids: Ids
    key: int
    tokens: int
    options: Mapping[str, Any]

    @property
    def content(self) -> tuple[bytes, int, int, str]:
        """Everything that its answer depends on."""
        return self.ids.tobytes(), self.key, self.tokens, repr(sorted(self.options.items()))

    def room(self, context: int) -> tuple[int, int]:
        """Return the tokens of its context that are read and those that are written.

        An answer gives way until half of the network's context is left to the question, which then
        loses its beginning.
        """
        asked = min(len(self.ids), context - 1)
        new = max(1, min(self.tokens, context - min(asked, context // 2)))
        return min(asked, context - new), new


class AnswerWriter:
    """Writer of answers by one model.

    Args:
        model: the model.
        options: those of `SamplingConfig` that take the place of a task's own.
        seed: seed of all texts.
        batch_size: texts that are written together.

    Attributes:
        ends: tokens that end a text besides the end-of-text token.
    """

    def __init__(
        self, model: TextDiffusion, options: Mapping[str, Any], seed: int, batch_size: int
    ):
        self.model, self.seed, self.batch_size = model, seed, batch_size
        self.options = {k: v for k, v in options.items() if v is not None}
        self.ends: Sequence[int] = ()
        self.preparer = Preparer(model.model, model.family, model.tokenizer)
        self.config({})  # what does not fit the model is refused before anything is scored

    def config(self, task: Mapping[str, Any]) -> SamplingConfig:
        """Return the settings of texts: the command line's before a task's, before the model's.

        Raises:
            ConfigError: a value out of range, or a rule that does not fit the model.
        """
        stops = (*self.options.get("stop", ()), *task.get("stop", ()))
        config = self.model.defaults.merge(**{**task, **self.options, "stop": stops})
        build_rule(config.rule, self.model.family, config.knobs)
        return config

    def write(
        self, requests: Sequence[WritingRequest], progress: Progress = lambda count: None
    ) -> list[WrittenAnswer]:
        """Return the answers to requests, each cut before its first stop string.

        Raises:
            ConfigError: an option out of range.
        """
        groups = defaultdict(list)
        for index, request in enumerate(requests):
            groups[request.content[-1]].append(index)
        written: dict[int, WrittenAnswer] = {}
        for which in groups.values():
            config = self.config(requests[which[0]].options)
            order = sorted(which, key=lambda i: (len(requests[i].ids), i))
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                texts = self._write([requests[i] for i in batch], config)
                written |= dict(zip(batch, texts, strict=True))
                progress(len(batch))
        return [written[index] for index in range(len(requests))]

    def _write(
        self, requests: Sequence[WritingRequest], config: SamplingConfig
    ) -> list[WrittenAnswer]:
        limit = self.options.get("max_new_tokens")
        rooms = [
            WritingRequest(r.ids, r.key, limit or r.tokens, r.options).room(self.model.context)
            for r in requests
        ]
        pairs = list(zip(requests, rooms, strict=True))
        rows = [r.ids[len(r.ids) - read :].tolist() for r, (read, _) in pairs]
        keys = [(self.seed, r.key) for r in requests]
        ended = RowReader(self.model.tokenizer).ending(config.stop, self.ends)
        job = Job(rows, [new for _, new in rooms], keys=keys, ended=ended)
        request: Request = self.preparer.request(job, config, ends=self.ends)
        drawn = self.model.run(request, self.batch_size)
        calls = drawn.row_calls / len(rows)
        return [
            WrittenAnswer(text, read < len(r.ids), new < (limit or r.tokens), calls)
            for text, (r, (read, new)) in zip(drawn.completions, pairs, strict=True)
        ]
