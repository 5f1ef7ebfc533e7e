"""An automaton over tokens, made from one over bytes.

Tokens that lead from every state to the same one are one class: a pattern of a few states tells
few classes apart, so that sums over the vocabulary become sums over classes. Letters: Q states, the
last of which has no way out, V vocabulary, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from textdiff.errors import ConfigError
from textdiff.sampling.constraints.bytewise import ByteAutomaton

MOST_ENTRIES = 200_000_000


@dataclass(frozen=True)
class TokenAutomaton:
    """What each token does to each state.

    Attributes:
        moves: [Q, C] state after a token of each class.
        classes: [V] class of each token.
        inner: [Q] bool: whether a hole that text follows may end in each state.
        final: [Q] bool: whether an open end may; there the end-of-text token is a way to end.
        end_class: class of the end-of-text token, which is its own; None: there is no such token.
    """

    moves: Tensor
    classes: Tensor
    inner: Tensor
    final: Tensor
    end_class: int | None

    @classmethod
    def of(
        cls, machine: ByteAutomaton, tokens: Sequence[bytes | None], end_token: int | None
    ) -> "TokenAutomaton":
        """The automaton of a tokenizer.

        Args:
            machine: what texts are accepted, as bytes.
            tokens: [V] the bytes of each token; None for those that are never drawn.
            end_token: id of the end-of-text token. Behind it, anything may stand.

        Raises:
            ConfigError: the table would be too large.
        """
        states = len(machine.moves)
        if states * len(tokens) > MOST_ENTRIES:
            raise ConfigError(
                f"the pattern has {states} states, which is too many for {len(tokens)} tokens; "
                "repeat less"
            )
        # Behind the machine's own states: one after the end of the text, one without a way out.
        ended, stuck = states, states + 1
        by_byte = torch.tensor([*machine.moves, [stuck] * 256, [stuck] * 256])
        by_byte[by_byte < 0] = stuck
        lengths = torch.tensor([len(token or b"") for token in tokens])
        text = torch.tensor(list(b"".join(token or b"" for token in tokens)), dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        order = lengths.argsort(descending=True)  # most tokens are much shorter than the longest
        moves = torch.arange(states + 2)[:, None].repeat(1, len(tokens))
        for index in range(int(lengths.max())):
            longer = order[: int((lengths > index).sum())]
            moves[:, : len(longer)] = by_byte[moves[:, : len(longer)], text[starts[longer] + index]]
        moves = moves[:, order.argsort()]
        known = lengths > 0
        moves[:, ~known] = stuck
        moves[ended] = torch.where(known, ended, stuck)
        accepting = torch.tensor([*machine.accepting, False, False])
        if end_token is not None:
            moves[:, end_token] = torch.where(accepting, ended, stuck)
            moves[ended, end_token] = ended
        columns, classes = torch.unique(moves, dim=1, return_inverse=True)
        end_class = None
        if end_token is not None:
            end_class = columns.shape[1]
            columns = torch.cat([columns, moves[:, end_token : end_token + 1]], dim=1)
            classes[end_token] = end_class
        final = accepting.clone()
        final[ended] = end_token is not None
        return cls(columns, classes, accepting, final, end_class)

    def to(self, device: torch.device) -> "TokenAutomaton":
        """The same on another device."""
        return TokenAutomaton(
            self.moves.to(device),
            self.classes.to(device),
            self.inner.to(device),
            self.final.to(device),
            self.end_class,
        )

    @cached_property
    def used(self) -> Tensor:
        """[C] bool: classes that hold a token that leads anywhere."""
        count = torch.bincount(self.classes, minlength=self.moves.shape[1])
        return count > 0

    def before(self, ahead: Tensor, ending: bool = True) -> Tensor:
        """[..., Q] log-weights of states one open place earlier: 0 where any token leads on.

        Args:
            ahead: [..., Q] log-weights of states behind the place.
            ending: whether the end-of-text token may stand there.
        """
        usable = self.used.clone()
        if self.end_class is not None and not ending:
            usable[self.end_class] = False
        paths = ahead[..., self.moves]  # [..., Q, C]
        return paths.masked_fill(~usable, -torch.inf).amax(-1)
