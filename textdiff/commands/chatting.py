"""The session of `textdiff chat`: a line is a message, and the model answers it."""

import json
from dataclasses import replace
from typing import Any

from rich.console import Console

from textdiff.commands.sampling import Sampling
from textdiff.commands.session import Command, Session, named_file
from textdiff.data.conversations import Message, checked_messages
from textdiff.errors import ConfigError, DataError
from textdiff.pipeline import TextDiffusion
from textdiff.storage import whole_file


class ChatSession(Session):
    """A session that is one conversation.

    Args:
        model: answers.
        name: what the user calls it.
        sampling: settings to begin with.
        console: where answers are shown.
        system: text of the system message; empty: there is none.

    Raises:
        DataError: the model's tokenizer has no chat template.
    """

    noun = "message"

    def __init__(
        self, model: TextDiffusion, name: str, sampling: Sampling, console: Console, system: str
    ):
        super().__init__(model, name, sampling, console)
        self.reader = model.chat_reader()
        self.system = [Message("system", system)] if system else []
        self.turns: list[Message] = []
        self.said: set[str] = set()  # sentences, each reported once

    def own_commands(self) -> dict[str, Command]:
        """Return the commands that other sessions do not have, by name."""
        return {
            "again": (self._again, "another answer to the last message, with the next seed"),
            "undo": (self._undo, "take back the last message and its answer"),
            "reset": (self._reset, "begin a new conversation"),
            "save": (self._save, "FILE.json: write the conversation"),
        }

    def check(self) -> None:
        """Make sure that an answer could be generated.

        Raises:
            ConfigError: a setting is out of range or does not fit the model or conversations.
        """
        if self.sampling.suffix:
            raise ConfigError(
                "an answer has no suffix: leave --suffix out", code="suffix_of_conversation"
            )
        super().check()

    def answer(self, line: str) -> None:
        """Show the answer to a message, and keep both; also an answer that is stopped.

        Raises:
            TextDiffError: the message cannot be answered; it is not kept.
        """
        (message,) = checked_messages([{"role": "user", "content": line}], "the conversation")
        self.check()
        self._answer([*self.turns, message])

    def _answer(self, turns: list[Message]) -> None:
        task = self._task(turns)
        self.rows = []
        try:
            self.show(task, answers=True)
        finally:
            answer = self.rows[0].completion.strip() if self.rows else ""
            if answer:
                self.turns = [*turns, Message("assistant", answer)]
            else:
                self.say("(no answer; the message is not kept)")

    def _task(self, turns: list[Message]) -> dict[str, Any]:
        """Return the arguments of `TextDiffusion.generate`; the oldest turns may be left out."""
        options = self.sampling.options()
        wanted = options["max_new_tokens"] or self.model.defaults.max_new_tokens
        context = self.model.context
        whole = [*self.system, *turns]
        kept = self.reader.encoder.latest(whole, context - min(wanted, context // 2))
        if len(kept) < len(whole):
            self._say_once(
                f"(the conversation is longer than the model's context of {context} tokens: from "
                "now on the model does not see its oldest messages)"
            )
        prompt = self.reader.prompt(kept)
        lost = tuple(sentence for sentence in prompt.lost if sentence not in self.said)
        self.said.update(lost)
        return {"prompts": [replace(prompt, lost=lost)], **options}

    def _say_once(self, sentence: str) -> None:
        if sentence not in self.said:
            self.say(sentence)
            self.said.add(sentence)

    def _before_last(self) -> int:
        """Return the number of messages before the last one of the user.

        Raises:
            ConfigError: there is none.
        """
        users = [number for number, each in enumerate(self.turns) if each.role == "user"]
        if not users:
            raise ConfigError("no message yet; type one first", code="no_message")
        return users[-1]

    def _again(self, words: list[str]) -> None:
        asked = self.turns[: self._before_last() + 1]
        self.change(seed=self.sampling.seed + 1)
        self._answer(asked)

    def _undo(self, words: list[str]) -> None:
        self.turns = self.turns[: self._before_last()]
        self.say(f"{len(self.turns)} messages are left")

    def _reset(self, words: list[str]) -> None:
        self.turns, self.said = [], set()
        self.say("a new conversation")

    def _save(self, words: list[str]) -> None:
        path = named_file("/save", words)
        self._before_last()
        messages = [vars(message) for message in [*self.system, *self.turns]]
        try:
            with whole_file(path) as scratch:
                text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
                scratch.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(f"/save {path}: {error.strerror}", code="not_saved") from None
        self.say(f"{len(messages)} messages written to {path}")
