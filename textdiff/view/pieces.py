"""Tokens as strings, one for each position, which together are the text.

A character may take several tokens, and what a token looks like may depend on the one before it.
So the strings are cut out of what neighbours decode to together: a character belongs to the token
that completes it.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import continuation, opening

END = "∎"
"""How an end-of-text token is shown."""

_BEGINNING = -1  # stands for the token before a text
_BROKEN = "\ufffd"
_LONGEST = 4  # bytes of a character, and so tokens


class Pieces:
    """Decodes token by token.

    Args:
        tokenizer: the model's.
        hidden: ids that have no text: the mask.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, hidden: Sequence[int]):
        self.tokenizer, self.hidden = tokenizer, frozenset(hidden)
        self.onward, self.opening = continuation(tokenizer), opening(tokenizer)
        self.special = {
            token: END if token == tokenizer.eos_token_id else str(tokenizer.decode([token]))
            for token in tokenizer.all_special_ids
        }
        self._after = lru_cache(maxsize=1 << 16)(self._decode_after)

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """The string of each token; empty for hidden ones, and where a later token completes it."""
        shown = [""] * len(ids)
        run = _Run(self._after, shown)
        for at, token in enumerate(ids):
            if token in self.hidden or token in self.special:
                run.close(at)
                shown[at] = self.special.get(token, "") if token not in self.hidden else ""
            else:
                run.add(at, token)
        run.close(len(ids))
        return shown

    def _decode_after(self, before: int | None, tokens: tuple[int, ...]) -> str:
        alone = str((self.opening if before == _BEGINNING else self.onward).decode(list(tokens)))
        if before is None or before == _BEGINNING:
            return alone
        first = str(self.tokenizer.decode([before]))
        both = str(self.tokenizer.decode([before, *tokens]))
        return both[len(first) :] if both.startswith(first) else alone


class _Run:
    """Neighbouring tokens with text, told apart as they come.

    Args:
        after: decodes tokens after the one before them.
        shown: where the strings of all positions go.
    """

    def __init__(self, after: Callable[[int | None, tuple[int, ...]], str], shown: list[str]):
        self.after, self.shown = after, shown
        self.before: int | None = _BEGINNING
        self.pending: list[int] = []  # tokens since a character was complete
        self.told = 0  # characters of these that are shown already

    def add(self, at: int, token: int) -> None:
        """Shows what the token completes."""
        self.pending.append(token)
        text = self.after(self.before, tuple(self.pending))
        if text[self.told :].strip(_BROKEN):
            self._show(at, text[self.told : len(text) - text.endswith(_BROKEN)])
            if text.endswith(_BROKEN):  # it also begins the next character
                self.before, self.pending = None, [token]
                self.told = len(self.after(None, (token,))) - 1
            else:
                self.before, self.pending, self.told = token, [], 0
        elif len(self.pending) > _LONGEST:  # the first of them belongs to no character
            self.shown[at - _LONGEST] += text[:1]
            self.before, self.pending, self.told = None, self.pending[1:], 0

    def _show(self, at: int, new: str) -> None:
        """A token's string; bytes of no character, before one, are those of the token before."""
        broken = len(new) - len(new.lstrip(_BROKEN)) if len(self.pending) > 1 else 0
        self.shown[at - 1] += new[:broken]
        self.shown[at] = new[broken:]

    def close(self, end: int) -> None:
        """What comes next is no neighbour: half a character is shown where its last token is."""
        if self.pending:
            text = self.after(self.before, tuple(self.pending))
            self.shown[end - 1] += text[self.told :]
        self.before, self.pending, self.told = None, [], 0
