"""Arguments that verbs share, and what they name: configs, models, files, texts, standard input.

Nothing here imports torch until it is needed, so that `--help` stays quick.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal

from textdiff.commands.flags import Named
from textdiff.errors import ConfigError, DataError

if TYPE_CHECKING:
    from textdiff.config import Config
    from textdiff.data.json_rows import Row
    from textdiff.pipeline import TextDiffusion


Dtype = Literal["float32", "float64", "bfloat16", "float16"]
JsonFlag = Annotated[bool, Named("json")]


def load_config(arguments: Sequence[str], prog: str, extra: str = "") -> "Config":
    """Return the config that a command line names, with its flags merged in.

    Args:
        arguments: the config's path, then flags.
        prog: the verb as the user typed it.
        extra: options of the verb itself, for its usage line.

    Raises:
        ConfigError: no config, or a wrong one.
    """
    from textdiff.config.reading import load

    if arguments and arguments[0] in ("-h", "--help"):
        print(_config_usage(f"{prog} CONFIG", extra))
        print("Give a config file before --help to see every key with its current value.")
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(
            f"no config file given: {prog} CONFIG, for example configs/quickstart.yaml"
        )
    # File names may hold any bytes; what a run writes about its config is UTF-8.
    words = [given_text("the flag", word) for word in arguments[1:]]
    flags = [word for word in words if word not in ("-h", "--help")]
    command = f"{prog} {arguments[0]}"
    config = load(arguments[0], flags, prog=f"{command} {extra}".strip())
    if len(flags) < len(arguments) - 1:
        from textdiff.config.keys import describe_keys

        print(_config_usage(command, extra), describe_keys(config), sep="\n\n")
        raise SystemExit(0)
    return config


def _config_usage(command: str, extra: str) -> str:
    """Return the usage line of a verb that takes a config, folded to a terminal's width."""
    words = f"usage: {command} {extra}[--section.key VALUE ...]"
    # Lines are not broken within an option.
    breakable = re.sub(r"\[[^]]*\]", lambda option: option[0].replace(" ", "\0"), words)
    filled = fill(breakable, 79, subsequent_indent=" " * 7, break_on_hyphens=False)
    return filled.replace("\0", " ")


def given_text(what: str, words: str) -> str:
    """Return a text of the command line, or of standard input, as UTF-8 whatever the locale says.

    Args:
        what: names it in an error.
        words: as Python has decoded it: bytes that the locale does not have are surrogates.

    Raises:
        ConfigError: it is not UTF-8.
    """
    try:
        words.encode()
        return words
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(words).decode()
    except UnicodeError:
        raise ConfigError(f"{what} {words[:40]!a} is not UTF-8 text; give it as UTF-8") from None


def take_option(
    words: list[str],
    name: str,
    default: str,
    values: str = "auto, never or the path of a checkpoint",
) -> tuple[list[str], str]:
    """Take `name VALUE` or `name=VALUE` out of a command line; returns the rest and the value."""
    for index, word in enumerate(words):
        if word.startswith(f"{name}="):
            return words[:index] + words[index + 1 :], word.split("=", 1)[1]
        if word == name:
            if index + 1 == len(words):
                raise ConfigError(f"{name} needs a value: {values}")
            return words[:index] + words[index + 2 :], words[index + 1]
    return words, default


def fraction(words: str) -> float:
    """Return `0.5%` or `0.005` as a number.

    Raises:
        ConfigError: anything else.
    """
    try:
        value = float(words.removesuffix("%")) / (100.0 if words.endswith("%") else 1.0)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise ConfigError(f"--precision {words}: give a share such as 0.5% or 0.005")
    return value


