"""Commands to try after a run: each works as it stands when it is pasted into a shell."""

import os
import shlex
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from textdiff.errors import TextDiffError

if TYPE_CHECKING:
    from textdiff.pipeline import TextDiffusion

_WORDS = 3
_CHARACTERS = 40  # of a prompt of whole words, so that the command stays a line
_LETTERS = 20  # of a longer word, or of a script that does not part words


def commands_to_try(
    export: str, validation: str, document: str, usable: Callable[[str], bool]
) -> list[str]:
    """Return command lines for a new model.

    Args:
        export: path of the model.
        validation: path of its held-out texts.
        document: a text like those it was trained on.
        usable: returns whether the model can write on after a prompt.
    """
    model, text = _as_argument(export), _as_argument(validation)
    prompt = next((prompt for prompt in _prompts(document) if usable(prompt)), None)
    begin = [] if prompt is None else [prompt]
    commands: Sequence[Sequence[str]] = (
        ["textdiff", "generate", model, *begin, "--watch"],
        ["textdiff", "generate", model, "--num-samples", "4", "--json"],
        ["textdiff", "perplexity", model, text],
    )
    return [shlex.join(command) for command in commands]


def accepts(model: "TextDiffusion") -> Callable[[str], bool]:
    """Return a test of prompts: whether a model takes one, and has as much room again."""

    context = int(model.model.config.max_position_embeddings)

    def usable(prompt: str) -> bool:
        try:
            given = int(model.prepare(prompt).job.tails[0])
        except TextDiffError:  # such as characters that the tokenizer does not know
            return False
        return given <= context // 2

    return usable


def _as_argument(path: str) -> str:
    """Return a path that cannot be taken for a flag."""
    return os.path.join(".", path) if path.startswith("-") else path


def _prompts(document: str) -> Iterator[str]:
    """Yield beginnings of a text that are fit for a command line, the best one first."""
    from textdiff.sampling.template import quoted

    words = [word for word in map(_printable, document[:10_000].split()) if word]
    while words and words[0].startswith("-"):  # would be read as a flag
        words.pop(0)
    for count in range(min(_WORDS, len(words)), 0, -1):
        prompt = " ".join(words[:count])
        if len(prompt) <= _CHARACTERS:
            yield quoted(prompt)
    part = _cut(words[0], _LETTERS) if words else ""
    while part:  # fewer and fewer: a model of bytes needs several for a character
        yield quoted(part)
        part = _cut(part, len(part) // 2)


def _printable(word: str) -> str:
    """Return a word without what a terminal would act on, or not show."""
    return "".join(character for character in word if character.isprintable())


def _cut(text: str, length: int) -> str:
    """Return the first characters of a text; one with marks is left out with them."""
    if len(text) <= length:
        return text
    while length and _joins(text[length]):
        length -= 1
    return text[:length].rstrip()


def _joins(character: str) -> bool:
    """Whether a character is shown as a part of the one before it."""
    return (
        unicodedata.category(character).startswith("M") or "\U0001f3fb" <= character <= "\U0001f3ff"
    )
