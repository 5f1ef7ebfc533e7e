"""Regular expressions, read into an automaton: the part of the usual syntax that is regular.

Characters and escapes, `.` (all but the line break), classes `[a-z]` and `[^a-z]`, `\\d`, `\\w` and
`\\s` of ASCII and their complements, groups, `|`, and the repetitions `* + ? {m} {m,} {m,n}`. A
pattern is matched whole, so there are no anchors; lookarounds and back-references are refused.
"""

import re
from collections.abc import Callable

from textdiff.errors import ConfigError
from textdiff.sampling.constraints.nondeterministic import Nondeterministic, Ranges

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


def read(pattern: str, machine: Nondeterministic) -> Add:
    """Return what adds a pattern to an automaton.

    Raises:
        ConfigError: it is not a regular expression of these; with the place.
    """
    reader = _Reader(pattern, machine)
    add = reader.choice()
    if reader.at < len(pattern):
        raise reader.error("there is no group to close")
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
