"""Generated answers: greedy ones that are compared with a given answer, and free ones."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from textdiff.data.encode import Ids
from textdiff.evaluate.exam.answer_tokens import AnswerTokens
from textdiff.evaluate.exam.answers import WrittenAnswer
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.callbacks import RowReader
from textdiff.sampling.engine import Engine
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
    """

    def __init__(
        self, model: TextDiffusion, options: Mapping[str, Any], seed: int, batch_size: int
    ):
        self.model, self.seed, self.batch_size = model, seed, batch_size
        self.options = {k: v for k, v in options.items() if v is not None}
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

    def greedy_matches(
        self, answers: Sequence[AnswerTokens], progress: Progress = lambda count: None
    ) -> list[bool]:
        """Return whether decoding at temperature 0 writes each answer after its context.

        Rule and steps are those of all texts. A batch ends as soon as all its rows differ from
        their answers, if the rule does not change tokens that it has written.
        """
        config = self.config({}).merge(temperature=0.0, stop=())
        matches = [False] * len(answers)
        order = sorted(range(len(answers)), key=lambda i: (len(answers[i].ids), i))
        for start in range(0, len(order), self.batch_size):
            which = order[start : start + self.batch_size]
            batch = [answers[i] for i in which]
            for index, match in zip(which, self._matches(batch, config), strict=True):
                matches[index] = match
            progress(len(which))
        return matches

    def _matches(self, answers: Sequence[AnswerTokens], config: SamplingConfig) -> list[bool]:
        rows = [answer.ids[: answer.start].tolist() for answer in answers]
        keys = [(self.seed, answer.question) for answer in answers]
        counts = [len(answer.ids) - answer.start for answer in answers]
        request = self.preparer.request(Job(rows, counts, keys=keys), config)
        family, model = self.model.family, self.model.model
        revises = build_rule(config.rule, family, config.knobs).revises
        settled = not (revises or family.process.replaces_tokens)
        width = max(len(answer.ids) for answer in answers)
        mask = family.process.vocabulary.mask_token_id
        wanted = torch.full((len(answers), width), mask)  # [R, W]
        for row, answer in zip(wanted, answers, strict=True):
            row[: len(answer.ids)] = torch.from_numpy(answer.ids)
        for step in Engine(model, family, request).run():
            canvas = step.canvas[:, :width].cpu()
            wrong = ((canvas != wanted) & (wanted != mask)).any(1)  # [R], masks are wrong so far
            differs = ((canvas != wanted) & (canvas != mask) & (wanted != mask)).any(1)  # [R]
            if settled and bool(differs.all()):
                break
        return (~wrong).tolist()

    def write(
        self, requests: Sequence[WritingRequest], progress: Progress = lambda count: None
    ) -> list[WrittenAnswer]:
        """Return the answers to requests, each cut before its first stop string.

        Raises:
            ConfigError: an option out of range.
        """
        groups = defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(sorted(request.options.items()))].append(index)
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
        rows = [r.ids[len(r.ids) - read :].tolist() for r, (read, _) in zip(requests, rooms, strict=True)]
        keys = [(self.seed, r.key) for r in requests]
        reader = RowReader(self.model.tokenizer)
        ended = reader.ending(config.stop)
        job = Job(rows, [new for _, new in rooms], keys=keys, ended=ended)
        request: Request = self.preparer.request(job, config)
        texts = self.model.run(request, self.batch_size).completions
        return [
            WrittenAnswer(text, read < len(r.ids), new < (limit or r.tokens))
            for text, r, (read, new) in zip(texts, requests, rooms, strict=True)
        ]
