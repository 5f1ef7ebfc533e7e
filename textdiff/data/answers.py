"""Conversations as turns of tokens: what is given, and the answer to it.

With a chat template `ConversationEncoder` writes and cuts them, as generation does. Rows of a
prompt and its completion have no markup of their own: without a template the prompt is followed by
the completion, each encoded by itself. Every answer ends with the end-of-text token.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import text_backends
from textdiff.data.conversation_rows import messages_of
from textdiff.data.conversations import ConversationEncoder, Message, Turn
from textdiff.data.encode import EncodingBatch, Ids, encoder_of
from textdiff.data.token_stream import Piece
from textdiff.data.tokenizer import excluded_ids, vocabulary_size
from textdiff.errors import DataError


class TurnEncoder:
    """Encoder of rows of conversations.

    Args:
        tokenizer: any fast tokenizer; its chat template is used, if it has one.

    Raises:
        DataError: it has no end-of-text token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token, by which answers end; choose another",
                code="no_end_of_text_token",
            )
        self.end = int(tokenizer.eos_token_id)
        self._templated = ConversationEncoder(tokenizer) if tokenizer.chat_template else None
        self._encode = encoder_of(text_backends(tokenizer))
        self._excluded = np.zeros(vocabulary_size(tokenizer), bool)  # [V]
        self._excluded[list(excluded_ids(tokenizer))] = True

    def __call__(self, document: str, where: str) -> list[Turn]:
        """Return the turns of a conversation, each answer with its end-of-text token.

        What follows the last answer is left out.

        Args:
            document: the JSON text of a row, see `conversation_rows`.
            where: its name in messages.

        Raises:
            DataError: messages without a template, an empty answer, or one with a token that no
                model may predict.
        """
        row: dict[str, Any] = json.loads(document)
        messages = messages_of(row, where)
        turns = self._turns(row, messages, where)
        return [turn._replace(answer=self._ended(turn.answer, where)) for turn in turns]

    def _turns(self, row: dict[str, Any], messages: list[Message], where: str) -> list[Turn]:
        if self._templated is not None:
            try:
                return self._templated.turns(messages)
            except DataError as error:
                raise DataError(f"{where}: {error}", code=error.code) from None
        if "messages" in row:
            raise DataError(
                f"{where}: its messages need a chat template, and the tokenizer has none; set "
                "data.conversations.template, or give prompts and completions",
                code="no_chat_template",
            )
        prompt, answer = (message.content for message in messages)
        (given,) = self._encode([prompt])
        (scored,) = self._encode([answer], [bool(prompt)])
        return [Turn(given, scored, len(answer.encode()))]

    def _ended(self, answer: Ids, where: str) -> Ids:
        """Return an answer with its end.

        Raises:
            DataError: it is empty, or has a token that no model may predict.
        """
        text = answer[:-1] if len(answer) and answer[-1] == self.end else answer
        if not len(text):
            raise DataError(
                f"{where}: an answer is empty in tokens; give one that has text",
                code="empty_answer",
            )
        wrong = text[self._excluded[text]]
        if len(wrong):
            raise DataError(
                f"{where}: an answer has the token of id {wrong[0]}, which no model may predict: "
                "it has characters that are unknown to the tokenizer; choose a byte or bpe "
                "tokenizer",
                code="excluded_token",
            )
        return np.append(text, np.int32(self.end))


def encode_turns(
    tasks: Iterable[EncodingBatch], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[EncodingBatch, list[Piece]]]:
    """Yield tasks of whole conversations with their turns: a piece is a prompt, or an answer.

    Raises:
        DataError: see `TurnEncoder`.
    """
    encode = TurnEncoder(tokenizer)
    for task in tasks:
        pieces = []
        for number, (document, _) in enumerate(task.pieces, task.before + 1):
            turns = encode(document, f"conversation {number}")
            pieces += [(ids, False) for turn in turns for ids in (turn.prompt, turn.answer)]
            pieces[-1] = (turns[-1].answer, True)
        yield task, pieces


def conversation_markup(document: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return all text of a conversation, for a tokenizer's training.

    Args:
        document: the JSON text of a row.
        tokenizer: any that has the chat template, if there is one.
    """
    messages = messages_of(json.loads(document), "conversation")
    if not tokenizer.chat_template:
        return "".join(message.content for message in messages)
    plain = [vars(message) for message in messages]
    return str(tokenizer.apply_chat_template(plain, tokenize=False))
