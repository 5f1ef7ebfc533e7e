"""The model class of lm-evaluation-harness for textdiff, registered there as `textdiff`.

from textdiff.evaluate.exam.lm_eval_model import TextDiffusionLM
lm_eval.simple_evaluate(TextDiffusionLM("runs/quickstart/export"), tasks=["blimp"])

The harness has no entry points for models: an import of this module registers the class.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather, gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from textdiff.checks import whole_number
from textdiff.errors import ConfigError, DataError
from textdiff.evaluate.exam.answer_bounds import AnswerDraws, Effort, score_answers
from textdiff.evaluate.exam.answer_tokens import (
    AnswerEncoder,
    AnswerRequest,
    AnswerTokens,
    noise_key,
)
from textdiff.evaluate.exam.answered import Answer, WholeText, WrittenAnswer
from textdiff.evaluate.exam.greedy import greedy_matches
from textdiff.evaluate.exam.writing import AnswerWriter, WritingRequest
from textdiff.export.loading import cpu_only
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.settings import SamplingConfig

CHUNK = 256
"""Answers that are scored before their results are handed to the harness's cache."""


@register_model("textdiff")
class TextDiffusionLM(TemplateLM):  # type: ignore[misc]
    """A text-diffusion model, as lm-evaluation-harness calls it.

    Args:
        pretrained: the model, or its folder or hub id.
        batch_size: texts that are written together; `auto` is 16.
        device: torch device, where `pretrained` is a name.
        dtype: dtype of the network, where `pretrained` is a name.
        **options: those of `Effort`, such as `mc`, and those of `SamplingConfig`, such as `rule`,
            which take the place of a task's own.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: an option that does not exist or does not fit the model.
    """

    def __init__(
        self,
        pretrained: str | TextDiffusion,
        *,
        batch_size: int | str = 16,
        device: str | None = None,
        dtype: str = "float32",
        **options: Any,
    ):
        super().__init__()
        options.pop("max_batch_size", None)  # the harness passes it to every model
        names = [each.name for each in fields(Effort)]
        self.effort = Effort(**{name: options.pop(name) for name in names if name in options})
        self.state = PartialState(cpu=cpu_only())
        self._rank, self._world_size = self.state.process_index, self.state.num_processes
        place = device or (str(self.state.device) if self._world_size > 1 else None)
        if not isinstance(pretrained, TextDiffusion):
            pretrained = TextDiffusion.from_pretrained(pretrained, place, dtype)
        self.held = pretrained
        self._device = self.held.model.device
        self.tokenizer = self.held.tokenizer
        self.encoder = AnswerEncoder(self.tokenizer, self.held.family.process.vocabulary.clean)
        rows = 16 if batch_size == "auto" else whole_number("batch_size", batch_size)
        self.writer = AnswerWriter(self.held, options, self.effort.seed, rows)

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
        answers = self.encoder.answers(wanted)
        keys = [(request.context, request.answer) for request in wanted]
        return self._answered(answers, keys, disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **more: Any,
    ) -> list[Answer]:
        """Return log-likelihoods of continuations that are tokens already."""
        import numpy as np

        answers = [
            AnswerTokens(noise_key(*before), np.array([*before, *after], np.int32), len(before), "")
            for _, before, after in requests
        ]
        return self._answered(answers, [pair for pair, _, _ in requests], disable_tqdm)

    def _answered(
        self, answers: Sequence[AnswerTokens], keys: Sequence[tuple[str, str]], quiet: bool
    ) -> list[Answer]:
        """Return the answers to requests; those of one question follow each other."""
        cut = [answer.within(self.held.context) for answer in answers]
        results: list[Answer] = []
        with self._bar("scoring answers", len(cut), quiet) as bar:
            for chunk in _chunks(cut):
                tokens = [cut[index] for index in chunk]
                drawn = score_answers(self.held, tokens, self.effort)
                greedy = greedy_matches(self.writer, tokens)
                for index, draws, match in zip(chunk, drawn, greedy, strict=True):
                    results.append(_answer(cut[index], draws, match))
                    self.cache_hook.add_partial("loglikelihood", keys[index], results[-1])
                bar.update(len(chunk))
        return results

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
        results: list[WholeText] = []
        with self._bar("scoring texts", len(answers), disable_tqdm) as bar:
            for chunk in _chunks(answers):
                drawn = score_answers(self.held, [answers[i] for i in chunk], self.effort)
                for index, draws in zip(chunk, drawn, strict=True):
                    lossy = answers[index].lossy
                    results.append(WholeText(draws.values.numpy(), draws.exact, lossy))
                    self.cache_hook.add_partial(
                        "loglikelihood_rolling", (texts[index],), results[-1]
                    )
                bar.update(len(chunk))
        return results

    def generate_until(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[WrittenAnswer]:
        """Return continuations of contexts, each up to its first stop string.

        Raises:
            ConfigError: an option of a task that is out of range.
            DataError: a context with characters that the model cannot read.
        """
        contexts = [request.args[0] for request in requests]
        ids = self.encoder.encode(contexts)[0]
        times: dict[tuple[object, ...], int] = {}
        wanted = []
        for request, tokens in zip(requests, ids, strict=True):
            self._check_context(request, tokens)
            key = (request.task_name, request.doc_id, request.idx, request.args[0])
            times[key] = times.get(key, -1) + 1  # repeats of a request are texts of their own
            limit, options = generation_options(request.args[1])
            number = noise_key(*key, times[key])
            wanted.append(WritingRequest(tokens, number, limit, options))
        with self._bar("writing answers", len(wanted), disable_tqdm) as bar:
            written = self.writer.write(wanted, bar.update)
        for request, text in zip(requests, written, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return written

    def _check_context(self, request: Instance, ids: Any) -> None:
        if not bool(self.encoder.clean[ids].all()):
            raise DataError(
                f"task {request.task_name}, question {request.doc_id}: the context has characters "
                "that the model's tokenizer was not trained on; use a model with a byte or bpe "
                "tokenizer",
                code="foreign_characters",
            )

    def _bar(self, title: str, total: int, quiet: bool) -> "tqdm[Any]":
        return tqdm(total=total, desc=title, disable=quiet or self.rank != 0)

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

        Raises:
            ConfigError: the tokenizer has no template.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the model's tokenizer has no chat template; leave --apply-chat-template out",
                code="no_chat_template",
            )
        self.encoder.special = True
        return self.tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def all_gather(self, tensor: Any) -> Any:
        """Return the tensors of all processes, one after another."""
        return gather(tensor) if self.world_size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all processes on one of them; None on the others."""
        if self.world_size == 1:
            return [obj]
        objects = gather_object([obj])
        return objects if self.rank == dst else None

    def barrier(self) -> None:
        """Return when all processes have called it."""
        self.state.wait_for_everyone()


def _chunks(answers: Sequence[AnswerTokens]) -> Iterator[range]:
    """Yield the indices of answers in chunks that leave questions whole."""
    start = 0
    for index in range(1, len(answers) + 1):
        last = index == len(answers)
        whole = last or answers[index].question != answers[index - 1].question
        if last or (whole and index - start >= CHUNK):
            yield range(start, index)
            start = index


def _answer(answer: AnswerTokens, draws: AnswerDraws, match: bool) -> Answer:
    return Answer(draws.values.numpy(), match, draws.exact, answer.truncated, answer.lossy)


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
