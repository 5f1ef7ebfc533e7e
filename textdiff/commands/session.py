"""Sessions of interactive verbs: settings, and the commands that all of them have."""

import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from textdiff.commands.arguments import writable
from textdiff.commands.sampling import Sampling, ShowingOptions
from textdiff.errors import ConfigError, closest
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.callbacks import FinishedRow
from textdiff.sampling.rules import RULES
from textdiff.view.display import TextPrinter, can_animate, live, recording, written

Command = tuple[Callable[[list[str]], None], str]
"""Function of the words after a command's name, and how it is used."""


class Session:
    """A loaded model, settings, and what the last texts were made with.

    A subclass says what a line asks for (`answer`), and adds commands of its own.

    Attributes:
        noun: what a line is called.

    Args:
        model: generates.
        name: what the user calls it.
        sampling: settings to begin with.
        console: where texts are shown.
    """

    noun = "prompt"

    def __init__(self, model: TextDiffusion, name: str, sampling: Sampling, console: Console):
        self.model, self.name, self.sampling, self.console = model, name, sampling, console
        self.last: dict[str, Any] | None = None  # the last generation's task
        self.rows: list[FinishedRow] = []  # of it
        self.over = False
        self.commands: dict[str, Command] = {
            "set": (self._set, "NAME VALUE: change a setting; without VALUE the default"),
            "show": (self._show, "list the settings"),
            "rule": (self._rule, "NAME [KNOB=VALUE ...]: choose a decoding rule"),
            "seed": (self._seed, "[NUMBER]: set the seed; without NUMBER the next one"),
            **self.own_commands(),
            "film": (self._film, "FILE.html: the last generation as a film"),
            "trace": (self._trace, "FILE.jsonl: the last generation, token by token"),
            "help": (self._help, "this list"),
            "quit": (self._quit, "end the session (or Ctrl-D)"),
        }

    def own_commands(self) -> dict[str, Command]:
        """Return the commands that other sessions do not have, by name."""
        return {}

    def answer(self, line: str) -> None:
        """Do what a line that is not a command asks for."""
        raise NotImplementedError

    def greeting(self) -> str:
        """Return the first lines of the session."""
        network = self.model.model
        count = sum(parameter.numel() for parameter in network.parameters())
        size = self.model.family.block_size
        written = "all at once" if size is None else f"in blocks of {size}"
        return (
            f"{self.name}: {count / 1e6:,.1f} M parameters on {network.device}, "
            f"{network.context} tokens of context, written {written}\n"
            f"Type a {self.noun}, or /help."
        )

    def take(self, line: str) -> None:
        """Do what a line says.

        Raises:
            TextDiffError: it cannot be done.
        """
        if not line.strip():
            return
        if line.startswith("//"):
            self.answer(line[1:])
        elif line.startswith("/"):
            self._command(line[1:])
        else:
            self.answer(line)

    def check(self) -> None:
        """Make sure that a text could be generated.

        Raises:
            ConfigError: a setting is out of range or does not fit the model.
        """
        self.model.prepare("", **self.sampling.options())

    def show(self, task: dict[str, Any], answers: bool = False) -> None:
        """Show texts being denoised, or print them; those that are stopped are kept as they are.

        Args:
            task: arguments of `TextDiffusion.generate`.
            answers: whether only what is generated is shown.
        """
        self.last = task
        animated = can_animate(self.console)
        texts = TextPrinter(self.model, held=animated, answers=answers)
        screen = live(self.console, self.model, task, answers) if animated else nullcontext()
        try:
            with screen as view:
                self.model.generate(**task, callbacks=[view, texts] if view else [texts])
        except KeyboardInterrupt:
            texts.interrupted()
            raise
        finally:
            self.rows = [texts.done[index] for index in sorted(texts.done)]
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

    def _names(self) -> list[str]:
        return [name.replace("_", "-") for name in Sampling.model_fields]

    def _rules(self) -> list[str]:
        return [name for name, rule in RULES.items() if rule.refusal(self.model.family) is None]

    def change(self, **values: Any) -> None:
        """Take settings over, if they can be used.

        Raises:
            ConfigError: they cannot.
        """
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
        value = read_value(words[0], option.annotation, values) if values else option.default
        self.change(**{name: value})

    def _show(self, words: list[str]) -> None:
        for name, value in self.sampling:
            if value in (None, (), ""):
                value = getattr(self.model.defaults, name, None)
                value = "-" if value in (None, {}, ()) else f"{written(value)} (the model's)"
            self.say(f"{name.replace('_', '-'):>20}  {written(value)}")

    def _rule(self, words: list[str]) -> None:
        if not words:
            now = self.sampling.rule or self.model.defaults.rule
            rules = [f"{name} *" if name == now else name for name in self._rules()]
            self.say("rules for this model: " + ", ".join(rules))
            return
        self.change(rule=words[0], knobs=tuple(words[1:]))

    def _seed(self, words: list[str]) -> None:
        seed = read_value("seed", int, words) if words else self.sampling.seed + 1
        self.change(seed=seed)
        self.say(f"seed {seed}")

    def _film(self, words: list[str]) -> None:
        self._record(ShowingOptions(film=named_file("/film", words)))

    def _trace(self, words: list[str]) -> None:
        self._record(ShowingOptions(trace=named_file("/trace", words)))

    def _record(self, showing: ShowingOptions) -> None:
        """Generate once more as the last time, which gives the same text."""
        task = self.last_task()
        with recording(self.model, self.name, task, showing.film, showing.trace) as callbacks:
            self.model.generate(**task, callbacks=callbacks)
        self.say(f"written to {showing.film or showing.trace}")

    def last_task(self) -> dict[str, Any]:
        """Return the arguments of the last generation.

        Raises:
            ConfigError: there was none.
        """
        if self.last is None:
            raise ConfigError(f"no {self.noun} yet; type one first")
        return self.last

    def _help(self, words: list[str]) -> None:
        for name, (_, usage) in self.commands.items():
            self.say(f"/{name} {usage}")
        self.say(f"anything else is a {self.noun}; // begins one with a slash")

    def say(self, line: str) -> None:
        """Print a line of the session's own."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _quit(self, words: list[str]) -> None:
        self.over = True


def read_value(name: str, kind: Any, words: list[str]) -> Any:
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


def named_file(command: str, words: list[str]) -> Path:
    """Return the file that a command names.

    Raises:
        ConfigError: not one file, or it cannot be written.
    """
    if len(words) != 1:
        raise ConfigError(f"{command} needs the name of one file")
    path = Path(words[0]).expanduser()
    writable(command, path)
    return path
