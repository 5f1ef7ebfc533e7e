"""Conversations as prompts: their ids, and the tokens that end an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from textdiff.data.conversations import (
    ConversationEncoder,
    Message,
    check_unanswered,
    checked_messages,
)
from textdiff.data.losses import encode_checked
from textdiff.diffusion.family import Family
from textdiff.diffusion.process import Vocabulary
from textdiff.errors import DataError
from textdiff.models import Denoiser
from textdiff.sampling.callbacks import Generation
from textdiff.sampling.template import ParsedPrompt


@dataclass(frozen=True)
class ChatPrompt(ParsedPrompt):
    """A conversation that waits for an answer.

    Attributes:
        messages: the conversation; the last message is the user's.
    """

    messages: tuple[Message, ...] = ()

    def __str__(self) -> str:
        return self.messages[-1].content


def checked_conversations(raw: Any, where: str = "messages") -> list[list[Message]]:
    """Return conversations that wait for an answer.

    Args:
        raw: one conversation, or a list of them; see `checked_messages`.
        where: its name for error messages.

    Raises:
        DataError: it is something else, or leaves nothing to answer.
    """
    several = isinstance(raw, list | tuple) and raw and isinstance(raw[0], list | tuple)
    listed = [(each, f"{where}[{n}]") for n, each in enumerate(raw)] if several else [(raw, where)]
    conversations = []
    for each, name in listed:
        messages = checked_messages(each, name)
        check_unanswered(messages, name)
        conversations.append(messages)
    return conversations


class ChatReader:
    """Writer of conversations as prompts, with the tokenizer's present template.

    Args:
        model: the network.
        tokenizer: its tokenizer.
        vocabulary: which ids it predicts.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(
        self, model: Denoiser, tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = ConversationEncoder(tokenizer, model.config.diffusion.get("answer_unit"))
        self.readable = vocabulary.clean.cpu().clone()  # [V] ids that a prompt may have
        silent = {vocabulary.mask_token_id, tokenizer.unk_token_id}
        written = torch.tensor(sorted(self.encoder.control_ids - silent))
        self.readable[written[written < len(self.readable)].long()] = True
        end = model.config.eos_token_id
        ends = end if isinstance(end, list) else [] if end is None else [end]
        self.ends = tuple(dict.fromkeys([*self.encoder.turn_ends, *ends]))

    def prompt(self, messages: Sequence[Message]) -> ChatPrompt:
        """Return a conversation as a prompt.

        Raises:
            DataError: the template fails, or the tokenizer was not trained on a character.
        """
        ids = self.encoder.prompt(messages)
        place = torch.from_numpy(ids).long()  # [P]
        inside = place < len(self.readable)  # [P]
        if not (bool(inside.all()) and bool(self.readable[place].all())):
            raise DataError(
                f"the conversation that ends with {messages[-1].content!r:.60} has characters that "
                "the tokenizer was not trained on, or a token that the model does not have",
                code="foreign_characters",
            )
        return ChatPrompt(
            tuple(ids.tolist()), lost=self._lost(messages), ends=self.ends, messages=(*messages,)
        )

    def _lost(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """Return what the model does not see of messages as they are written, in sentences."""
        texts = [message.content for message in messages]
        losses = encode_checked(self.tokenizer, texts, [True] * len(texts)).losses
        return tuple(
            f"the model does not see {texts[number]!r:.60} as it is written: its tokenizer loses "
            f"a part ({loss})"
            for number, loss in losses.items()
        )


class ChatModel:
    """Model that answers conversations, if its tokenizer has a chat template.

    Attributes:
        model: the network.
        tokenizer: its tokenizer.
        family: process, schedule, objective and block size.
    """

    model: Denoiser
    tokenizer: PreTrainedTokenizerFast
    family: Family

    def generate(self, prompts: Any = "", **options: Any) -> Generation:
        """Generate the rows of prompts."""
        raise NotImplementedError

    def chat(self, messages: Any, **options: Any) -> Generation:
        """Answer a conversation, or each of a list of them; `completions` are the answers.

        Args:
            messages: `[{"role": "user", "content": "..."}]`, or a list of such lists.
            **options: those of `TextDiffusion.generate`.

        Raises:
            ConfigError: see `TextDiffusion.generate`.
            DataError: nothing to answer, no chat template, or see `TextDiffusion.generate`.
        """
        return self.generate(self.chat_prompts(messages), **options)

    def chat_prompts(self, messages: Any) -> list[ChatPrompt]:
        """Return conversations as prompts for `generate`, `prepare` and `stream`; see `chat`."""
        conversations, reader = checked_conversations(messages), self.chat_reader()
        return [reader.prompt(each) for each in conversations]

    def chat_reader(self) -> ChatReader:
        """Return the writer of conversations as prompts; see `ChatReader`."""
        return ChatReader(self.model, self.tokenizer, self.family.process.vocabulary)