@dataclass(frozen=True)
class Loading:
    """Options of loading the model."""

    block_size: int | Literal["full"] | None = None
    """Tokens per block, of those that the model was trained in, or full; the default is the first
    of them."""

    device: str | None = None
    """Torch device; the default is CUDA if there is one, else the CPU."""

    dtype: Dtype | Literal["auto"] = "auto"
    """Dtype of the network; auto is float32, on a GPU bfloat16 with head and norms in float32.
    Likelihoods are normalised in float32 or wider in any case."""

    def load(self, name: str, default_device: str | None = None) -> "TextDiffusion":
        """Return the model of that name, in the block size that was named.

        Raises:
            CheckpointError: it cannot be loaded.
            ConfigError: the device does not exist, or the model was not trained in such blocks.
        """
        from textdiff.pipeline import TextDiffusion

        if name != given_text("the model's name", name):
            raise ConfigError(f"the locale cannot name the model {name!a}; use a UTF-8 locale")
        held = TextDiffusion.from_pretrained(name, self.device or default_device, self.dtype)
        if self.block_size is None:
            return held
        return held.with_block_size(None if self.block_size == "full" else self.block_size)


def same_command() -> str:
    """Return the command line of this process, to start it again."""
    return shlex.join(["textdiff", *sys.argv[1:]])


def writable(flag: str, path: Path | None) -> None:
    """Make sure that a file can be written, if one is named, before anything that takes long.

    Raises:
        ConfigError: its folder is missing, or it cannot be written.
    """
    if path is None:
        return
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        raise ConfigError(f"{flag} {path}: name a file in a folder that exists")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"{flag} {path} cannot be written: choose another place, or its rights")


STANDARD_INPUT = "standard input"


def read_documents(names: Sequence[str], text_column: str) -> Iterator[str]:
    """Yield the documents of files, folders and patterns; `-` is standard input as one document.

    All names are looked up first; a file is opened when its first document is wanted.

    Raises:
        ConfigError: standard input is named twice, or cannot be used here.
        DataError: a place that holds no usable text.
    """
    from textdiff.data.paths import find_files
    from textdiff.data.text_files import iterate_documents

    check_standard_input(names)
    for source in [None if name == "-" else find_files(name) for name in names]:
        if source is None:
            yield read_standard_input()
        else:
            yield from iterate_documents([source], text_column)


def given_rows(names: Sequence[str]) -> "Iterator[Row]":
    """Yield the rows of JSON lines files; `-` is standard input, also in lines.

    Raises:
        ConfigError: see `read_documents`.
        DataError: see `read_documents`.
    """
    from textdiff.data.json_rows import rows_of, stream_rows
    from textdiff.data.paths import find_files

    check_standard_input(names)
    for source in [None if name == "-" else find_files(name) for name in names]:
        if source is None:
            yield from stream_rows(standard_input(), STANDARD_INPUT)
        else:
            yield from rows_of(source)


def check_standard_input(names: Sequence[str]) -> None:
    """Make sure that standard input is read once, and by a process that has it for itself.

    Raises:
        ConfigError: it is not.
    """
    count = sum(name == "-" for name in names)
    if count > 1:
        raise ConfigError("standard input can be read once: give `-` once")
    if count and several_processes():
        raise ConfigError("several processes cannot share standard input: write it to a file")


def several_processes() -> bool:
    """Return whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def read_standard_input() -> str:
    """Return the whole of standard input as one text, under the rules for text files.

    Raises:
        DataError: it holds no usable text.
    """
    from textdiff.data.document_stream import no_text
    from textdiff.data.formats import read_plain

    text = "".join(block.text for block in read_plain(standard_input(), STANDARD_INPUT))
    if not text:
        raise no_text(STANDARD_INPUT)
    return text


def read_text(name: str) -> str:
    """Return the text of one file, or of standard input, under the rules for text files.

    Raises:
        ConfigError: see `check_standard_input`.
        DataError: it cannot be read.
    """
    from textdiff.data.formats import read_plain_file
    from textdiff.data.paths import existing, missing

    if name == "-":
        check_standard_input([name])
        return read_standard_input()
    path = existing(name)
    if path is None:
        raise missing(name)
    if path.is_dir():
        raise DataError(f"{name} is a folder; name a file")
    return "".join(block.text for block in read_plain_file(path))


def standard_input() -> BinaryIO:
    """Return the bytes of standard input.

    Raises:
        DataError: it is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise DataError(f"{STANDARD_INPUT} is closed; pipe a text into it")
    return sys.stdin.buffer
