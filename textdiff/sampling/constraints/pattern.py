"""The text of every hole matches a pattern, holds no banned string and every forced one.

Positions are revealed in any order, so what may stand at one of them depends on both sides: on the
states that the automaton can be in there, read from the left, and on those from which the rest of
the hole can still be accepted, read from the right. Of the positions that are drawn in one call the
predictions are known; they weigh what they can become together:

    b_i(q) = sum over tokens v of p_i(v) b_{i+1}(q after v),

the backward recursion of a hidden Markov model, as a search for the best text has it with maxima
(arXiv:2505.23061). Of positions that stay open nothing is assumed but that some token will stand
there: the best b counts, in place of the sum. (Whether any token at all will do depends on those
drawn further right, and that question takes sets of states.) So tokens drawn together follow
exactly the product of their predictions given that the text matches, if none of the hole stays
open; one token per call follows its prediction given that a match is still possible. Letters: A
rows, S columns of the canvas, N drawn positions, V vocabulary, Q states, C classes of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from textdiff.errors import ConfigError
from textdiff.sampling.constraints.automata import TokenAutomaton, byte_automaton
from textdiff.sampling.context import Context, SegmentInfo
from textdiff.sampling.job import Job

NEVER = -torch.inf


@dataclass(eq=False)
class Pattern:
    """A constraint on the text of each hole by itself.

    Attributes:
        machine: what texts are accepted.
        said: the pattern as the user wrote it, for messages.
        min_new_tokens: tokens of an open end before the end-of-text token may be.
    """

    machine: TokenAutomaton
    said: str
    min_new_tokens: int = 0
    _reach: dict[bool, list[Tensor]] = field(default_factory=dict, repr=False)
    _entered: tuple[SegmentInfo, Tensor] | None = field(default=None, repr=False)

    def reach(self, places: int, open_end: bool) -> Tensor:
        """[Q] log-weights: 0 where a hole can be finished with so many open places left."""
        ends = self.machine.final if open_end else self.machine.inner
        table = self._reach.setdefault(
            open_end, [torch.zeros(len(ends), device=ends.device).double().where(ends, NEVER)]
        )
        while len(table) <= places:
            table.append(self.machine.before(table[-1]))
        return table[places]

    def left(self, places: int, early: int, open_end: bool) -> Tensor:
        """[Q] the same, where no end-of-text token may stand at the first `early` of the places."""
        found = self.reach(places - early, open_end)
        for _ in range(early):
            found = self.machine.before(found, ending=False)
        return found

    def check(self, job: Job) -> None:
        """Stops if no text that fills a hole can match.

        Raises:
            ConfigError: with the length of the hole.
        """
        tails, lengths = job.tails.tolist(), job.lengths.tolist()
        holes = {
            (end - start, start == tails[row] and end == lengths[row])
            for row in range(len(lengths))
            for start, end in job.holes(row)
        }
        for places, open_end in sorted(holes):
            early = min(self.min_new_tokens, places) if open_end else 0
            if self.left(places, early, open_end)[0] == NEVER:
                how = "up to" if open_end and self.machine.end_class is not None else "exactly"
                raise ConfigError(
                    f"no text of {how} {places} tokens satisfies {self.said}; give another "
                    "pattern or another number of tokens"
                )

    def begin(self, context: Context, log_weights: Tensor) -> "PatternDraws":
        """The draws of one call; see `Constraint`."""
        return PatternDraws(self, context, log_weights)


def build_pattern(
    pattern: str | None,
    banned: Sequence[str],
    tokens: Sequence[bytes | None],
    end_token: int | None,
    min_new_tokens: int = 0,
    device: torch.device | None = None,
    forced: Sequence[str] = (),
) -> Pattern:
    """Return the constraint that the text of every hole matches a pattern, without or with strings.

    Args:
        pattern: regular expression; None: any text.
        banned: strings that it must not hold.
        tokens: [V] the bytes of each token; None for those that are never drawn.
        end_token: id of the end-of-text token, if the model draws one.
        min_new_tokens: tokens of an open end before it may be.
        device: where the model is.
        forced: strings that it must hold, each somewhere.

    Raises:
        ConfigError: not a regular expression, or one that is too large.
    """
    machine = byte_automaton(pattern, banned, forced)
    by_token = TokenAutomaton.of(machine, tokens, end_token, device or torch.device("cpu"))
    conditions = [] if pattern is None else [f"the pattern `{pattern}`"]
    for words, texts in (("the ban of", banned), ("the forced", forced)):
        if texts:
            conditions.append(f"{words} " + ", ".join(f"`{text}`" for text in texts))
    return Pattern(by_token, " and ".join(conditions), min_new_tokens)


class PatternDraws:
    """The draws of one network call.

    Args:
        pattern: what holds.
        context: where they are.
        log_weights: [N, V] what would be drawn from without it.
    """

    def __init__(self, pattern: Pattern, context: Context, log_weights: Tensor):
        self.pattern, self.machine, self.context = pattern, pattern.machine, context
        self.info = context.info or _alone(context.canvas)
        self.log_weights = log_weights.double()
        self._lay_out()
        self.ahead = self._read_back()
        if pattern._entered is None or pattern._entered[0] is not self.info:
            pattern._entered = (self.info, self._entry())
        self.states = pattern._entered[1]
        self.column = 0

    def allow(self, which: Tensor) -> Tensor:
        """[n, V] weights of what leads on; see `Draws`."""
        column, rows = self._at(which)
        self._advance(column)
        paths = self.ahead[column + 1][rows][:, self.machine.moves]  # [n, Q, C]
        chance = (self.states[rows][:, :, None] + paths).amax(1)
        free = ~self.inside[rows, column]
        chance = chance.masked_fill(free[:, None].to(chance.device), 0.0)
        mine = self.log_weights[which.to(chance.device)]
        return mine + chance.gather(1, self.machine.classes.expand(len(mine), -1))

    def put(self, which: Tensor, tokens: Tensor) -> None:
        """They are fixed from now on; see `Draws`."""
        column, rows = self._at(which)
        kinds = self.machine.classes[tokens]
        own = torch.full((len(rows), self.machine.moves.shape[1]), NEVER, dtype=torch.float64)
        own = own.to(kinds.device).scatter(1, kinds[:, None], 0.0)
        self.weights[rows, column] = own
        self.still[rows, column] = False

    # --- inside ---

    def _at(self, which: Tensor) -> tuple[int, Tensor]:
        return int(self.context.column[which[0]]), self.context.row[which]

    def _lay_out(self) -> None:
        """What is known of every place of the canvas."""
        canvas, info, machine = self.context.canvas, self.info, self.machine
        rows, width = canvas.shape
        place = info.starts[:, None] + torch.arange(width)  # [A, S]
        given = torch.nn.functional.pad(info.given, (1, 1), value=True)  # nothing beyond the text
        at = place.clamp(max=given.shape[1] - 2)

        def is_given(where: Tensor) -> Tensor:
            return given.gather(1, (where + 1).clamp(0, given.shape[1] - 1))

        length = info.lengths[:, None]
        self.inside = ~is_given(at) & (place < length)
        self.first = self.inside & is_given(at - 1)
        self.last = self.inside & (is_given(at + 1) | (place + 1 == length))
        self.early = place < (info.tails + self.pattern.min_new_tokens)[:, None]
        drawn = torch.zeros(rows * width, dtype=torch.bool)
        drawn[self.context.positions] = True
        drawn = drawn.view(rows, width)
        mask = (canvas == self.context.vocabulary.mask_token_id).cpu()
        self.still = self.inside & mask & ~drawn  # [A, S] stays open
        kinds = machine.classes[canvas]
        count = machine.moves.shape[1]
        weights = torch.full((rows, width, count), NEVER, dtype=torch.float64, device=canvas.device)
        weights.scatter_(2, kinds[:, :, None], 0.0)
        mine = torch.full((len(self.log_weights), count), NEVER, dtype=torch.float64)
        mine = _log_sums(self.log_weights, machine.classes, mine.to(canvas.device))
        here = self.context.positions.to(canvas.device)
        self.weights = weights.flatten(0, 1).index_copy(0, here, mine).view(rows, width, count)
        usable = machine.used.expand(rows, width, count).clone()
        if machine.end_class is not None:
            usable[:, :, machine.end_class] &= ~self.early.to(canvas.device)
        anything = torch.zeros_like(self.weights).where(usable, NEVER)
        self.weights = torch.where(self.still.to(canvas.device)[:, :, None], anything, self.weights)

    def _read_back(self) -> list[Tensor]:
        """[S + 1] of [A, Q]: log-weights of the states behind and before every column."""
        rows, width = self.inside.shape
        device = self.weights.device
        ends = [self._beyond(row, self.context.canvas.shape[1]) for row in range(rows)]
        ahead = [torch.stack(ends).to(device)]
        inner = torch.zeros(1, device=device).double().where(self.machine.inner, NEVER)
        final = torch.zeros(1, device=device).double().where(self.machine.final, NEVER)
        for column in reversed(range(width)):
            behind = ahead[-1]
            open_end = (self.info.starts + column >= self.info.tails).to(device)[:, None]
            last = self.last[:, column].to(device)[:, None]
            behind = torch.where(last, torch.where(open_end, final, inner), behind)
            ahead[-1] = behind
            paths = behind[:, self.machine.moves] + self.weights[:, column, None, :]
            most, sums = paths.amax(-1), paths.logsumexp(-1)
            before = torch.where(self.still[:, column].to(device)[:, None], most, sums)
            outside = ~self.inside[:, column].to(device)[:, None]
            ahead.append(torch.where(outside, behind, before))
        return ahead[::-1]

    def _beyond(self, row: int, width: int) -> Tensor:
        """[Q] what the part of a hole behind the canvas makes of the states at its end."""
        info = self.info
        start, length = int(info.starts[row]) + width, int(info.lengths[row])
        tail, given = int(info.tails[row]), info.given[row, start:length]
        end = (
            int((torch.arange(start, start + len(given))[given]).amin()) if given.any() else length
        )
        early = max(0, min(end, tail + self.pattern.min_new_tokens) - start) if start >= tail else 0
        return self.pattern.left(max(0, end - start), early, start >= tail)

    def _entry(self) -> Tensor:
        """[A, Q] log-weights of the states in which the canvas is entered: 0 for one of them."""
        info, machine = self.info, self.machine
        states = torch.zeros(len(info.starts), dtype=torch.int64, device=machine.moves.device)
        for place in range(int(info.starts.max())):
            passing = (place < info.starts) & ~info.given[:, place]
            begins = passing & (info.given[:, place - 1] if place else torch.ones_like(passing))
            states = states.masked_fill(begins.to(states.device), 0)
            moved = machine.moves[states, machine.classes[info.text[:, place]]]
            states = torch.where(passing.to(states.device), moved, states)
        entry = torch.full((len(states), len(machine.inner)), NEVER, dtype=torch.float64)
        return entry.to(states.device).scatter(1, states[:, None], 0.0)

    def _advance(self, column: int) -> None:
        """Reads the columns before this one."""
        device, machine = self.states.device, self.machine
        index = machine.moves.flatten().expand(len(self.states), -1)
        first = torch.full_like(self.states, NEVER)
        first[:, 0] = 0.0
        for at in range(self.column, column + 1):
            begins = self.first[:, at].to(device)[:, None]
            self.states = torch.where(begins, first, self.states)
            if at == column:
                break
            paths = (self.states[:, :, None] + self.weights[:, at, None, :]).flatten(1)
            after = torch.full_like(self.states, NEVER).scatter_reduce(1, index, paths, "amax")
            after = after.where(after == NEVER, 0.0)
            self.states = torch.where(self.inside[:, at].to(device)[:, None], after, self.states)
        self.column = column


def _log_sums(log_weights: Tensor, classes: Tensor, empty: Tensor) -> Tensor:
    """[N, C] log of the summed weights of each class."""
    index = classes.expand(len(log_weights), -1)
    most = empty.scatter_reduce(1, index, log_weights, "amax")
    level = most.where(most > NEVER, 0.0)
    shares = (log_weights - level.gather(1, index)).exp()
    return torch.zeros_like(empty).scatter_add(1, index, shares).log() + level


def _alone(canvas: Tensor) -> SegmentInfo:
    """A canvas that is all there is, as one open end."""
    rows, width = canvas.shape
    zero = torch.zeros(rows, dtype=torch.int64)
    none = torch.zeros(rows, width, dtype=torch.bool)
    return SegmentInfo(canvas, zero, zero + width, none, zero)
