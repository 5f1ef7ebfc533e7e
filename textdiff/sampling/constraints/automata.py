"""Patterns, banned and forced strings as one deterministic automaton, over bytes and over tokens.

Sets of states of a nondeterministic automaton are the states of a deterministic one. Tokens that
lead from every state to the same one are one class: a pattern of a few states distinguishes few
classes, so that sums over the vocabulary become sums over classes. Letters: Q states, the last of
which has no way out, V vocabulary, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from textdiff.errors import ConfigError
from textdiff.models.devices import to_device
from textdiff.sampling.constraints.expressions import Nondeterministic, read

MOST_STATES = 4000
MOST_ENTRIES = 200_000_000


@dataclass(frozen=True)
class ByteAutomaton:
    """A deterministic automaton; state 0 is the first, -1 a state without a way out.

    Attributes:
        moves: the state after each of the 256 bytes, for every state.
        accepting: whether a text may end in each state.
    """

    moves: list[list[int]]
    accepting: list[bool]


def byte_automaton(
    pattern: str | None, banned: Sequence[str], forced: Sequence[str] = ()
) -> ByteAutomaton:
    """Accept texts that match the pattern, without banned strings and with all forced ones.

    Args:
        pattern: a regular expression; None: any text.
        banned: strings.
        forced: strings.

    Raises:
        ConfigError: not a regular expression, an empty string, or too many states.
    """
    for adjective, texts in (("banned", banned), ("forced", forced)):
        if "" in texts:
            raise ConfigError(
                f"a {adjective} string is empty; give at least one character", code="empty_string"
            )
    machine = Nondeterministic()
    start = end = machine.state()
    if pattern is None:
        machine.edges[start].append((0, 255, start))
    else:
        end = read(pattern, machine)(start)
    search = machine.state()  # states before this one are the pattern's
    machine.edges[search].append((0, 255, search))
    dead = {machine.text(text, search)[0] for text in banned}
    ways = dict(machine.text(text, search) for text in forced)
    for last in ways:
        machine.edges[last].append((0, 255, last))

    def after(states: set[int]) -> frozenset[int] | None:
        """Return the states that these lead to; None: no text goes on from them."""
        reached = machine.closure(states)
        for last, way in ways.items():  # what stands already need not be looked for again
            reached = reached.difference(way) if last in reached else reached
        stuck = reached & dead or all(state >= search for state in reached)
        return None if stuck else reached

    moves, states = _determined(machine, machine.closure({start, search}), after)
    return ByteAutomaton(moves, [{end, *ways} <= each for each in states])


def _determined(
    machine: Nondeterministic,
    first: frozenset[int],
    after: Callable[[set[int]], frozenset[int] | None],
) -> tuple[list[list[int]], list[frozenset[int]]]:
    """Return moves between sets of states (Rabin and Scott, 1959), and the sets."""
    waiting, moves = [first], []
    numbers: dict[frozenset[int] | None, int] = {waiting[0]: 0, None: -1}
    for states in waiting:  # grows
        targets: list[set[int]] = [set() for _ in range(256)]
        for state in states:
            for low, high, following in machine.edges[state]:
                for byte in range(low, high + 1):
                    targets[byte].add(following)
        keys = [frozenset(target) for target in targets]
        reached = {key: after(set(key)) for key in dict.fromkeys(keys)}
        for new in reached.values():
            if new is not None and new not in numbers:
                numbers[new] = len(waiting)
                waiting.append(new)
        if len(waiting) > MOST_STATES:
            raise ConfigError(
                f"the pattern takes more than {MOST_STATES} states; repeat less, or ban or force "
                "fewer strings",
                code="pattern_too_large",
            )
        moves.append([numbers[reached[key]] for key in keys])
    return moves, waiting


@dataclass(frozen=True)
class TokenAutomaton:
    """Moves from state to state, by tokens.

    Attributes:
        moves: [Q, C] state after a token of each class.
        classes: [V] class of each token.
        inner: [Q] bool: whether a hole that text follows may end in each state.
        final: [Q] bool: whether an open end may; there the end-of-text token is a way to end.
        end_class: class of the end-of-text token, which is its own; None: the model draws none.
    """

    moves: Tensor
    classes: Tensor
    inner: Tensor
    final: Tensor
    end_class: int | None

    @classmethod
    def of(
        cls,
        machine: ByteAutomaton,
        tokens: Sequence[bytes | None],
        end_token: int | None,
        device: torch.device,
    ) -> "TokenAutomaton":
        """Return the automaton of a tokenizer.

        Args:
            machine: accepted texts, as bytes.
            tokens: [V] the bytes of each token; None for those that are never drawn.
            end_token: id of the end-of-text token. After it, anything may stand.
            device: where the model is.

        Raises:
            ConfigError: the table would be too large.
        """
        states = len(machine.moves)
        if states * len(tokens) > MOST_ENTRIES:
            raise ConfigError(
                f"the pattern has {states} states, which is too many for {len(tokens)} tokens; "
                "repeat less",
                code="pattern_too_large",
            )
        # After the machine's own states: one after the end of the text, one without a way out.
        ended, stuck = states, states + 1
        by_byte = torch.tensor([*machine.moves, [stuck] * 256, [stuck] * 256])  # [Q, 256]
        by_byte[by_byte < 0] = stuck
        moves, known = _by_token(by_byte, tokens), torch.tensor([bool(token) for token in tokens])
        moves[:, ~known] = stuck
        moves[ended] = torch.where(known, ended, stuck)
        accepting = torch.tensor([*machine.accepting, False, False])
        final = accepting.clone()
        if end_token is not None:
            moves[:, end_token] = torch.where(accepting, ended, stuck)
            moves[ended, end_token] = ended
            final[ended] = True
        columns, classes = torch.unique(moves, dim=1, return_inverse=True)  # [Q, C], [V]
        end_class = None
        if end_token is not None:
            end_class = columns.shape[1]
            columns = torch.cat([columns, moves[:, end_token : end_token + 1]], dim=1)
            classes[end_token] = end_class
        moves, classes = to_device(columns, device), to_device(classes, device)
        accepting, final = to_device(accepting, device), to_device(final, device)
        return cls(moves, classes, accepting, final, end_class)

    @cached_property
    def used(self) -> Tensor:
        """[C] bool: classes that hold a token."""
        none = torch.zeros(self.moves.shape[1], dtype=torch.bool, device=self.moves.device)
        return none.index_fill(0, self.classes, True)  # counting them would wait for the device

    def before(self, ahead: Tensor, ending: bool = True) -> Tensor:
        """Return [..., Q] log-weights of states one open place earlier: 0 where a token leads on.

        Args:
            ahead: [..., Q] log-weights of states after the place.
            ending: whether the end-of-text token may stand there.
        """
        usable = self.used.clone()
        if self.end_class is not None and not ending:
            usable[self.end_class] = False
        paths = ahead[..., self.moves]  # [..., Q, C]
        return paths.masked_fill(~usable, -torch.inf).amax(-1)


def _by_token(by_byte: Tensor, tokens: Sequence[bytes | None]) -> Tensor:
    """Return [Q, V] the state after each token, from that after each byte [Q, 256]."""
    spelled = [token or b"" for token in tokens]
    lengths = torch.tensor([len(token) for token in spelled])
    text = torch.tensor(list(b"".join(spelled)), dtype=torch.int64)
    starts = lengths.cumsum(0) - lengths
    order = lengths.argsort(descending=True)  # most tokens are much shorter than the longest
    moves = torch.arange(len(by_byte))[:, None].repeat(1, len(tokens))
    for index in range(int(lengths.max())):
        longer = order[: int((lengths > index).sum())]
        moves[:, : len(longer)] = by_byte[moves[:, : len(longer)], text[starts[longer] + index]]
    return moves[:, order.argsort()]
