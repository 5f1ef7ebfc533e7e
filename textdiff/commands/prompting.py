"""The session of `textdiff play`: a line is a prompt."""

import json

from textdiff.commands.session import Command, Session, named_file, read_value
from textdiff.errors import ConfigError, DataError


class PromptSession(Session):
    """A session in which each line is a prompt of its own."""

    num_samples = 1

    def own_commands(self) -> dict[str, Command]:
        """Return the commands that other sessions do not have, by name."""
        return {
            "samples": (self._samples, "NUMBER: texts per prompt"),
            "again": (self._again, "the last prompt, with the settings as they are now"),
            "blank": (self._blank, "a text from nothing"),
            "save": (self._save, "FILE.jsonl: append the last texts, with their settings"),
        }

    def answer(self, line: str) -> None:
        """Show texts that begin with a line."""
        self.check()
        self.show({"prompts": line, "num_samples": self.num_samples, **self.sampling.options()})

    def _show(self, words: list[str]) -> None:
        super()._show(words)
        self.say(f"{'samples':>20}  {self.num_samples}")

    def _samples(self, words: list[str]) -> None:
        count = read_value("samples", int, words)
        if count < 1:
            raise ConfigError(f"/samples {count}: give at least 1")
        self.num_samples = count

    def _again(self, words: list[str]) -> None:
        self.answer(self.last_task()["prompts"])

    def _blank(self, words: list[str]) -> None:
        self.answer("")

    def _save(self, words: list[str]) -> None:
        path = named_file("/save", words)
        texts = [row.text for row in self.rows]
        if not texts:
            raise ConfigError("/save: no text yet; type a prompt first")
        task = self.last_task()
        apart = ("prompts", "num_samples")
        asked = {k: v for k, v in task.items() if k not in apart and v not in (None, ())}
        record = {"model": self.name, "prompt": task["prompts"], **asked}
        try:
            with path.open("a", encoding="utf-8") as file:
                for text in texts:
                    file.write(json.dumps({**record, "text": text}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"/save {path}: {error.strerror}") from None
        self.say(f"{len(texts)} appended to {path}")
