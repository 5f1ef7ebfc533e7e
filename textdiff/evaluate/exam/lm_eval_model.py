"""The model class of lm-evaluation-harness for textdiff, registered there as `textdiff`.

from textdiff.evaluate.exam.lm_eval_model import TextDiffusionLM
lm_eval.simple_evaluate(TextDiffusionLM("runs/quickstart/export"), tasks=["blimp"])

The harness has no entry points for models: an import of this module registers the class.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from textdiff import __version__
from textdiff.checks import whole_number
from textdiff.data.backend import serialize
from textdiff.data.conversations import Message
from textdiff.errors import ConfigError
from textdiff.evaluate.exam.answer_bounds import Effort, score_answers
from textdiff.evaluate.exam.answer_cache import AnswerCache, Computed
from textdiff.evaluate.exam.answer_tokens import (
    AnswerEncoder,
    AnswerRequest,
    AnswerTokens,
    noise_key,
)
from textdiff.evaluate.exam.answered import Answer, WholeText, WrittenAnswer
from textdiff.evaluate.exam.greedy import greedy_matches
from textdiff.evaluate.exam.shared_requests import SharedRequests
from textdiff.evaluate.exam.writing import AnswerWriter, WritingRequest
from textdiff.export.loading import cpu_only
from textdiff.likelihood.stopping import model_digest
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.chat import ChatReader
from textdiff.sampling.settings import SamplingConfig


@register_model("textdiff")
class TextDiffusionLM(TemplateLM):  # type: ignore[misc]
    """A text-diffusion model, as lm-evaluation-harness calls it.

    Processes of `accelerate launch` share its requests, and all of them have all answers. To the
    harness each is alone.

    Args:
        pretrained: the model, or its folder or hub id.
        batch_size: texts that are written together; `auto` is 16.
        device: torch device, where `pretrained` is a name.
        dtype: dtype of the network, where `pretrained` is a name.
        cache: file that answers are kept in; None: nowhere.
        **options: those of `Effort`, such as `mc`, and those of `SamplingConfig`, such as `rule`,
            which take the place of a task's own.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: an option that does not exist or does not fit the model, or an unusable cache.
    """

    def __init__(
        self,
        pretrained: str | TextDiffusion,
        *,
        batch_size: int | str = 16,
        device: str | None = None,
        dtype: str = "auto",
        cache: str | Path | None = None,
        **options: Any,
    ):
        super().__init__()
        options.pop("max_batch_size", None)  # the harness passes it to every model
        names = [each.name for each in fields(Effort)]
        self.effort = Effort(**{name: options.pop(name) for name in names if name in options})
        state = PartialState(cpu=cpu_only())
        place = device or (str(state.device) if state.num_processes > 1 else None)
        if not isinstance(pretrained, TextDiffusion):
            pretrained = TextDiffusion.from_pretrained(pretrained, place, dtype)
        self.held = pretrained
        self._device = self.held.model.device
        self.tokenizer = self.held.tokenizer
        self.encoder = AnswerEncoder(self.tokenizer, self.held.family.process.vocabulary.clean)
        rows = 16 if batch_size == "auto" else whole_number("batch_size", batch_size)
        self.writer = AnswerWriter(self.held, options, self.effort.seed, rows)
        answers = None
        if cache is not None and state.is_main_process:
            answers = AnswerCache(Path(cache), self._fingerprint())
        self.shared = SharedRequests(state, answers)

    def _fingerprint(self) -> str:
        """Return a hash of all that answers depend on besides their requests."""
        effort = (self.effort.mc, self.effort.precision, self.effort.seed)
        settings = (__version__, effort, sorted(self.writer.options.items()), self.held.defaults)
        model = model_digest(self.held.model, self.held.family)
        state = f"{model} {settings} {serialize(self.tokenizer)}"
        return hashlib.sha256(state.encode()).hexdigest()

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[Answer]:
        """Return the log-likelihood of continuations given contexts, and whether decoding has them.

        Raises:
            DataError: a continuation that has no likelihood.
        """
        wanted = []
        for request in requests:
            context, continuation = request.args
            key = (request.task_name, request.doc_id)
            named = key if request.doc_id is not None else (context,)
            name = f"task {key[0]}, question {key[1]}"
            wanted.append(AnswerRequest(name, noise_key(*named), context, continuation))
        return self._answered(self.encoder.answers(wanted), disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **more: Any,
    ) -> list[Answer]:
        """Return log-likelihoods of continuations that are tokens already."""
        answers = []
        for (_, text), before, after in requests:
            ids = np.array([*before, *after], np.int32)
            self.encoder.check(repr(text), ids, len(before))
            answers.append(AnswerTokens(noise_key(*before), ids, len(before), text))
        return self._answered(answers, disable_tqdm)

    def _answered(self, answers: Sequence[AnswerTokens], quiet: bool) -> list[Answer]:
        """Return the answers to requests; those of one question follow each other."""
        cut = [answer.within(self.held.context) for answer in answers]

        def compute(which: Sequence[int], progress: Callable[[int], Any]) -> list[Computed]:
            tokens = [cut[index] for index in which]
            draws = score_answers(self.held, tokens, self.effort)
            greedy = greedy_matches(self.writer, tokens)
            progress(len(which))
            pairs = zip(draws, greedy, strict=True)
            return [(drawn.values.numpy(), [drawn.exact, match]) for drawn, match in pairs]

        keys = [("answer", *answer.key) for answer in cut]
        questions = [answer.question for answer in cut]
        computed = self.shared.answers(keys, questions, compute, "scoring answers", quiet)
        return [
            Answer(draws, match, exact, answer.truncated, answer.lossy)
            for answer, (draws, (exact, match)) in zip(cut, computed, strict=True)
        ]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[WholeText]:
        """Return the log-likelihood of whole texts, in windows that follow each other.

        Raises:
            DataError: a text with characters that the model cannot predict.
        """
        texts = [request.args[0] for request in requests]
        wanted = [
            AnswerRequest(f"task {r.task_name}, text {r.doc_id}", noise_key(text), "", text)
            for r, text in zip(requests, texts, strict=True)
        ]
        answers = self.encoder.answers(wanted)

        def compute(which: Sequence[int], progress: Callable[[int], Any]) -> list[Computed]:
            drawn = score_answers(self.held, [answers[index] for index in which], self.effort)
            progress(len(which))
            return [(each.values.numpy(), [each.exact]) for each in drawn]

        keys = [("text", *answer.key) for answer in answers]
        questions = [answer.question for answer in answers]
        computed = self.shared.answers(keys, questions, compute, "scoring texts", disable_tqdm)
        return [
            WholeText(draws, exact, answer.lossy)
            for answer, (draws, (exact,)) in zip(answers, computed, strict=True)
        ]

    def generate_until(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[WrittenAnswer]:
        """Return continuations of contexts, each up to its first stop string.

        Raises:
            ConfigError: an option of a task that is out of range.
            DataError: a context with characters that the model cannot read.
        """
        wanted = self._writing_requests(requests)

        def compute(which: Sequence[int], progress: Callable[[int], Any]) -> list[Computed]:
            written = self.writer.write([wanted[index] for index in which], progress)
            return [(np.zeros(0), [str(t), t.truncated, t.shortened, t.calls]) for t in written]

        keys = [("written", *self.writer.ends, *each.content) for each in wanted]
        computed = self.shared.answers(
            keys, range(len(keys)), compute, "writing answers", disable_tqdm
        )
        return [WrittenAnswer(*facts) for _, facts in computed]

    def _writing_requests(self, requests: Sequence[Instance]) -> list[WritingRequest]:
        contexts = [request.args[0] for request in requests]
        times: dict[tuple[object, ...], int] = {}
        wanted = []
        for request, ids in zip(requests, self.encoder.encode(contexts)[0], strict=True):
            self.encoder.check_context(f"task {request.task_name}, question {request.doc_id}", ids)
            key = (request.task_name, request.doc_id, request.idx, request.args[0])
            times[key] = times.get(key, -1) + 1  # repeats of a request are texts of their own
            limit, options = generation_options(request.args[1])
            wanted.append(WritingRequest(ids, noise_key(*key, times[key]), limit, options))
        return wanted

    @property
    def eot_token_id(self) -> int | None:
        """Id of the end-of-text token."""
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **more: Any
    ) -> list[int]:
        """Return the tokens of a text; the model has no special ones before it."""
        return self.encoder.encode([string])[0][0].tolist()  # type: ignore[no-any-return]

    @property
    def tokenizer_name(self) -> str:
        """Name that tells tokenizers and chat templates apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the tokenizer's template writes it.

        From then on contexts have the control tokens that the template writes. Other characters
        stand for those that messages spell.

        Raises:
            ConfigError: the tokenizer has no template.
            DataError: the template fails.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the model's tokenizer has no chat template; leave --apply-chat-template out",
                code="no_chat_template",
            )
        messages = [Message(each["role"], each["content"]) for each in chat_history]
        return self._reader.encoder.write(messages, answer_follows=add_generation_prompt)

    @cached_property
    def _reader(self) -> ChatReader:
        """The writer of conversations, which encoder and texts follow once it is made."""
        reader = self.held.chat_reader()
        self.encoder.read_template(reader)
        self.writer.ends = reader.ends
        return reader


def generation_options(given: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return the most tokens of a task's generation, and its options of `SamplingConfig`.

    Without `do_sample` or a temperature it is greedy, as the harness defines it. Options that no
    text here has, such as beams, are left out.
    """
    options = dict(normalize_gen_kwargs(dict(given)))
    limit = int(options.pop("max_gen_toks"))
    stops: Iterable[str] = options.pop("until")
    known = {k: v for k, v in options.items() if k in SamplingConfig.model_fields and k != "stop"}
    known["temperature"] = float(options.get("temperature") or 0.0)
    if not options.get("do_sample"):
        known["temperature"] = 0.0
    if not known.get("top_k"):
        known.pop("top_k", None)
    return limit, known | {"stop": tuple(stop for stop in stops if stop)}
