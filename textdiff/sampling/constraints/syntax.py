"""Regular expressions, read into trees: the part of the usual syntax that is regular.

Characters and escapes, `.` (all but the line break), classes `[a-z]` and `[^a-z]`, `\\d`, `\\w` and
`\\s` of ASCII and their complements, groups, `|`, and the repetitions `* + ? {m} {m,} {m,n}`. A
pattern is matched whole, so there are no anchors; what looks around or back is refused.
"""

from dataclasses import dataclass

from textdiff.errors import ConfigError

LAST = 0x10FFFF
Ranges = tuple[tuple[int, int], ...]
"""Code points, as ranges with both ends."""

CLASSES: dict[str, Ranges] = {
    "d": ((48, 57),),
    "w": ((48, 57), (65, 90), (95, 95), (97, 122)),
    "s": ((9, 13), (32, 32)),
}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
MOST_COPIES = 1000


@dataclass(frozen=True)
class Chars:
    """One character of a set."""

    ranges: Ranges


@dataclass(frozen=True)
class Sequence:
    """Parts one after the other; without parts, the empty text."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Choice:
    """One of some parts."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Repeat:
    """A part from `least` to `most` times; `most` None: without end."""

    part: "Node"
    least: int
    most: int | None


Node = Chars | Sequence | Choice | Repeat


def parse(pattern: str) -> Node:
    """The tree of a pattern.

    Raises:
        ConfigError: it is no regular expression, or not one of these; with the place.
    """
    reader = _Reader(pattern)
    node = reader.choice()
    if reader.at < len(pattern):
        raise reader.error("there is no group to close")
    return node


def complement(ranges: Ranges) -> Ranges:
    """All other code points."""
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

    def __init__(self, pattern: str):
        self.pattern, self.at = pattern, 0

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"pattern {self.pattern!r}, character {self.at + 1}: {what}")

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self) -> str:
        if self.at == len(self.pattern):
            raise self.error("the pattern ends too early")
        self.at += 1
        return self.pattern[self.at - 1]

    def choice(self) -> Node:
        parts = [self.sequence()]
        while self.peek() == "|":
            self.at += 1
            parts.append(self.sequence())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def sequence(self) -> Node:
        parts: list[Node] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated())
        return Sequence(tuple(parts))

    def repeated(self) -> Node:
        node = self.atom()
        while (sign := self.peek()) and sign in "*+?{":
            if sign == "{":
                least, most = self.bounds()
            else:
                self.at += 1
                least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
            node = Repeat(node, least, most)
        return node

    def bounds(self) -> tuple[int, int | None]:
        end = self.pattern.find("}", self.at)
        low, comma, high = self.pattern[self.at + 1 : max(end, 0)].partition(",")
        low = low or ("0" if comma else "")
        if end < 0 or not low.isdigit() or not (high == "" or high.isdigit()):
            raise self.error(r"write {m}, {m,} or {m,n}, or \{ for the character")
        least = int(low)
        most = (int(high) if high else None) if comma else least
        if max(least, most or 0) > MOST_COPIES or (most is not None and most < least):
            raise self.error(f"repeat 0 to {MOST_COPIES} times, the smaller number first")
        self.at = end + 1
        return least, most

    def atom(self) -> Node:
        sign = self.peek()
        if sign in "*+?{":
            raise self.error(f"there is nothing to repeat before {sign}")
        if sign in "^$":
            raise self.error(f"a pattern is matched whole: leave {sign} out, or write \\{sign}")
        self.at += 1
        if sign == "(":
            return self.group()
        if sign == "[":
            return Chars(self.set())
        if sign == ".":
            return Chars(complement(((10, 10),)))
        if sign == "\\":
            return Chars(self.escape())
        return Chars(((ord(sign), ord(sign)),))

    def group(self) -> Node:
        if self.peek() == "?":
            if self.pattern[self.at : self.at + 2] != "?:":
                raise self.error("groups are (...) or (?:...); what looks around is not regular")
            self.at += 2
        node = self.choice()
        if self.peek() != ")":
            raise self.error("a group is not closed")
        self.at += 1
        return node

    def escape(self) -> Ranges:
        sign = self.take()
        if sign.lower() in CLASSES:
            found = CLASSES[sign.lower()]
            return found if sign.islower() else complement(found)
        if sign in "xu":
            digits = self.pattern[self.at : self.at + (2 if sign == "x" else 4)]
            try:
                code = int(digits, 16) if len(digits) == (2 if sign == "x" else 4) else -1
            except ValueError:
                code = -1
            if code < 0:
                raise self.error(r"write \xHH or \uHHHH with hexadecimal digits")
            self.at += len(digits)
            return ((code, code),)
        if sign in ESCAPES:
            return ((ord(ESCAPES[sign]),) * 2,)
        if sign.isalnum():
            raise self.error(f"\\{sign} is not known, or not regular")
        return ((ord(sign), ord(sign)),)

    def set(self) -> Ranges:
        inverted = self.peek() == "^"
        self.at += inverted
        ranges: list[tuple[int, int]] = []
        first = True
        while first or self.peek() != "]":
            first = False
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
        sign = self.take()
        return self.escape() if sign == "\\" else ((ord(sign), ord(sign)),)
