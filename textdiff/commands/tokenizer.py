"""`textdiff tokenizer train`: a tokenizer from text files."""

import json
import os
from pathlib import Path
from typing import Literal

from textdiff.commands.arguments import given_text, read_documents
from textdiff.errors import ConfigError, DataError
from textdiff.view.progress import quiet_libraries

_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


def train_tokenizer(
    output: str,
    text: tuple[str, ...],
    /,
    kind: Literal["bpe", "char", "byte"] = "bpe",
    vocab_size: int = 2048,
    text_column: str = "text",
) -> int:
    """Train a tokenizer and save it; use it with `tokenizer: {kind: pretrained, path: OUTPUT}`.

    Args:
        output: folder to write.
        text: files, folders or patterns: text, or rows (.jsonl, .csv, .parquet, ...); `-` reads
            standard input.
        kind: byte-level BPE, characters, or bytes.
        vocab_size: size of a bpe vocabulary, special tokens included.
        text_column: column or key that holds the text in files of rows.
    """
    if kind == "bpe" and vocab_size < 260:
        raise ConfigError(f"--vocab-size {vocab_size}: give at least 260 (256 bytes and specials)")
    if not text:
        raise ConfigError("no text given: name one or more files, or - for standard input")
    folder = _own_folder(given_text("OUTPUT", output))
    quiet_libraries()
    texts = list(read_documents(text, text_column))
    from textdiff.data.encode import encode_documents
    from textdiff.data.sections import TOKENIZERS

    options = {"vocab_size": vocab_size} if kind == "bpe" else {}
    tokenizer = TOKENIZERS.build(kind, options).prepare(texts)
    try:
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise DataError(f"{output} cannot be written ({error.strerror or error})") from None
    tokens = sum(len(ids) for ids in encode_documents(tokenizer, texts))
    size = sum(len(t.encode()) for t in texts)
    print(
        f"{output}: {kind} tokenizer of {len(tokenizer):,} ids, {size / tokens:.2f} bytes per token"
    )
    return 0


def _own_folder(output: str) -> Path:
    """Return the folder to write: a new one, an empty one, or an earlier result of this command.

    Raises:
        ConfigError: anything else is there, which is left as it is.
    """
    folder = Path(os.path.expanduser(output))
    if output.strip() in ("", "-"):
        raise ConfigError(f"OUTPUT {output!r} is not a folder; name the folder to write first")
    parent = next((place for place in folder.absolute().parents if place.exists()), folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"{output} exists and is not a folder; name a new folder")
    if not parent.is_dir() or not os.access(folder if folder.is_dir() else parent, os.W_OK):
        raise ConfigError(f"{output} cannot be written; name a new folder where you may write")
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if inside and not _is_own(folder, inside):
        raise ConfigError(
            f"{output} is not a tokenizer that this command has written: it holds "
            f"{', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''}; name a new folder"
        )
    return folder


def _is_own(folder: Path, names: list[str]) -> bool:
    """Return whether a folder holds a tokenizer of `train_tokenizer` and nothing else."""
    from textdiff.data.sections import EOS, MASK, PAD

    if not set(names) <= _FILES or "tokenizer.json" not in names:
        return False
    try:
        added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
        return [token["content"] for token in added][-3:] == [EOS, PAD, MASK]
    except (OSError, ValueError, KeyError, TypeError):
        return False
