"""Patterns, banned strings and forced ones as one deterministic automaton over the bytes of UTF-8.

Tokens are strings of bytes, and some of them only parts of a character, so characters become
sequences of byte ranges first. A pattern's tree becomes a nondeterministic automaton (Thompson,
1968), and sets of its states the states of a deterministic one.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from textdiff.errors import ConfigError
from textdiff.sampling.constraints.syntax import Chars, Choice, Node, Ranges, Repeat, parse
from textdiff.sampling.constraints.syntax import Sequence as Parts

MOST_STATES = 4000
Span = tuple[int, int]


@dataclass(frozen=True)
class ByteAutomaton:
    """A deterministic automaton; state 0 is the first, -1 a state without a way out.

    Attributes:
        moves: the state after each of the 256 bytes, for every state.
        accepting: whether a text may end in each state.
    """

    moves: list[list[int]]
    accepting: list[bool]


class _Loose:
    """A nondeterministic automaton under construction."""

    def __init__(self) -> None:
        self.free: list[list[int]] = []  # moves without a byte
        self.edges: list[list[tuple[int, int, int]]] = []  # first byte, last byte, next state

    def state(self) -> int:
        self.free.append([])
        self.edges.append([])
        if len(self.free) > 20 * MOST_STATES:
            raise ConfigError("the pattern is too long; repeat less, or give smaller numbers")
        return len(self.free) - 1

    def add(self, node: Node, start: int) -> int:
        """Adds a tree behind a state; returns the state behind it."""
        if isinstance(node, Chars):
            end = self.state()
            for spans in _utf8(node.ranges):
                self._chain(spans, start, end)
            return end
        if isinstance(node, Parts):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, Choice):
            ends = [self.add(part, self._after(start)) for part in node.parts]
            end = self.state()
            for each in ends:
                self.free[each].append(end)
            return end
        return self._repeat(node, start)

    def _repeat(self, node: Repeat, start: int) -> int:
        for _ in range(node.least):
            start = self.add(node.part, start)
        if node.most is None:
            loop, end = self._after(start), self.state()
            back = self.add(node.part, loop)
            self.free[back].append(loop)
            self.free[loop].append(end)
            return end
        exits = [start]
        for _ in range(node.most - node.least):
            start = self.add(node.part, self._after(start))
            exits.append(start)
        end = self.state()
        for each in exits:
            self.free[each].append(end)
        return end

    def _after(self, state: int) -> int:
        following = self.state()
        self.free[state].append(following)
        return following

    def _chain(self, spans: Sequence[Span], start: int, end: int) -> None:
        for low, high in spans[:-1]:
            following = self.state()
            self.edges[start].append((low, high, following))
            start = following
        self.edges[start].append((*spans[-1], end))

    def find(self, text: str, start: int) -> tuple[int, range]:
        """Adds the characters of a text behind a state; the last state, and those on the way."""
        last = self.state()
        self._chain([(byte, byte) for byte in text.encode()], start, last)
        return last, range(last + 1, len(self.free))

    def closure(self, states: set[int]) -> frozenset[int]:
        """All states that these lead to without a byte."""
        found, waiting = set(states), list(states)
        while waiting:
            for following in self.free[waiting.pop()]:
                if following not in found:
                    found.add(following)
                    waiting.append(following)
        return frozenset(found)


def automaton(
    pattern: str | None, banned: Sequence[str], forced: Sequence[str] = ()
) -> ByteAutomaton:
    """Accepts what matches the pattern, holds none of the banned strings and all forced ones.

    Args:
        pattern: a regular expression; None: any text.
        banned: strings.
        forced: strings.

    Raises:
        ConfigError: no regular expression, an empty string, or more states than are handled.
    """
    for what, texts in (("banned", banned), ("forced", forced)):
        if "" in texts:
            raise ConfigError(f"a {what} string is empty; give at least one character")
    loose = _Loose()
    start = loose.state()
    if pattern is None:
        end = start
        loose.edges[start].append((0, 255, start))
    else:
        end = loose.add(parse(pattern), start)
    search = loose.state()  # states before this one are the pattern's
    loose.edges[search].append((0, 255, search))
    caught = {loose.find(text, search)[0] for text in banned}
    found = dict(loose.find(text, search) for text in forced)
    for last in found:
        loose.edges[last].append((0, 255, last))
    return _determined(loose, loose.closure({start, search}), end, search, caught, found)


def _determined(
    loose: _Loose,
    first: frozenset[int],
    end: int,
    search: int,
    caught: set[int],
    found: dict[int, range],
) -> ByteAutomaton:
    """Sets of states as states (Rabin and Scott, 1959).

    Args:
        loose: the states.
        first: those that a text begins in.
        end: the one that the pattern ends in.
        search: this state and later ones are not the pattern's.
        caught: states that a text must not come to.
        found: states that it has to be in at its end, with those on the way to each.
    """
    numbers, waiting = {first: 0}, deque([first])
    ends = {end, *found}
    moves: list[list[int]] = []
    while waiting:
        states = waiting.popleft()
        targets: list[set[int]] = [set() for _ in range(256)]
        for state in states:
            for low, high, following in loose.edges[state]:
                for byte in range(low, high + 1):
                    targets[byte].add(following)
        row, known = [], {}
        for target in targets:
            key = frozenset(target)
            if key not in known:
                reached = loose.closure(target)
                for last, way in found.items():  # what is found need not be looked for again
                    reached = reached.difference(way) if last in reached else reached
                known[key] = reached
            reached = known[key]
            if reached & caught or all(state >= search for state in reached):
                row.append(-1)
                continue
            if reached not in numbers:
                numbers[reached] = len(numbers)
                waiting.append(reached)
                if len(numbers) > MOST_STATES:
                    raise ConfigError(
                        f"the pattern takes more than {MOST_STATES} states; repeat less, or ban "
                        "or force fewer strings"
                    )
            row.append(numbers[reached])
        moves.append(row)
    return ByteAutomaton(moves, [ends <= states for states in numbers])


def _utf8(ranges: Ranges) -> Iterator[tuple[Span, ...]]:
    """Byte ranges, one for each byte, that together are the characters of some ranges."""
    limits = (0x7F, 0x7FF, 0xD7FF, 0xDFFF, 0xFFFF, 0x10FFFF)  # between the third and fourth: none
    for low, high in ranges:
        start = low
        for limit in limits:
            stop = min(high, limit)
            if start <= stop and limit != 0xDFFF:
                yield from _spans(chr(start).encode(), chr(stop).encode())
            start = max(start, limit + 1)


def _spans(low: bytes, high: bytes) -> Iterator[tuple[Span, ...]]:
    """The same for encoded characters of one length."""
    if len(low) == 1:
        yield ((low[0], high[0]),)
        return
    least, most = b"\x80" * (len(low) - 1), b"\xbf" * (len(low) - 1)
    if low[0] == high[0]:
        for rest in _spans(low[1:], high[1:]):
            yield ((low[0], low[0]), *rest)
        return
    first, last = low[0] + (low[1:] != least), high[0] - (high[1:] != most)
    if first != low[0]:
        yield from _spans(low, low[:1] + most)
    if first <= last:
        yield ((first, last), *[(0x80, 0xBF)] * (len(low) - 1))
    if last != high[0]:
        yield from _spans(high[:1] + least, high)
