"""A tokenizer's backend as JSON, and the one that encodes texts.

The backend of a loaded tokenizer may turn text into special tokens: one that spells them out, where
they are ordinary entries of its vocabulary (Unigram always, WordPiece and BPE in part). Here these
entries lose their names, as control symbols have none in SentencePiece, so that such text is
encoded by what else the vocabulary has. Byte tokens (`<0x41>`) keep theirs, which encoding needs;
text that spells one is cut inside it.
"""

import hashlib
import json
import re
from collections.abc import Set
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

Settings = dict[str, Any]

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_CUT = {
    "type": "Split",
    "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_METASPACE = {"Metaspace": {"prepend_scheme": "never"}}
_PREFIX: dict[str, dict[str, dict[str, Any]]] = {
    "normalizer": {},
    "pre_tokenizer": _METASPACE | {"ByteLevel": {"add_prefix_space": False}},
    "decoder": _METASPACE | {"Strip": {"start": 0}},
}
"""By stage and type, settings that leave the beginning of a text alone."""
_SEQUENCES = {"normalizers", "pretokenizers", "decoders"}


class TextBackends(NamedTuple):
    """Backends as JSON that encode text and never give a special token.

    Attributes:
        first: for the beginning of a text.
        later: for text that goes on; the same where a tokenizer treats all text alike.
    """

    first: str
    later: str


def serialize(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the backend as JSON, without the truncation and padding that calls leave in it."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is None and backend.padding is None:
        return str(backend.to_str())
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    return str(backend.to_str())


def text_backends(tokenizer: PreTrainedTokenizerFast) -> TextBackends:
    """Return the backends that encode texts for a tokenizer, which is not changed."""
    return _text_backends(serialize(tokenizer), frozenset(special_ids(tokenizer)))


@lru_cache(maxsize=4)  # every prompt is encoded, and 50,000 tokens take 100 ms to look at
def _text_backends(serialized: str, special: frozenset[int]) -> TextBackends:
    settings: Settings = json.loads(serialized)
    plain = without_specials(settings, special)
    first = serialized if plain == settings else json.dumps(plain)
    going_on = without_prefix(plain)
    return TextBackends(first, first if going_on == plain else json.dumps(going_on))


def encoding_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the hexadecimal SHA-256 of how a tokenizer encodes texts.

    It is `tokenizer_fingerprint` where texts are encoded by the tokenizer's backend as it is.
    """
    backends, own = text_backends(tokenizer), tokenizer_fingerprint(tokenizer)
    if backends == (serialize(tokenizer),) * 2:
        return own
    return hashlib.sha256("\n".join([own, *backends]).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the hexadecimal SHA-256 of a tokenizer's backend and special tokens."""
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{serialize(tokenizer)}\n{special}".encode()).hexdigest()


def added_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, AddedToken]:
    """Return the tokens that were added to the vocabulary, by id."""
    added: dict[int, AddedToken] = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return added


def special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Return the ids of all special tokens, end of text and unknown token included."""
    marked = {token for token, added in added_tokens(tokenizer).items() if added.special}
    return marked | set(tokenizer.all_special_ids)


def unknown_id(settings: Settings, special: Set[int]) -> int | None:
    """Return the id that stands for what a backend cannot encode.

    Args:
        settings: the backend, with the names of its tokens.
        special: ids of special tokens; an ordinary token is not an unknown one.
    """
    model = settings["model"]
    if model["type"] == "Unigram":
        unknown = model.get("unk_id")
    else:
        unknown = model["vocab"].get(model.get("unk_token"))
    return unknown if unknown in special else None


def stages(stage: Settings | None) -> list[Settings]:
    """Return the steps of a normalizer, pre-tokenizer or decoder, in order."""
    if stage is None:
        return []
    for name in stage.keys() & _SEQUENCES:
        return [step for each in stage[name] for step in stages(each)]
    return [stage]


def is_plain_bpe(settings: Settings) -> bool:
    """Return whether a backend is a BPE that gets text as it is, and marks no pieces of it."""
    model = settings["model"]
    return (
        model["type"] == "BPE"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and settings["normalizer"] is None
        and all(token["special"] for token in settings["added_tokens"])
    )


def byte_characters() -> list[str]:
    """Return the printable stand-ins of `pre_tokenizers.ByteLevel`, indexed by byte.

    Printable Latin-1 characters stand for themselves, the other bytes take the code points from
    256 on in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b if b in printable else 256 + others.index(b)) for b in range(256)]


def without_prefix(settings: Settings) -> Settings:
    """Return a backend without what it does to the beginning of a text alone."""
    return settings | {name: _without_prefix(settings[name], name) for name in _PREFIX}


def _without_prefix(step: Settings | None, stage: str) -> Settings | None:
    """Return a step of a stage as it treats the middle of a text; None: nothing is left of it."""
    if step is None or step["type"] == "Prepend":
        return None
    for name in step.keys() & _SEQUENCES:
        inner = [_without_prefix(each, stage) for each in step[name]]
        step = step | {name: [each for each in inner if each is not None]}
    change = _PREFIX[stage].get(step["type"], {})
    return step | {key: value for key, value in change.items() if key in step}


