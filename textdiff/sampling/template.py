"""Texts with holes: `The [MASK:5] sat` is given but for five tokens.

`[MASK]` is a hole of one token, `[MASK:n]` one of n; `\\[MASK` stands for the characters `[MASK`.
What is given is cut into tokens piece by piece, each piece between two holes on its own. What some
tokenizers do to the beginning of a text they do to the first piece alone, if no hole precedes it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.data.losses import encode_checked
from textdiff.errors import ConfigError, DataError
from textdiff.sampling.settings import MOST_TOKENS

HOLE = re.compile(r"(?<!\\)\[MASK(?:\]|:([^\]\n]*)\])")
MISSPELT = re.compile(r"(?<!\\)\[MASK(?=[:\s\d]|$)[^\]\n]{,20}\]?")
LENGTH = re.compile(r"[0-9]{1,9}")
ESCAPED = "\\[MASK"


@dataclass(frozen=True)
class ParsedPrompt:
    """Fixed part of one row as tokens.

    Attributes:
        tokens: token ids, None where a place is open; for a plain prompt all are given.
        suffix: token ids that follow what is generated after `tokens`.
        template: whether its length is fixed: it has holes of its own.
        lost: what the model does not see of the given text as it is written, in sentences.
        ends: tokens that end what is generated, besides the end-of-text token.
    """

    tokens: tuple[int | None, ...]
    suffix: tuple[int, ...] = ()
    template: bool = False
    lost: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()


def pieces_of(text: str) -> list[str | int]:
    """Given strings and lengths of holes, in order; empty strings are left out.

    Raises:
        ConfigError: a hole whose length is not a whole number of 1 or more, or that is not closed.
    """
    pieces: list[str | int] = []
    end = 0
    wrong = MISSPELT.search(HOLE.sub("", text))
    if wrong:
        raise ConfigError(
            f"{wrong[0]!r} in the prompt is not a hole: write [MASK:n] for n tokens, or \\[MASK "
            "for these characters",
            code="not_a_hole",
        )
    for hole in HOLE.finditer(text):
        digits = "1" if hole[1] is None else hole[1].strip()
        if not (LENGTH.fullmatch(digits) and 0 < int(digits) <= MOST_TOKENS):
            raise ConfigError(
                f"hole {hole[0]:.40} at character {hole.start() + 1} of the template: give its "
                f"length in tokens, 1 to {MOST_TOKENS}, such as [MASK:5]",
                code="wrong_length_of_hole",
            )
        pieces += [text[end : hole.start()], int(digits)]
        end = hole.end()
    pieces.append(text[end:])
    return [p.replace(ESCAPED, "[MASK") if isinstance(p, str) else p for p in pieces if p != ""]


def quoted(text: str) -> str:
    """Return the prompt that stands for a text, whatever holes the text seems to have."""
    return text.replace("[MASK", ESCAPED)


def parse_prompts(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    suffixes: Sequence[str],
    clean: Tensor,
) -> list[ParsedPrompt]:
    """Return the fixed part of each text as tokens.

    Args:
        tokenizer: the model's.
        texts: prompts or templates.
        suffixes: what follows each; the empty string is nothing.
        clean: [V] bool, ids that the model can predict.

    Raises:
        ConfigError: see `pieces_of`, and a suffix to a text that has holes of its own.
        DataError: characters that the tokenizer was not trained on.
    """
    split = [pieces_of(text) for text in texts]
    encoded = iter(_encoded(tokenizer, _given_texts(split, suffixes), clean))
    forms = []
    for pieces, suffix in zip(split, suffixes, strict=True):
        holes = any(isinstance(piece, int) for piece in pieces)
        if holes and suffix:
            raise ConfigError(
                "a suffix follows what is generated after a prompt; in a template with holes write "
                "it after the last hole",
                code="suffix_of_template",
            )
        row: list[int | None] = []
        lost: list[str] = []
        for piece in pieces:
            if isinstance(piece, int):
                row += [None] * piece
            else:
                ids, what = next(encoded)
                row += ids
                lost += what
        after, what = next(encoded) if suffix else ([], [])
        forms.append(ParsedPrompt(tuple(row), tuple(after), holes, (*lost, *what)))
    return forms


@dataclass(frozen=True)
class _Given:
    """A piece of given text.

    Attributes:
        text: the piece.
        later: whether it goes on from what stands before it.
        whole: whether it is a whole prompt, or a suffix.
    """

    text: str
    later: bool
    whole: bool


def _given_texts(split: Sequence[list[str | int]], suffixes: Sequence[str]) -> list[_Given]:
    given = []
    for pieces, suffix in zip(split, suffixes, strict=True):
        for number, piece in enumerate(pieces):
            if isinstance(piece, str):
                given.append(_Given(piece, later=number > 0, whole=len(pieces) == 1))
        if suffix:
            given.append(_Given(suffix, later=True, whole=True))
    return given


def _encoded(
    tokenizer: PreTrainedTokenizerFast, given: Sequence[_Given], clean: Tensor
) -> list[tuple[list[int], list[str]]]:
    """Return the tokens of each piece, and in words what they do not give back of it.

    Raises:
        DataError: tokens that the model cannot predict, or nothing is left of a prompt or suffix.
    """
    texts, later = [piece.text for piece in given], [piece.later for piece in given]
    encoded = encode_checked(tokenizer, texts, later)
    pieces = []
    for number, (piece, ids) in enumerate(zip(given, encoded.ids, strict=True)):
        if not bool(clean[torch.from_numpy(ids).long()].all()):
            raise DataError(
                f"the prompt {piece.text!r:.60} has characters that the tokenizer was not trained "
                "on",
                code="foreign_characters",
            )
        loss = encoded.losses.get(number)
        if loss is not None and bool((ids == encoded.unknown).all()) and piece.whole:
            raise DataError(
                f"nothing is left of the prompt {piece.text!r:.60} in tokens: the tokenizer does "
                "not know what stands in it; write another, or use another model",
                code="nothing_left_of_prompt",
            )
        said = f"the model does not see {piece.text!r:.60} as it is written: its tokenizer loses "
        pieces.append((ids.tolist(), [] if loss is None else [f"{said}a part ({loss})"]))
    return pieces
