"""A session of `textdiff play`: its settings, and what its commands do."""

import json
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from textdiff.commands.arguments import writable
from textdiff.commands.sampling import Sampling, ShowingOptions
from textdiff.errors import ConfigError, DataError, closest
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.rules import RULES
from textdiff.view.display import TextPrinter, can_animate, live, recording, written


class Session:
    """A loaded model, settings, and what the last texts were made with.

    Args:
        model: generates.
        name: what the user calls it.
        sampling: settings to begin with.
        console: where texts are shown.
    """

    def __init__(self, model: TextDiffusion, name: str, sampling: Sampling, console: Console):
        self.model, self.name, self.sampling, self.console = model, name, sampling, console
        self.num_samples = 1
        self.last: dict[str, Any] | None = None  # the last generation's task
        self.texts: list[str] = []
        self.over = False
        # What a word after a slash does with the words after it, and how it is used.
        self.commands: dict[str, tuple[Callable[[list[str]], None], str]] = {
            "set": (self._set, "NAME VALUE: change a setting; without VALUE the default"),
            "show": (self._show, "list the settings"),
            "rule": (self._rule, "NAME [KNOB=VALUE ...]: choose a decoding rule"),
            "seed": (self._seed, "[NUMBER]: set the seed; without NUMBER the next one"),
            "samples": (self._samples, "NUMBER: texts per prompt"),
            "again": (self._again, "the last prompt, with the settings as they are now"),
            "blank": (self._blank, "a text from nothing"),
            "film": (self._film, "FILE.html: the last generation as a film"),
            "trace": (self._trace, "FILE.jsonl: the last generation, token by token"),
            "save": (self._save, "FILE.jsonl: append the last texts, with their settings"),
            "help": (self._help, "this list"),
            "quit": (self._quit, "end the session (or Ctrl-D)"),
        }

    def greeting(self) -> str:
        """Return the first lines of the session."""
        network = self.model.model
        count = sum(parameter.numel() for parameter in network.parameters())
        size = self.model.family.block_size
        written = "all at once" if size is None else f"in blocks of {size}"
        return (
            f"{self.name}: {count / 1e6:,.1f} M parameters on {network.device}, "
            f"{network.context} tokens of context, written {written}\n"
            "Type a prompt, or /help."
        )

    def take(self, line: str) -> None:
        """Do what a line says.

        Raises:
            TextDiffError: it cannot be done.
        """
        if not line.strip():
            return
        if line.startswith("//"):
            self.generate(line[1:])
        elif line.startswith("/"):
            self._command(line[1:])
        else:
            self.generate(line)

    def check(self) -> None:
        """Make sure that a text could be generated.

        Raises:
            ConfigError: a setting is out of range or does not fit the model.
        """
        self.model.prepare("", **self.sampling.options())

    def generate(self, prompt: str) -> None:
        """Show a text being denoised, or prints it; a text that is stopped is kept as it is."""
        self.check()
        self.last = task = self._task(prompt)
        animated = can_animate(self.console)
        texts = TextPrinter(self.model, held=animated)
        screen = live(self.console, self.model, task) if animated else nullcontext()
        try:
            with screen as view:
                self.model.generate(**task, callbacks=[view, texts] if view else [texts])
        except KeyboardInterrupt:
            texts.interrupted()
            raise
        finally:
            self.texts = [texts.done[index].text for index in sorted(texts.done)]
        texts.release()

    def completion(self, line: str, number: int) -> str | None:
        """Return the number-th way to complete the last word of a line."""
        words = line.split(" ")
        if len(words) == 1:
            known = [f"/{name}" for name in self.commands] if line.startswith("/") else []
        elif len(words) == 2 and words[0] == "/set":
            known = self._names()
        elif len(words) == 2 and words[0] == "/rule":
            known = self._rules()
        else:
            known = []
        fitting = [name for name in known if name.startswith(words[-1])]
        return f"{fitting[number]} " if number < len(fitting) else None

    def _command(self, words: str) -> None:
        try:
            name, *rest = shlex.split(words)
        except ValueError as error:
            raise ConfigError(f"/{words}: {str(error).lower()}") from None
        if name not in self.commands:
            raise ConfigError(f"unknown command /{name}; {closest(name, self.commands)}")
        self.commands[name][0](rest)

    def _task(self, prompt: str) -> dict[str, Any]:
        """Return the arguments of `TextDiffusion.generate`."""
        return {"prompts": prompt, "num_samples": self.num_samples, **self.sampling.options()}

    def _names(self) -> list[str]:
        return [name.replace("_", "-") for name in Sampling.model_fields]

    def _rules(self) -> list[str]:
        return [name for name, rule in RULES.items() if rule.refusal(self.model.family) is None]

    def _change(self, **values: Any) -> None:
        """Take settings over, if they can be used."""
        before = self.sampling
        self.sampling = before.model_copy(update=values)
        try:
            self.check()
        except ConfigError:
            self.sampling = before
            raise

    def _set(self, words: list[str]) -> None:
        if not words:
            raise ConfigError("/set needs the name of a setting: /show lists them")
        name, *values = words
        name = name.replace("-", "_")
        if name.replace("_", "-") not in self._names():
            raise ConfigError(f"unknown setting {words[0]!r}; {closest(words[0], self._names())}")
        option = Sampling.model_fields[name]
        value = _read(words[0], option.annotation, values) if values else option.default
        self._change(**{name: value})

    def _show(self, words: list[str]) -> None:
        for name, value in self.sampling:
            if value in (None, (), ""):
                value = getattr(self.model.defaults, name, None)
                value = "-" if value in (None, {}, ()) else f"{written(value)} (the model's)"
            self._say(f"{name.replace('_', '-'):>20}  {written(value)}")
        self._say(f"{'samples':>20}  {self.num_samples}")

    def _rule(self, words: list[str]) -> None:
        if not words:
            now = self.sampling.rule or self.model.defaults.rule
            rules = [f"{name} *" if name == now else name for name in self._rules()]
            self._say("rules for this model: " + ", ".join(rules))
            return
        self._change(rule=words[0], knobs=tuple(words[1:]))

    def _seed(self, words: list[str]) -> None:
        seed = _read("seed", int, words) if words else self.sampling.seed + 1
        self._change(seed=seed)
        self._say(f"seed {seed}")

    def _samples(self, words: list[str]) -> None:
        count = _read("samples", int, words)
        if count < 1:
            raise ConfigError(f"/samples {count}: give at least 1")
        self.num_samples = count

    def _again(self, words: list[str]) -> None:
        self.generate(self._last()["prompts"])

    def _blank(self, words: list[str]) -> None:
        self.generate("")

    def _film(self, words: list[str]) -> None:
        self._record(ShowingOptions(film=_file("/film", words)))

    def _trace(self, words: list[str]) -> None:
        self._record(ShowingOptions(trace=_file("/trace", words)))

    def _record(self, showing: ShowingOptions) -> None:
        """Generate once more as the last time, which gives the same text."""
        task = self._last()
        with recording(self.model, self.name, task, showing.film, showing.trace) as callbacks:
            self.model.generate(**task, callbacks=callbacks)
        self._say(f"written to {showing.film or showing.trace}")

    def _save(self, words: list[str]) -> None:
        path = _file("/save", words)
        if not self.texts:
            raise ConfigError("/save: no text yet; type a prompt first")
        task = self._last()
        apart = ("prompts", "num_samples")
        asked = {k: v for k, v in task.items() if k not in apart and v not in (None, ())}
        record = {"model": self.name, "prompt": task["prompts"], **asked}
        try:
            with path.open("a", encoding="utf-8") as file:
                for text in self.texts:
                    file.write(json.dumps({**record, "text": text}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"/save {path}: {error.strerror}") from None
        self._say(f"{len(self.texts)} appended to {path}")

    def _last(self) -> dict[str, Any]:
        if self.last is None:
            raise ConfigError("no prompt yet; type one first")
        return self.last

    def _help(self, words: list[str]) -> None:
        for name, (_, usage) in self.commands.items():
            self._say(f"/{name} {usage}")
        self._say("anything else is a prompt; // begins one with a slash")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _quit(self, words: list[str]) -> None:
        self.over = True


def _read(name: str, kind: Any, words: list[str]) -> Any:
    """Return words as a value of some type.

    Raises:
        ConfigError: they are none.
    """
    several = kind == tuple[str, ...]
    if not several and len(words) != 1:
        raise ConfigError(f"{name} takes one value, not {len(words)}; put quotes around spaces")
    try:
        return TypeAdapter(kind).validate_python(tuple(words) if several else words[0])
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{name} {' '.join(words)}: {reason[0].lower()}{reason[1:]}") from None


def _file(command: str, words: list[str]) -> Path:
    if len(words) != 1:
        raise ConfigError(f"{command} needs the name of one file")
    path = Path(words[0]).expanduser()
    writable(command, path)
    return path
