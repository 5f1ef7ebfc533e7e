"""Regular expressions, read into nondeterministic automata over UTF-8's bytes (Thompson, 1968).

Tokens are strings of bytes, and some of them only parts of a character, so characters become
sequences of byte ranges first. Patterns may have characters and escapes, `.` (all but the line
break), classes `[a-z]` and `[^a-z]`, and `\\d`, `\\w`, `\\s` of ASCII with their complements. They
may also have groups, `|`, and the repetitions `* + ? {m} {m,} {m,n}`. A pattern is matched whole,
so anchors are refused, as are lookarounds and back-references.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from textdiff.errors import ConfigError

MOST_STATES = 80_000
Span = tuple[int, int]
Ranges = tuple[Span, ...]
"""Code points, as ranges with both ends."""

LAST = 0x10FFFF
CLASSES: dict[str, Ranges] = {
    "d": ((48, 57),),
    "w": ((48, 57), (65, 90), (95, 95), (97, 122)),
    "s": ((9, 13), (32, 32)),
}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
MOST_COPIES = 1000
BOUNDS = re.compile(r"\{(\d*)(,?)(\d*)\}")
CODES = {"x": re.compile("[0-9a-fA-F]{2}"), "u": re.compile("[0-9a-fA-F]{4}")}

Add = Callable[[int], int]
"""add(state) -> the state after a piece of the pattern, which it adds there; may add it again."""


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


def read(pattern: str, machine: Nondeterministic) -> Add:
    """Return what adds a pattern to an automaton.

    Raises:
        ConfigError: it is not a regular expression of these; with the place.
    """
    reader = _Reader(pattern, machine)
    add = reader.choice()
    if reader.at < len(pattern):
        raise reader.error("no group is open here")
    return add


def complement(ranges: Ranges) -> Ranges:
    """Return all other code points."""
    left, others = 0, []
    for low, high in sorted(ranges):
        if low > left:
            others.append((left, low - 1))
        left = max(left, high + 1)
    if left <= LAST:
        others.append((left, LAST))
    return tuple(others)


class _Reader:
    """A recursive descent through a pattern."""

    def __init__(self, pattern: str, machine: Nondeterministic):
        self.pattern, self.machine, self.at = pattern, machine, 0

    def error(self, reason: str) -> ConfigError:
        message = f"pattern {self.pattern!r}, character {self.at + 1}: {reason}"
        return ConfigError(message, code="not_a_pattern")

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self) -> str:
        if self.at == len(self.pattern):
            raise self.error("the pattern ends too early")
        self.at += 1
        return self.pattern[self.at - 1]

    def choice(self) -> Add:
        branches = [self.sequence()]
        while self.peek() == "|":
            self.at += 1
            branches.append(self.sequence())
        if len(branches) == 1:
            return branches[0]
        return lambda state: self.machine.choice(branches, state)

    def sequence(self) -> Add:
        pieces: list[Add] = []
        while self.peek() not in ("", "|", ")"):
            pieces.append(self.repeated())

        def add(state: int) -> int:
            for piece in pieces:
                state = piece(state)
            return state

        return add

    def repeated(self) -> Add:
        add = self.atom()
        while (sign := self.peek()) and sign in "*+?{":
            add = self.repetition(add, *self.bounds(sign))
        return add

    def repetition(self, add: Add, least: int, most: int | None) -> Add:
        return lambda state: self.machine.repetition(add, least, most, state)

    def bounds(self, sign: str) -> tuple[int, int | None]:
        if sign != "{":
            self.at += 1
            return int(sign == "+"), 1 if sign == "?" else None
        match = BOUNDS.match(self.pattern, self.at)
        if match is None or not (match[1] or match[2]):
            raise self.error(r"write {m}, {m,} or {m,n}, or \{ for the character")
        least = int(match[1] or 0)
        most = (int(match[3]) if match[3] else None) if match[2] else least
        if max(least, most or 0) > MOST_COPIES or (most is not None and most < least):
            raise self.error(f"repeat 0 to {MOST_COPIES} times, the smaller number first")
        self.at = match.end()
        return least, most

    def atom(self) -> Add:
        sign = self.peek()
        if sign in "*+?{":
            raise self.error(f"there is nothing to repeat before {sign}")
        if sign in "^$":
            raise self.error(f"a pattern is matched whole: leave {sign} out, or write \\{sign}")
        self.at += 1
        if sign == "(":
            return self.group()
        if sign == "[":
            ranges = self.set()
        elif sign == ".":
            ranges = complement(((10, 10),))
        else:
            self.at -= 1
            ranges = self.member()
        return lambda state: self.machine.characters(ranges, state)

    def group(self) -> Add:
        if self.peek() == "?":
            if self.pattern[self.at : self.at + 2] != "?:":
                raise self.error("groups are (...) or (?:...); lookarounds are not regular")
            self.at += 2
        add = self.choice()
        if self.peek() != ")":
            raise self.error("a group is not closed")
        self.at += 1
        return add

    def set(self) -> Ranges:
        inverted = self.peek() == "^"
        self.at += inverted
        ranges: list[tuple[int, int]] = []
        while not ranges or self.peek() != "]":
            low = self.member()
            if self.peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self.member()
                if len(low) > 1 or len(high) > 1 or low[0][0] > high[0][1]:
                    raise self.error("a range goes from one character to a later one")
                low = ((low[0][0], high[0][1]),)
            ranges += low
        self.at += 1
        return complement(tuple(ranges)) if inverted else tuple(ranges)

    def member(self) -> Ranges:
        """Read one character, or an escape."""
        sign = self.take()
        if sign != "\\":
            return ((ord(sign), ord(sign)),)
        sign = self.take()
        if sign.lower() in CLASSES:
            ranges = CLASSES[sign.lower()]
            return ranges if sign.islower() else complement(ranges)
        if sign in CODES:
            digits = CODES[sign].match(self.pattern, self.at)
            if digits is None:
                raise self.error(r"write \xHH or \uHHHH with hexadecimal digits")
            self.at = digits.end()
            return ((int(digits[0], 16),) * 2,)
        if sign.isalnum() and sign not in ESCAPES:
            raise self.error(f"\\{sign} is not known, or not regular")
        return ((ord(ESCAPES.get(sign, sign)),) * 2,)
