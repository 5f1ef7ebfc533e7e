"""`textdiff tokenizer train`: a tokenizer from text files."""

from typing import Annotated, Literal

import tyro

from textdiff.commands.arguments import TextArgument, given_text
from textdiff.commands.inputs import given_texts
from textdiff.commands.terminal import quiet_libraries
from textdiff.errors import ConfigError


def train_tokenizer(
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")],
    text: TextArgument,
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
    from textdiff.config import BpeTokenizer, ByteTokenizer, CharTokenizer

    if kind == "bpe" and vocab_size < 260:
        raise ConfigError(f"--vocab-size {vocab_size}: give at least 260 (256 bytes and specials)")
    if not text:
        raise ConfigError("no text given: name one or more files, or - for standard input")
    given_text("OUTPUT", output)
    quiet_libraries()
    texts = list(given_texts(text, text_column))
    from textdiff.data import encode_documents
    from textdiff.data import train_tokenizer as fit

    section: BpeTokenizer | CharTokenizer | ByteTokenizer
    if kind == "bpe":
        section = BpeTokenizer(vocab_size=vocab_size)
    else:
        section = CharTokenizer() if kind == "char" else ByteTokenizer()
    tokenizer = fit(section, texts)
    tokenizer.save_pretrained(output)
    tokens = sum(len(ids) for ids in encode_documents(tokenizer, texts))
    size = sum(len(t.encode()) for t in texts)
    print(
        f"{output}: {kind} tokenizer of {len(tokenizer):,} ids, {size / tokens:.2f} bytes per token"
    )
    return 0
