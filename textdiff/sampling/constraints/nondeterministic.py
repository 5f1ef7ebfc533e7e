"""Nondeterministic automata over the bytes of UTF-8 (Thompson, 1968).

Tokens are strings of bytes, and some of them only parts of a character, so characters become
sequences of byte ranges first.
"""

from collections.abc import Callable, Iterator, Sequence

from textdiff.errors import ConfigError

MOST_STATES = 80_000
Span = tuple[int, int]
Ranges = tuple[Span, ...]
"""Code points, as ranges with both ends."""

Add = Callable[[int], int]


class Nondeterministic:
    """An automaton under construction; every method adds to a state and returns the state after."""

    def __init__(self) -> None:
        self.free: list[list[int]] = []  # moves without a byte
        self.edges: list[list[tuple[int, int, int]]] = []  # first byte, last byte, next state

    def state(self, *before: int) -> int:
        """Add a state that others lead to without a byte."""
        self.free.append([])
        self.edges.append([])
        number = len(self.free) - 1
        if number >= MOST_STATES:
            raise ConfigError(
                "the pattern is too long; repeat less, or give smaller numbers",
                code="pattern_too_large",
            )
        for state in before:
            self.free[state].append(number)
        return number

    def characters(self, ranges: Ranges, start: int) -> int:
        """Add one character of some ranges."""
        end = self.state()
        for spans in _utf8(ranges):
            self._chain(spans, start, end)
        return end

    def choice(self, branches: Sequence[Add], start: int) -> int:
        """Add one of several branches."""
        return self.state(*[add(self.state(start)) for add in branches])

    def repetition(self, add: Add, least: int, most: int | None, start: int) -> int:
        """Add a piece from `least` to `most` times; `most` None: without end."""
        for _ in range(least):
            start = add(start)
        if most is None:
            loop, end = self.state(start), self.state()
            self.free[add(loop)].append(loop)
            self.free[loop].append(end)
            return end
        exits = [start]
        for _ in range(most - least):
            exits.append(add(self.state(exits[-1])))
        return self.state(*exits)

    def text(self, text: str, start: int) -> tuple[int, range]:
        """Add a text; return the state after it as well as those on the way."""
        last = self.state()
        self._chain([(byte, byte) for byte in text.encode()], start, last)
        return last, range(last + 1, len(self.free))

    def closure(self, states: set[int]) -> frozenset[int]:
        """Return all states that these lead to without a byte."""
        reached, waiting = set(states), list(states)
        while waiting:
            new = set(self.free[waiting.pop()]) - reached
            reached |= new
            waiting += new
        return frozenset(reached)

    def _chain(self, spans: Sequence[Span], start: int, end: int) -> None:
        for low, high in spans[:-1]:
            following = self.state()
            self.edges[start].append((low, high, following))
            start = following
        self.edges[start].append((*spans[-1], end))


def _utf8(ranges: Ranges) -> Iterator[tuple[Span, ...]]:
    """Return sequences of byte ranges that together are the characters of some ranges."""
    limits = (0x7F, 0x7FF, 0xD7FF, 0xDFFF, 0xFFFF, 0x10FFFF)  # between the third and fourth: none
    for low, high in ranges:
        start = low
        for limit in limits:
            stop = min(high, limit)
            if start <= stop and limit != 0xDFFF:
                yield from _spans(chr(start).encode(), chr(stop).encode())
            start = max(start, limit + 1)


def _spans(low: bytes, high: bytes) -> Iterator[tuple[Span, ...]]:
    """Return the same for encoded characters of one length."""
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
