"""Questions and answers as tokens, cut as lm-evaluation-harness cuts them.

White space at the end of a context belongs to the answer. Context and answer are encoded as one
text, of which the answer is what follows the tokens of the context alone.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.data.control_tokens import ControlEncoder
from textdiff.data.encode import Ids
from textdiff.data.losses import encode_checked
from textdiff.errors import DataError
from textdiff.sampling.chat import ChatReader


@dataclass(frozen=True)
class AnswerRequest:
    """An answer whose log-likelihood is wanted.

    Attributes:
        name: task and question, for messages.
        question: key of the noise, which all answers to a question have in common.
        context: text before the answer.
        answer: text that is scored.
    """

    name: str
    question: int
    context: str
    answer: str

    @property
    def pair(self) -> tuple[str, str]:
        """Context and answer, with white space at their border in the answer."""
        context = self.context.rstrip()
        return context, self.context[len(context) :] + self.answer


@dataclass(frozen=True)
class AnswerTokens:
    """An answer after its context.

    Attributes:
        question: see `AnswerRequest`.
        ids: [n] int32 tokens of both.
        start: tokens of the context.
        text: the answer.
        truncated: whether the context was cut from the left.
        lossy: whether the tokens do not give the text back.
    """

    question: int
    ids: Ids
    start: int
    text: str
    truncated: bool = False
    lossy: bool = False

    @property
    def key(self) -> tuple[int, int, bytes]:
        """Everything that a score depends on."""
        return self.question, self.start, self.ids.tobytes()

    def within(self, context: int) -> "AnswerTokens":
        """Return it with as much of its context as a network reads at once, the end of it."""
        over = min(len(self.ids) - context, self.start)
        if over <= 0:
            return self
        ids, start = self.ids[over:], self.start - over
        return AnswerTokens(self.question, ids, start, self.text, True, self.lossy)


def noise_key(*parts: object) -> int:
    """Return a whole number of 62 bits that stands for a question."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


class AnswerEncoder:
    """Encoder of contexts and answers for one model.

    Args:
        tokenizer: the model's.
        clean: [V] bool, ids that the model can predict.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, clean: Tensor):
        self.tokenizer, self.clean = tokenizer, clean.cpu().numpy()
        self.readable = self.clean
        self.controls: ControlEncoder | None = None

    def read_template(self, reader: ChatReader) -> None:
        """Take contexts from now on as a chat template wrote them, with its control tokens.

        Args:
            reader: writer of conversations, whose template it is.
        """
        self.controls, self.readable = reader.encoder.controls, reader.readable.numpy()

    def encode(self, texts: Sequence[str]) -> tuple[list[Ids], set[int], int | None]:
        """Return ids of texts, which of them they do not give back, and the unknown token's id."""
        if self.controls is not None:
            rows = [self.controls.encode(text)[0] for text in texts]
            return rows, set(), self.tokenizer.unk_token_id
        encoded = encode_checked(self.tokenizer, texts)
        return encoded.ids, set(encoded.losses), encoded.unknown

    def answers(self, requests: Sequence[AnswerRequest]) -> list[AnswerTokens]:
        """Return requests as tokens.

        Raises:
            DataError: an answer without tokens, or with tokens that the model cannot predict.
        """
        pairs = [request.pair for request in requests]
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        lengths = {c: len(x) for c, x in zip(contexts, self.encode(contexts)[0], strict=True)}
        whole = [context + self._without_controls(answer) for context, answer in pairs]
        ids, lossy, unknown = self.encode(whole)
        answers = []
        for number, (request, (context, text)) in enumerate(zip(requests, pairs, strict=True)):
            start = lengths[context]
            self.check(request.name, ids[number], start, unknown)
            answers.append(
                AnswerTokens(request.question, ids[number], start, text, lossy=number in lossy)
            )
        return answers

    def _without_controls(self, answer: str) -> str:
        """Return an answer, whose spelled control tokens are the characters that they have."""
        return answer if self.controls is None else self.controls.hide(answer, answer=False)

    def check(self, name: str, ids: Ids, start: int, unknown: int | None = None) -> None:
        """Refuse what cannot be scored; a score of 0 would be the best of all.

        Args:
            name: of the question, for messages.
            ids: tokens of context and answer.
            start: tokens of the context.
            unknown: id of the unknown token, which no answer may have.

        Raises:
            DataError: no answer, or tokens that the model cannot read or predict.
        """
        if len(ids) <= start:
            raise DataError(
                f"{name}: the answer has no token after its context, so it has no likelihood; "
                "leave the question out",
                code="answer_without_tokens",
            )
        self.check_context(name, ids[:start])
        answer = ids[start:]
        _refuse_foreign(name, answer, _holds(self.clean, answer) & (answer != unknown))

    def check_context(self, name: str, ids: Ids) -> None:
        """Refuse a context that the model cannot read.

        Raises:
            DataError: it has other tokens than the model.
        """
        _refuse_foreign(name, ids, _holds(self.readable, ids))


def _holds(allowed: NDArray[np.bool_], ids: Ids) -> NDArray[np.bool_]:
    """Return which ids are allowed; a tokenizer may have more of them than the model."""
    inside = ids < len(allowed)
    return inside & allowed[np.where(inside, ids, 0)]


def _refuse_foreign(name: str, ids: Ids, allowed: NDArray[np.bool_]) -> None:
    if not allowed.all():
        raise DataError(
            f"{name}: the text has characters that the model's tokenizer was not trained on (id "
            f"{int(ids[allowed.argmin()])}), so it has no likelihood; use a model with a byte or "
            "bpe tokenizer",
            code="foreign_characters",
        )
