"""Control tokens: those that a chat template writes, kept apart from text that spells them.

The template renders text, in which both look alike. Spelled ones are hidden from it behind a
character that Unicode keeps out of text, and come back as plain text. Those that the template
wrote get names that no text has, in a private copy of the tokenizer's backend.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import (
    Settings,
    added_tokens,
    nameless,
    serialize,
    special_ids,
    without_specials,
)
from textdiff.data.document_stream import brief
from textdiff.data.encode import Ids
from textdiff.errors import DataError

_MARK = "\ufdd0"  # a noncharacter, which Unicode keeps out of text
_CUT = "\uffff\ufffecut\ufffe\uffff"


@dataclass(frozen=True)
class ControlEncoder:
    """Encoder of what a chat template rendered.

    Attributes:
        special: spellings of the special tokens, by id.
        control: these, and other added tokens that the template writes.
        backend: the tokenizer's, in which control tokens have names that no text has.
    """

    special: dict[int, str]
    control: dict[int, str]
    backend: Tokenizer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, template: str) -> "ControlEncoder":
        """Return the encoder of a tokenizer and a chat template; the last ones are kept."""
        special = special_ids(tokenizer)
        written = {
            index
            for index, token in added_tokens(tokenizer).items()
            if index in special or token.content in template
        }
        return _control_encoder(serialize(tokenizer), frozenset(special), frozenset(written))

    @cached_property
    def _spelled(self) -> list[str]:
        return [_MARK, *self.control.values()]

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        return _any_of(self.control.values())

    @cached_property
    def _names(self) -> dict[str, str]:
        return {spelled: nameless(index) for index, spelled in self.control.items()}

    def hide(self, text: str, answer: bool) -> str:
        """Return a message's text with other characters for control tokens that it spells.

        Args:
            text: of a message.
            answer: whether an assistant wrote it, who may write tokens that are not special.
        """
        spelled = (self.special if answer else self.control).values()
        return _any_of([_MARK, *spelled]).sub(
            lambda match: f"{_MARK}{self._spelled.index(match[0])}{_MARK}", text
        )

    def first_special(self, text: str, start: int) -> re.Match[str] | None:
        """Return the first special token from a character of rendered text on; None: none."""
        return _any_of(self.special.values()).search(text, start)

    def encode(self, text: str, cuts: Sequence[int] = ()) -> list[Ids]:
        """Return the ids of rendered text, int32 [tokens] for each piece between two cuts.

        Args:
            text: with `hide` for what messages spell.
            cuts: characters before which one piece ends and another begins, in order.

        Raises:
            DataError: the tokenizer fails at the text.
        """
        edges = [0, *cuts, len(text)]
        pieces = [self._named(text[a:b]) for a, b in pairwise(edges)]
        try:
            encoding = self.backend.encode(_CUT.join(pieces), add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"the tokenizer cannot encode the conversation ({brief(error)}); choose one that "
                "has an unknown token",
                code="not_encoded",
            ) from None
        ids = np.asarray(encoding.ids, dtype=np.int32)  # [tokens, and one for each cut]
        at = np.flatnonzero(ids == self.backend.token_to_id(_CUT))
        return [piece[number > 0 :] for number, piece in enumerate(np.split(ids, at))]

    def _named(self, text: str) -> str:
        """Return rendered text with names for control tokens, and hidden ones as they were."""
        shown = self._controls.sub(lambda match: self._names[match[0]], text)
        return re.sub(f"{_MARK}([0-9]+){_MARK}", lambda m: self._spelled[int(m[1])], shown)


@lru_cache(maxsize=2)  # a vocabulary of 150,000 tokens takes a second to rebuild
def _control_encoder(
    serialized: str, special: frozenset[int], control: frozenset[int]
) -> ControlEncoder:
    settings: Settings = json.loads(serialized)
    spelled = {token["id"]: token["content"] for token in settings["added_tokens"]}
    plain = without_specials(settings, control, every=True)
    added = [
        token | ({"content": nameless(token["id"])} if token["id"] in control else {})
        for token in settings["added_tokens"]
    ]
    backend = Tokenizer.from_str(json.dumps(plain | {"added_tokens": added}))
    backend.no_truncation()
    backend.no_padding()
    backend.add_special_tokens([AddedToken(_CUT, normalized=False)])
    return ControlEncoder(
        {index: text for index, text in spelled.items() if index in special},
        {index: text for index, text in spelled.items() if index in control},
        backend,
    )


def _any_of(spelled: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of strings, the longest first, as tokenizers look for them."""
    return re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))))