# --- special tokens that text could spell --------------------------------------------------------


def without_specials(settings: Settings, special: Set[int], every: bool = False) -> Settings:
    """Return a backend that gives none of the special ids, but for its unknown token.

    Args:
        settings: the backend.
        special: the ids.
        every: rename their entries in the vocabulary also where no text would come to them.
    """
    model, hidden = _without_names(settings["model"], special, every)
    added = [
        token | {"special": token["special"] or token["id"] in special}
        for token in settings["added_tokens"]
        if token["content"] not in hidden  # its id was the vocabulary's, which still has it
    ]
    changed = settings | {"model": model, "added_tokens": added}
    if _spells_bytes(settings):
        steps = [*stages(settings["pre_tokenizer"]), _CUT]
        changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return changed


def _without_names(model: Settings, special: Set[int], every: bool) -> tuple[Settings, set[str]]:
    """Return a model whose special tokens no text spells, and the names they had."""
    if model["type"] == "Unigram":
        names = {piece for index, (piece, _) in enumerate(model["vocab"]) if index in special}
        vocab: Any = [
            [nameless(index), score] if index in special else [piece, score]
            for index, (piece, score) in enumerate(model["vocab"])
        ]
        return (model | {"vocab": vocab} if names else model), names
    names = {name for name, index in model["vocab"].items() if index in special}
    if model["type"] == "BPE" and not every:
        names = _reachable(model, names)
    if not names:
        return model, names
    vocab = {
        nameless(index) if name in names else name: index for name, index in model["vocab"].items()
    }
    changed = model | {"vocab": vocab}
    if model.get("unk_token") in names:
        changed["unk_token"] = nameless(model["vocab"][model["unk_token"]])
    if model["type"] == "BPE":
        kept = [pair for pair in _pairs(model) if not names & {*pair, _joined(model, pair)}]
        changed["merges"] = [list(pair) for pair in kept]
    return changed, names


def nameless(index: int) -> str:
    """Return a name that text does not spell: it has characters that Unicode keeps out of text."""
    return f"\uffff\ufffe{index}\ufffe\uffff"


def _reachable(model: Settings, names: set[str]) -> set[str]:
    """Return those names that a BPE can come to: by a merge, as one character, or as a word."""
    if not names or model.get("ignore_merges"):
        return names
    merged = {_joined(model, pair) for pair in _pairs(model)}
    affixes = len(model.get("continuing_subword_prefix") or "")
    affixes += len(model.get("end_of_word_suffix") or "")
    return {name for name in names if name in merged or len(name) <= 1 + affixes}


def _pairs(model: Settings) -> list[tuple[str, str]]:
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return [(first, second) for first, second in pairs]


def _joined(model: Settings, pair: tuple[str, str]) -> str:
    return pair[0] + pair[1].removeprefix(model.get("continuing_subword_prefix") or "")


def _spells_bytes(settings: Settings) -> bool:
    """Return whether text that spells a byte token would become it, and so another character."""
    model = settings["model"]
    if all(step["type"] != "ByteFallback" for step in stages(settings["decoder"])):
        return False
    if model["type"] == "Unigram":
        return any(BYTE_TOKEN.fullmatch(piece) for piece, _ in model["vocab"])
    names = {name for name in model["vocab"] if BYTE_TOKEN.fullmatch(name)}
    return bool(names if model["type"] != "BPE" else _reachable(model, names))


# --- tokenizers for a part of a text -------------------------------------------------------------
#
# Tokenizers of SentencePiece's kind put a space before every text, and remove one when they decode.
# A piece of a text, after a hole or cut out of a row, has its own spaces. Some tokenizers put a
# space before a text and leave it there when they decode: no user wrote that one.

_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def continuation(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the tokenizer for text that goes on; itself, if it treats all text alike.

    Args:
        tokenizer: any fast tokenizer; it is not changed.
    """
    settings = json.loads(serialize(tokenizer))
    return _changed(tokenizer, settings, without_prefix(settings))


def opening(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the tokenizer that decodes whole texts; itself, if it adds no space that it leaves.

    Args:
        tokenizer: any fast tokenizer; it is not changed.
    """
    settings: Settings = json.loads(serialize(tokenizer))
    onward = without_prefix(settings)
    adds = any(onward[stage] != settings[stage] for stage in ("normalizer", "pre_tokenizer"))
    if not adds or onward["decoder"] != settings["decoder"]:
        return tokenizer
    steps = [*stages(settings["decoder"]), {"type": "Fuse"}, _STRIP]
    return _changed(
        tokenizer, settings, settings | {"decoder": {"type": "Sequence", "decoders": steps}}
    )


def _changed(
    tokenizer: PreTrainedTokenizerFast, settings: Settings, wanted: Settings
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with other settings; itself, if they are the same."""
    if wanted == settings:
        return tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(wanted)),
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        **tokenizer.special_tokens_map,
    )
