"""Losses of tokenizers: text that does not come back when its token ids are decoded.

A figure per byte bounds the likelihood of a text only if the tokens are the text: if the text
follows from them. Whether it does is decided by decoding, text by text. The space that some
tokenizers put before a text is theirs to add and to take away; everything else has to come back:
letter case, accents, white space, and every character (an unknown token stands for any of them).

Two kinds of tokenizers need no decoding, and their backend says so: byte-level BPE without a
normaliser loses nothing, and one that looks up pieces as they stand loses what is unknown to it.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import (
    Settings,
    TextBackends,
    byte_characters,
    is_plain_bpe,
    serialize,
    special_ids,
    stages,
    text_backends,
    unknown_id,
    without_prefix,
)
from textdiff.data.encode import Ids, encoder_of, readable

_SHOWN = 24  # characters of a text in a message


@dataclass(frozen=True)
class Loss:
    """First difference between a text and what its tokens give back.

    Attributes:
        unknown: unknown tokens among them.
        at: first character that does not come back as it is.
        text: the text from there on, its beginning.
        back: what the tokens give in its place.
    """

    unknown: int
    at: int
    text: str
    back: str

    def __str__(self) -> str:
        unknown = f"{self.unknown} unknown token(s), " if self.unknown else ""
        return f"{unknown}{self.text!r} at character {self.at + 1} comes back as {self.back!r}"


@dataclass(frozen=True)
class Encoded:
    """Texts as tokens.

    Attributes:
        ids: int32 [tokens] of each text.
        losses: by text, what its tokens do not give back; texts that lose nothing are left out.
        unknown: id of the unknown token; None: the tokenizer has none.
    """

    ids: list[Ids]
    losses: Mapping[int, Loss]
    unknown: int | None


def encode_checked(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    later: Iterable[bool] = repeat(False),
) -> Encoded:
    """Encode texts as `encode_documents` does, and compare what their tokens give back.

    Args:
        tokenizer: any fast tokenizer; it is not changed.
        texts: whole documents, or pieces of them.
        later: whether each goes on from a piece before it.

    Raises:
        DataError: half of a surrogate pair, or a text that the tokenizer fails at.
    """
    documents = readable(texts)
    goes_on = [flag for flag, _ in zip(later, documents, strict=False)]
    backends = text_backends(tokenizer)
    encoder = encoder_of(backends)
    ids = encoder(documents, goes_on)
    serialized = serialize(tokenizer)
    proven, unknown = _facts(backends, serialized, frozenset(special_ids(tokenizer)))
    if proven and unknown is None:
        return Encoded(ids, {}, None)
    checked = [i for i, x in enumerate(ids) if not proven or (x == unknown).any()]
    if not checked:
        return Encoded(ids, {}, unknown)
    decode = _decoder(json.loads(serialized))

    def encode(text: str) -> Ids:
        return encoder([text])[0]

    compared = {
        index: _loss(documents[index], ids[index], goes_on[index], unknown, decode, encode)
        for index in checked
    }
    losses = {index: loss for index, loss in compared.items() if loss is not None}
    return Encoded(ids, losses, unknown)


@lru_cache(maxsize=4)
def _facts(
    backends: TextBackends, serialized: str, special: frozenset[int]
) -> tuple[bool, int | None]:
    """Return facts about all texts that follow from a tokenizer's settings.

    Returns:
        Whether texts without an unknown token lose nothing, and the id of the unknown token; None:
        there is none, or no text gives it.
    """
    settings = json.loads(backends.first)
    alike = backends.first == backends.later
    if alike and loses_nothing(settings):
        return True, None
    unknown = unknown_id(json.loads(serialized), special)
    return alike and loses_the_unknown(settings, unknown), unknown


def _decoder(names: Settings) -> Callable[[Ids], str]:
    """Return a function that turns ids into text, a space that was put before it included."""
    backend = Tokenizer.from_str(json.dumps(without_prefix(names)))
    return lambda ids: str(backend.decode(ids.tolist(), skip_special_tokens=False))


def _loss(
    text: str,
    ids: Ids,
    goes_on: bool,
    unknown: int | None,
    decode: Callable[[Ids], str],
    encode: Callable[[str], Ids],
) -> Loss | None:
    """Return the loss of one text; None: it comes back as it is.

    Ids stand for the text without the space at its beginning where that has the same ids.
    """
    back = decode(ids)
    count = 0 if unknown is None else int((ids == unknown).sum())
    if (
        not goes_on
        and back.startswith(" ")
        and (back[1:] == text or np.array_equal(encode(back[1:]), ids))
    ):
        back = back[1:]
    if back == text and not count:
        return None
    if not goes_on and back.startswith(" ") and not text.startswith(" "):
        back = back[1:]  # put there by the tokenizer, and no part of what is lost
    pairs = enumerate(zip(text, back, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
    return Loss(count, at, text[at : at + _SHOWN], back[at : at + _SHOWN])


def loses_nothing(settings: Settings) -> bool:
    """Return whether every text follows from its tokens, as far as a backend alone shows it.

    It does for byte-level BPE: the stand-ins of all bytes are in the vocabulary, nothing changes
    or drops a character before they are looked up, and the decoder undoes it.
    """
    steps = stages(settings["pre_tokenizer"])
    if not steps or not is_plain_bpe(settings):
        return False
    kept = all(
        step["type"] == "Digits"
        or (step["type"] in ("Split", "Punctuation") and step["behavior"] != "Removed")
        for step in steps[:-1]
    )
    return (
        kept
        and steps[-1]["type"] == "ByteLevel"
        and not steps[-1]["add_prefix_space"]
        and set(byte_characters()) <= settings["model"]["vocab"].keys()
        and [step["type"] for step in stages(settings["decoder"])] == ["ByteLevel"]
    )


def loses_the_unknown(settings: Settings, unknown: int | None) -> bool:
    """Return whether a text without unknown tokens follows from its tokens; see `loses_nothing`.

    It does where pieces of the text are looked up as they are, and joined when they are decoded.
    """
    return (
        unknown is not None
        and is_plain_bpe(settings)
        and not settings["model"].get("byte_fallback")
        and settings["pre_tokenizer"] is None
        and [step["type"] for step in stages(settings["decoder"])] == ["Fuse"]
    )
