"""Results: token rows as texts, each up to its end, and all rows of a generation."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise

from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import continuation, opening
from textdiff.sampling.callbacks import FinishedRow
from textdiff.sampling.request import Request


@dataclass(frozen=True)
class Generation:
    """Finished rows.

    Attributes:
        texts: each row whole, special tokens removed.
        completions: what follows the prompt, up to the end-of-text token; of a row with fixed text
            between or after holes, all from its first hole to its last.
        holes: what was written into each hole of each row; a plain prompt has one, its completion.
        sequences: token ids of each row, fixed ones included.
        calls: network calls (of all active rows each).
        tokens_per_forward: tokens written per row and network call.
        lost: what the model did not see of the prompts as it is written, in sentences.
    """

    texts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    holes: list[list[str]] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    calls: int = 0
    tokens_per_forward: float = 0.0
    lost: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, rows: Iterable[FinishedRow], calls: int, row_calls: int, lost: tuple[str, ...]
    ) -> "Generation":
        """Return the rows of a generation and what they took."""
        rows = list(rows)
        return cls(
            texts=[row.text for row in rows],
            completions=[row.completion for row in rows],
            holes=[row.holes for row in rows],
            sequences=[row.tokens for row in rows],
            calls=calls,
            tokens_per_forward=sum(row.new_tokens for row in rows) / max(1, row_calls),
            lost=lost,
        )


@dataclass
class RowReader:
    """Decoder of token rows.

    Attributes:
        tokenizer: the model's.
    """

    tokenizer: PreTrainedTokenizerFast

    def decode(self, ids: Sequence[int]) -> str:
        """Return token ids as text, without special tokens and a space that the tokenizer added."""
        return str(self._opening.decode(list(ids), skip_special_tokens=True))

    def until_end(self, ids: Sequence[int], start: int = 0) -> list[int]:
        """Return a row up to the first end-of-text token from `start` on."""
        ids, end = list(ids), self.tokenizer.eos_token_id
        return ids[: ids.index(end, start)] if end in ids[start:] else ids

    def piece(self, ids: list[int], start: int, stop: int) -> str:
        """Return some tokens of a row as its text has them; its beginning may be special."""
        tokenizer = self._onward if start else self._opening
        return str(tokenizer.decode(ids[start:stop], skip_special_tokens=True))

    def finish(self, request: Request, row: int, ids: list[int]) -> FinishedRow:
        """Return the result of a row whose tokens are known."""
        seed, index = request.job.row_keys[row]
        tail, spans = int(request.job.tails[row]), request.job.holes(row)
        whole = self.until_end(ids, tail)
        new = self.piece(ids, tail, len(whole))
        cut = min((new.find(stop) for stop in request.config.stop if stop in new), default=len(new))
        holes = [self.piece(ids, start, end) for start, end in spans]
        if spans[-1][0] == tail:  # the open end, which ends where the text does
            holes[-1] = new[:cut]
        between = [self.piece(ids, a, b) for (_, a), (b, _) in pairwise(spans)]
        text = self.decode(whole)
        return FinishedRow(
            seed=seed,
            index=index,
            text=text[: len(text) - (len(new) - cut)],
            completion="".join(chain.from_iterable(zip(holes, [*between, ""], strict=True))),
            holes=holes,
            tokens=ids,
            new_tokens=sum(min(end, len(ids)) - start for start, end in spans),
        )

    def ending(self, stops: Sequence[str]) -> Callable[[Sequence[int], int], bool]:
        """Return a test of new tokens, so many of them fresh: whether they end a text."""
        # A token is a byte at least: earlier ones cannot belong to a stop string that is new.
        reach = max((len(stop.encode()) for stop in stops), default=0)

        def ended(new: Sequence[int], fresh: int) -> bool:
            if self.tokenizer.eos_token_id in new[len(new) - fresh :]:
                return True
            last = self.decode(new[max(0, len(new) - fresh - reach) :]) if stops else ""
            return any(stop in last for stop in stops)

        return ended

    @cached_property
    def _opening(self) -> PreTrainedTokenizerFast:
        """The tokenizer for whole texts."""
        return opening(self.tokenizer)

    @cached_property
    def _onward(self) -> PreTrainedTokenizerFast:
        """The tokenizer for text that goes on."""
        return continuation(self.tokenizer)
