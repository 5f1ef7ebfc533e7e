"""Conversations: messages, and how the tokenizer's chat template writes them as token ids.

Control tokens (`<|im_start|>`) come from the template alone. Text of a message that spells one is
encoded as the characters that it is, as everywhere in textdiff. One function gives the ids of a
conversation, with a cut at both ends of every answer, so that chat prompts are what training saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from textdiff.data.control_tokens import ControlEncoder
from textdiff.data.document_stream import brief
from textdiff.data.encode import Ids, readable
from textdiff.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """A turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: its text.
    """

    role: str
    content: str


class Turn(NamedTuple):
    """An answer as token ids, and what stands between the answer before it and this one.

    Attributes:
        prompt: int32 [P], up to where the answer begins.
        answer: int32 [A], with the end-of-text token if the template has one there; the last
            answer of a conversation always has it.
        bytes: of the answer's text in UTF-8.
    """

    prompt: Ids
    answer: Ids
    bytes: int


def checked_messages(raw: object, where: str = "messages") -> list[Message]:
    """Return the messages of a conversation that was read from JSON.

    Args:
        raw: a list of objects with `role` and `content`, or of `Message`; other keys are ignored.
        where: its name for error messages, such as file and line.

    Raises:
        DataError: it is something else, empty, or a message has no text.
    """
    if not isinstance(raw, list | tuple):
        raise DataError(
            f"{where}: a conversation is a list of messages, "
            '[{"role": "user", "content": "..."}]',
            code="not_a_conversation",
        )
    if not raw:
        raise DataError(
            f"{where}: the conversation has no messages; give at least one", code="no_messages"
        )
    return [_checked_message(each, f"{where}[{number}]") for number, each in enumerate(raw)]


def _checked_message(raw: object, where: str) -> Message:
    values = vars(raw) if isinstance(raw, Message) else raw
    if not isinstance(values, dict):
        raise DataError(
            f'{where}: a message is an object {{"role": ..., "content": ...}}',
            code="not_a_message",
        )
    role, content = values.get("role"), values.get("content")
    if role not in ROLES:
        raise DataError(
            f"{where}: role {role!r:.40} is not known; there are: {', '.join(ROLES)}",
            code="unknown_role",
        )
    if not isinstance(content, str):
        raise DataError(f"{where}: content must be a text", code="no_content")
    if role != "system" and not content.strip():
        raise DataError(
            f"{where}: the content of this {role} message is blank; write it or leave it out",
            code="blank_content",
        )
    readable([content])
    return Message(role, content)


def check_answered(messages: Sequence[Message], where: str = "messages") -> None:
    """Make sure that a conversation can be trained on.

    Raises:
        DataError: it has no answer, or begins with one.
    """
    if all(message.role != "assistant" for message in messages):
        raise DataError(
            f"{where}: the conversation has no message of the assistant to learn from",
            code="no_answer",
        )
    if messages[0].role == "assistant":
        raise DataError(
            f"{where}: the conversation begins with the assistant, who has nothing to answer; "
            "put a system or user message first",
            code="begins_with_answer",
        )


def check_unanswered(messages: Sequence[Message], where: str = "messages") -> None:
    """Make sure that a conversation waits for an answer.

    Raises:
        DataError: its last message is the assistant's, or the system's.
    """
    if messages[-1].role != "user":
        raise DataError(
            f"{where}: the last message is of the {messages[-1].role}, which leaves nothing to "
            "answer; end with a user message",
            code="nothing_to_answer",
        )


class ConversationEncoder:
    """Encoder of conversations with a tokenizer's own chat template.

    Args:
        tokenizer: any fast tokenizer that has a chat template; it is not changed.
        unit: multiple that training filled earlier answers up to with end-of-text tokens, see
            `answer_layout`; None: they have neither fill nor an end besides the template's.

    Attributes:
        controls: encoder of what the template writes.

    Raises:
        DataError: it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, unit: int | None = None) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, so messages cannot be written as a prompt; "
                "use a model whose tokenizer has one, or put a chat_template.jinja beside its "
                "tokenizer.json",
                code="no_chat_template",
            )
        self.tokenizer, self.unit = tokenizer, unit
        self.controls = ControlEncoder.of(tokenizer, str(tokenizer.chat_template))

    @property
    def control_ids(self) -> set[int]:
        """Ids of special tokens, and of others that the template writes."""
        return set(self.controls.control)

    @cached_property
    def turn_ends(self) -> tuple[int, ...]:
        """Special token that the template puts after an answer, if it does."""
        messages = [Message("user", "a"), Message("assistant", "b")]
        try:
            before, after = (self._render(messages[:n], answer_follows=n == 1) for n in (1, 2))
        except DataError:  # it needs other messages
            return ()
        special = self.controls.first_special(after, len(before))
        ids = [i for i, text in self.controls.special.items() if special and text == special[0]]
        return tuple(ids) if after.startswith(before) else ()

    def latest(self, messages: Sequence[Message], room: int) -> list[Message]:
        """Return a conversation without its oldest turns, so that its prompt has room.

        System messages at its beginning stay, and so does the last message of the user.

        Args:
            messages: the conversation.
            room: tokens that its prompt may have.
        """
        kept = list(messages)
        first = next((n for n, each in enumerate(kept) if each.role != "system"), len(kept))
        while len(self.prompt(kept)) > room:
            users = [n for n in range(first + 1, len(kept)) if kept[n].role == "user"]
            if not users:
                break
            del kept[first : users[0]]
        return kept

    def prompt(self, messages: Sequence[Message]) -> Ids:
        """Return the ids of a conversation up to where the next answer begins, int32 [P].

        Answers are cut off as in training, as far as the template keeps them as they were.

        Raises:
            DataError: the template fails.
        """
        messages = self._hidden(messages)
        text = self._render(messages, answer_follows=True)
        earlier = [n for n, each in enumerate(messages) if each.role == "assistant" and n]
        spans = [self._answer_span(messages[: number + 1], text) for number in earlier]
        cuts = [cut for span in spans if span is not None for cut in span]
        pieces = self.controls.encode(text, cuts)
        end = self.tokenizer.eos_token_id
        if self.unit is None or end is None or None in spans:
            return np.concatenate(pieces)
        ids = pieces[0]
        for answer, prompt in zip(pieces[1::2], pieces[2::2], strict=True):
            missing = -(len(ids) + len(answer) + (answer[-1] != end)) % self.unit
            fill = np.full(missing + (answer[-1] != end), end, np.int32)
            ids = np.concatenate([ids, answer, fill, prompt])
        return ids

    def write(self, messages: Sequence[Message], answer_follows: bool = True) -> str:
        """Return what the template writes, with spelled control tokens hidden, for `controls`.

        Args:
            messages: the conversation.
            answer_follows: whether an answer follows; else the last message goes on.

        Raises:
            DataError: the template fails.
        """
        return self._render(self._hidden(messages), answer_follows, not answer_follows)

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """Return the answers of a conversation and what is before each; joined they are its ids.

        What follows the last answer is left out.

        Raises:
            DataError: no answer, or a template that fails or writes earlier turns in another way.
        """
        check_answered(messages)
        answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        sizes = [len(messages[number].content.encode()) for number in answers]
        messages = self._hidden(messages[: answers[-1] + 1])
        text = self._render(messages, answer_follows=False)
        cuts: list[int] = []
        for number in answers:
            span = self._answer_span(messages[: number + 1], text)
            if span is None:
                raise DataError(
                    f"the chat template writes message {number + 1} in another way when more "
                    "follow, or no answer after its prompt; train on conversations of one "
                    "answer, or with a template that keeps earlier turns as they are",
                    code="template_changes_history",
                )
            cuts += span
        pieces = self.controls.encode(text[: cuts[-1]], cuts[:-1])
        end = self.tokenizer.eos_token_id
        if end is not None and pieces[-1][-1:].tolist() != [end]:
            pieces[-1] = np.append(pieces[-1], np.int32(end))
        return [Turn(*turn) for turn in zip(pieces[::2], pieces[1::2], sizes, strict=True)]

    def _hidden(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages in which no text spells a control token."""
        return [
            Message(role, self.controls.hide(content, answer=role == "assistant"))
            for role, content in ((message.role, message.content) for message in messages)
        ]

    def _answer_span(self, messages: Sequence[Message], text: str) -> tuple[int, int] | None:
        """Return where the last message's answer begins and ends in a longer rendering.

        None: it is not there as the prompt before it and its own rendering have it.
        """
        before = self._render(messages[:-1], answer_follows=True)
        after = self._render(messages, answer_follows=False)
        begin, special = len(before), self.controls.first_special(after, len(before))
        end = len(after.rstrip())
        if special is not None:
            end = special.end() if special[0] == self.tokenizer.eos_token else special.start()
        consistent = after.startswith(before) and text.startswith(after[:end])
        return (begin, end) if consistent and begin < end else None

    def _render(self, messages: Sequence[Message], answer_follows: bool, on: bool = False) -> str:
        """Return what the template writes; transformers runs it in a sandbox.

        Raises:
            DataError: it fails, or refuses the messages.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=answer_follows,
                continue_final_message=on,
            )
        except Exception as error:  # a template raises whatever its expressions raise
            raise DataError(
                f"the chat template cannot write this conversation ({brief(error)}); it may allow "
                "other roles or another order of them",
                code="template_failed",
            ) from None
        return str(rendered)
