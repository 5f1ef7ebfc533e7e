"""The text of every hole matches a pattern, holds no banned string and every forced one.

Positions are revealed in any order, so what may stand at one of them depends on both sides. From
the left these are the states that the automaton can be in there. From the right, those from which
the rest of the hole can still be accepted. Of the positions that are drawn in one call the
predictions are known; their weights together are:

    b_i(q) = sum over tokens v of p_i(v) b_{i+1}(q after v),

the backward recursion of a hidden Markov model, as a search for the best text has it with maxima
(arXiv:2505.23061). Of positions that stay open nothing is assumed but that some token will stand
there: the best b counts, in place of the sum. (Whether any token at all will do depends on those
drawn further right. That question takes sets of states.) Tokens drawn together follow exactly the
product of their predictions given that the text matches. This holds if none of the hole stays open.
One token per call follows its prediction given that a match is still possible. Letters: A rows, S
columns of the canvas, N drawn positions, V vocabulary, Q states, C classes of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from textdiff.errors import ConfigError
from textdiff.models.devices import to_device
from textdiff.sampling.constraints.automata import TokenAutomaton, byte_automaton
from textdiff.sampling.context import Context, SegmentInfo
from textdiff.sampling.job import Job

NEVER = -torch.inf


@dataclass(eq=False)
class Pattern:
    """A constraint on the text of each hole by itself.

    Attributes:
        machine: accepts the texts.
        description: the condition as the user wrote it, for messages.
        min_new_tokens: tokens of an open end before the end-of-text token may be.
    """

    machine: TokenAutomaton
    description: str
    min_new_tokens: int = 0
    _reach: dict[bool, list[Tensor]] = field(default_factory=dict, repr=False)
    _entered: tuple[SegmentInfo, Tensor] | None = field(default=None, repr=False)

    def reach(self, places: int, open_end: bool) -> Tensor:
        """Return [Q] log-weights: 0 where a hole can be finished with so many open places left."""
        ends = self.machine.final if open_end else self.machine.inner
        table = self._reach.setdefault(
            open_end, [torch.zeros(len(ends), device=ends.device).double().where(ends, NEVER)]
        )
        while len(table) <= places:
            table.append(self.machine.before(table[-1]))
        return table[places]

    def left(self, places: int, early: int, open_end: bool) -> Tensor:
        """Return the same where the end-of-text token is too early at the first of the places."""
        weights = self.reach(places - early, open_end)
        for _ in range(early):
            weights = self.machine.before(weights, ending=False)
        return weights

    def check(self, job: Job) -> None:
        """Refuse a job with a hole that no matching text fills.

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
                    f"no text of {how} {places} tokens satisfies {self.description}; give another "
                    "pattern or another number of tokens",
                    code="no_text_fits",
                )

    def begin(self, context: Context, log_weights: Tensor) -> "PatternDraws":
        """Begin the draws of one call; see `Constraint`."""
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
        pattern: the constraint.
        context: where the positions are.
        log_weights: [N, V] unconstrained log-weights.
    """

    def __init__(self, pattern: Pattern, context: Context, log_weights: Tensor):
        self.pattern, self.machine, self.context = pattern, pattern.machine, context
        self.info = context.info or _alone(context.canvas)
        self.log_weights = log_weights.double()
        self.device = context.canvas.device
        self._find_holes()
        self.weights = self._class_weights()
        self.ahead = self._read_back()
        if pattern._entered is None or pattern._entered[0] is not self.info:
            pattern._entered = (self.info, self._entry())
        self.states = pattern._entered[1]
        self.column = 0

    def allow(self, which: Tensor) -> Tensor:
        """Return [n, V] log-weights of tokens that a match is possible after; see `Draws`."""
        column, rows = self._at(which)
        self._advance(column)
        paths = self.ahead[column + 1][rows][:, self.machine.moves]  # [n, Q, C]
        chance = (self.states[rows][:, :, None] + paths).amax(1)  # [n, C]
        outside = ~self.inside[:, column][rows]
        chance = chance.masked_fill(outside[:, None], 0.0)
        return self.log_weights[self._sent(which)] + chance[:, self.machine.classes]

    def put(self, which: Tensor, tokens: Tensor) -> None:
        """Fix the tokens drawn there; see `Draws`."""
        column, rows = self._at(which)
        self.weights[:, column].index_copy_(0, rows, self._only(self.machine.classes[tokens]))

    # --- inside ---

    def _sent(self, x: Tensor) -> Tensor:
        return to_device(x, self.device)

    def _at(self, which: Tensor) -> tuple[int, Tensor]:
        return int(self.context.column[which[0]]), self._sent(self.context.row[which])

    def _only(self, classes: Tensor) -> Tensor:
        """Return [..., C] log-weights: 0 for one class each."""
        size = (*classes.shape, self.machine.moves.shape[1])
        never = torch.full(size, NEVER, dtype=torch.float64, device=classes.device)
        return never.scatter(-1, classes[..., None], 0.0)

    def _find_holes(self) -> None:
        """Set which places [A, S] are inside a hole, its first or last, and which stay open.

        All are computed on the CPU and sent together; masks are compared on the device.
        """
        canvas, info = self.context.canvas, self.info
        place = info.starts[:, None] + torch.arange(canvas.shape[1])  # [A, S]
        given = torch.nn.functional.pad(info.given, (1, 1), value=True)  # nothing beyond the text
        at = place.clamp(max=given.shape[1] - 2)

        def is_given(where: Tensor) -> Tensor:
            return given.gather(1, (where + 1).clamp(0, given.shape[1] - 1))

        length = info.lengths[:, None]
        inside = ~is_given(at) & (place < length)
        first = inside & is_given(at - 1)
        last = inside & (is_given(at + 1) | (place + 1 == length))
        early = place < (info.tails + self.pattern.min_new_tokens)[:, None]
        drawn = torch.zeros(canvas.numel(), dtype=torch.bool)
        drawn[self.context.positions] = True
        left = inside & ~drawn.view(canvas.shape)
        open_end = place >= info.tails[:, None]
        sets = self._sent(torch.stack([inside, first, last, early, left, open_end]))
        self.inside, self.first, self.last, self.early, left, self.open_end = sets.unbind()
        self.still = left & (canvas == self.context.vocabulary.mask_token_id)

    def _class_weights(self) -> Tensor:
        """Return [A, S, C] log-weights of the classes that each place may hold."""
        machine = self.machine
        weights = self._only(machine.classes[self.context.canvas])
        sums = _log_sums(self.log_weights, machine.classes, weights.shape[2])
        positions = self._sent(self.context.positions)
        weights = weights.flatten(0, 1).index_copy(0, positions, sums).view(weights.shape)
        usable = machine.used.expand(weights.shape).clone()
        if machine.end_class is not None:
            usable[:, :, machine.end_class] &= ~self.early
        anything = torch.zeros_like(weights).where(usable, NEVER)
        return torch.where(self.still[:, :, None], anything, weights)

    def _read_back(self) -> list[Tensor]:
        """Return [S + 1] of [A, Q]: log-weights of the states before and after every column."""
        rows, width = self.inside.shape
        ahead = [torch.stack([self._beyond(row, width) for row in range(rows)])]
        zero = torch.zeros(1, dtype=torch.float64, device=self.device)
        inner, final = (
            zero.where(ends, NEVER) for ends in (self.machine.inner, self.machine.final)
        )
        for column in reversed(range(width)):
            end = torch.where(self.open_end[:, column, None], final, inner)
            after = torch.where(self.last[:, column, None], end, ahead[-1])
            ahead[-1] = after
            paths = after[:, self.machine.moves] + self.weights[:, column, None, :]  # [A, Q, C]
            most, sums = paths.amax(-1), paths.logsumexp(-1)
            before = torch.where(self.still[:, column, None], most, sums)
            ahead.append(torch.where(self.inside[:, column, None], before, after))
        return ahead[::-1]

    def _beyond(self, row: int, width: int) -> Tensor:
        """Return [Q] log-weights of the states at the end of the canvas, by what is beyond."""
        info = self.info
        start, length = int(info.starts[row]) + width, int(info.lengths[row])
        tail, given = int(info.tails[row]), info.given[row, start:length].nonzero()
        end = start + int(given[0]) if len(given) else length
        early = max(0, min(end, tail + self.pattern.min_new_tokens) - start) if start >= tail else 0
        return self.pattern.left(max(0, end - start), early, start >= tail)

    def _entry(self) -> Tensor:
        """Return [A, Q] log-weights of the states before the canvas: 0 for one of them."""
        info, machine = self.info, self.machine
        before = ~info.given[:, : int(info.starts.max())]  # [A, P] generated places
        passing = before & (torch.arange(before.shape[1]) < info.starts[:, None])
        begins = passing & ~torch.nn.functional.pad(before, (1, 0))[:, :-1]
        moving, new = self._sent(torch.stack([passing, begins])).unbind()
        states = torch.zeros(len(info.starts), dtype=torch.int64, device=self.device)
        for place in passing.any(0).nonzero().flatten().tolist():  # on the CPU
            states = states.masked_fill(new[:, place], 0)
            moved = machine.moves[states, machine.classes[info.text[:, place]]]
            states = torch.where(moving[:, place], moved, states)
        size = (len(states), len(machine.inner))
        entry = torch.full(size, NEVER, dtype=torch.float64, device=self.device)
        return entry.scatter(1, states[:, None], 0.0)

    def _advance(self, column: int) -> None:
        """Read the columns before this one."""
        index = self.machine.moves.flatten().expand(len(self.states), -1)
        never = torch.full_like(self.states, NEVER)
        start = never.clone()
        start[:, 0] = 0.0
        for at in range(self.column, column + 1):
            self.states = torch.where(self.first[:, at, None], start, self.states)
            if at == column:
                break
            paths = (self.states[:, :, None] + self.weights[:, at, None, :]).flatten(1)
            after = never.scatter_reduce(1, index, paths, "amax")
            after = after.where(after == NEVER, 0.0)
            self.states = torch.where(self.inside[:, at, None], after, self.states)
        self.column = column


def _log_sums(log_weights: Tensor, classes: Tensor, count: int) -> Tensor:
    """Return [N, C] log of the summed weights of each class."""
    index = classes.expand(len(log_weights), -1)
    empty = torch.full_like(log_weights[:, :1], NEVER).repeat(1, count)
    most = empty.scatter_reduce(1, index, log_weights, "amax")
    level = most.where(most > NEVER, 0.0)
    shares = (log_weights - level.gather(1, index)).exp()
    return torch.zeros_like(empty).scatter_add(1, index, shares).log() + level


def _alone(canvas: Tensor) -> SegmentInfo:
    """Return the surroundings of a canvas that is one open end without any."""
    rows, width = canvas.shape
    zero = torch.zeros(rows, dtype=torch.int64)
    none = torch.zeros(rows, width, dtype=torch.bool)
    return SegmentInfo(canvas, zero, zero + width, none, zero)
