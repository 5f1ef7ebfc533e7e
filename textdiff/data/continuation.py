"""Text that goes on: tokenizers without what they do to the beginning of a text alone.

Tokenizers of SentencePiece's kind put a space before every text, and take one away when they
decode. A piece of a text is no text: behind a hole, or cut out of a row, it has its own spaces.
"""

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from textdiff.data.encode import serialize

Part = dict[str, Any] | None

_METASPACE = {"Metaspace": {"prepend_scheme": "never"}}
_PREFIX: dict[str, dict[str, dict[str, Any]]] = {
    "normalizer": {},
    "pre_tokenizer": _METASPACE | {"ByteLevel": {"add_prefix_space": False}},
    "decoder": _METASPACE | {"Strip": {"start": 0}},
}
"""By stage and type, what has nothing to do with the beginning of a text."""


def continuation(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer for text that goes on; itself, if it treats all text alike.

    Args:
        tokenizer: any fast tokenizer; it is not changed.
    """
    settings = json.loads(serialize(tokenizer))
    mended = {name: _plain(settings[name], name) for name in _PREFIX}
    if all(settings[name] == stage for name, stage in mended.items()):
        return tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings | mended)),
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        **tokenizer.special_tokens_map,
    )


def _plain(part: Part, stage: str) -> Part:
    """A part of a stage as it treats the middle of a text; None: nothing is left of it."""
    if part is None or part["type"] == "Prepend":
        return None
    for name in part.keys() & {"normalizers", "pretokenizers", "decoders"}:
        inner = [_plain(each, stage) for each in part[name]]
        part = part | {name: [each for each in inner if each is not None]}
    change = _PREFIX[stage].get(part["type"], {})
    return part | {key: value for key, value in change.items() if key in part}
