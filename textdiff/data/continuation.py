"""Tokenizers for a part of a text: its beginning, which decodes to itself, and what goes on.

Tokenizers of SentencePiece's kind put a space before every text, and take one away when they
decode. A piece of a text is no text: behind a hole, or cut out of a row, it has its own spaces.
Some put a space before a text and leave it there when they decode: nobody wrote that one.
"""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import Settings, serialize, stages, without_prefix

_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def continuation(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer for text that goes on; itself, if it treats all text alike.

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
