"""A three-token world small enough to enumerate, and a denoiser that is a table in it.

Ids are deliberately awkward: the mask sits between the tokens and the last id is no token at all.
The denoiser's logits carry arbitrary constants, junk at the two forbidden ids, and NaN wherever a
token is visible, so whatever the library reads that it must not read shows up in the result.
"""

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.models import FULL, Layout

CLEAN = (0, 2, 3)
MASK = 1
EXCLUDED = 4
ROWS = 5
LENGTH = 3


def all_sequences(length: int = LENGTH) -> Tensor:
    """[3 ** length, length] every sequence of clean tokens."""
    return torch.tensor(list(itertools.product(CLEAN, repeat=length)))


def subsets(length: int = LENGTH) -> list[tuple[int, ...]]:
    """The non-empty sets of positions."""
    sizes = range(1, length + 1)
    return [s for k in sizes for s in itertools.combinations(range(length), k)]


def family(block_size: int | None = None, schedule: dict | None = None, **objective) -> Family:
    """An absorbing MDLM family over the five ids."""
    spec = {
        "process": "absorbing",
        "schedule": schedule or {"kind": "loglinear"},
        "objective": {"kind": "mdlm", **objective},
        "block_size": block_size,
    }
    return build_family(spec, Vocabulary.of(ROWS, MASK, [EXCLUDED]))


def code(sequence: Tensor) -> Tensor:
    """[..., L] ids -> the index of a sequence in a table."""
    powers = ROWS ** torch.arange(sequence.shape[-1] - 1, -1, -1)
    return (sequence * powers).sum(-1)


def masked(x: Tensor, hit: tuple[int, ...]) -> Tensor:
    """x with the positions `hit` masked."""
    z = x.clone()
    z[list(hit)] = MASK
    return z


@dataclass(frozen=True)
class Table:
    """Log-conditionals [ROWS ** L, L, ROWS] by noisy sequence, and the exact numbers they imply."""

    log_p: Tensor

    @property
    def length(self) -> int:
        return self.log_p.shape[1]

    def cross_entropy(self, x: Tensor, hit: tuple[int, ...]) -> float:
        """CE_S = -sum over S of ln c_i(x_i) with exactly S masked."""
        z = code(masked(x, hit))
        return -sum(float(self.log_p[z, i, x[i]]) for i in hit)

    def nelbo(self, x: Tensor) -> float:
        """Sum over subsets of B(k, L - k + 1) CE_S."""
        n = self.length
        return sum(self.cross_entropy(x, s) / (len(s) * math.comb(n, len(s))) for s in subsets(n))

    def chain(self, x: Tensor, order: tuple[int, ...]) -> float:
        """Negative log-likelihood of revealing one token after another in `order`."""
        total = 0.0
        for step, position in enumerate(order):
            z = code(masked(x, order[step:]))
            total -= float(self.log_p[z, position, x[position]])
        return total


def _mask_codes(length: int) -> Tensor:
    """[states, L] every sequence of clean tokens and masks."""
    return torch.tensor(list(itertools.product((*CLEAN, MASK), repeat=length)))


def random_table(seed: int, length: int = LENGTH, scale: float = 1.5) -> Table:
    """Independent random conditionals, consistent with no joint distribution."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS**length, length, len(CLEAN))
    raw = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    log_p = torch.full((*shape[:2], ROWS), -torch.inf, dtype=torch.float64)
    log_p[..., list(CLEAN)] = raw.log_softmax(-1)
    return Table(log_p)


def random_joint(seed: int, length: int = LENGTH) -> Tensor:
    """[3 ** L] probabilities in the order of `all_sequences`."""
    generator = torch.Generator().manual_seed(seed)
    raw = 1.5 * torch.randn(3**length, generator=generator, dtype=torch.float64)
    return raw.softmax(-1)


def oracle(joint: Tensor, length: int = LENGTH) -> Table:
    """The exact conditionals of a joint distribution."""
    sequences = all_sequences(length)
    log_p = torch.full((ROWS**length, length, ROWS), -torch.inf, dtype=torch.float64)
    for z in _mask_codes(length):
        fits = ((sequences == z) | (z == MASK)).all(-1)
        mass = joint[fits]
        for position in range(length):
            for token in CLEAN:
                chosen = mass[sequences[fits, position] == token].sum()
                log_p[code(z), position, token] = torch.log(chosen / mass.sum())
    return Table(log_p)


def ancestral_law(table: Table, steps: Tensor) -> Tensor:
    """[3 ** L] the law of samples when every position's step follows `steps` [T], by enumeration.

    Only the order pattern of the steps matters: 13 of them at L = 3, weighted by how often T steps
    produce them.
    """
    patterns = _order_patterns(steps, table.length)
    law = torch.zeros(3**table.length, dtype=torch.float64)
    for index, x in enumerate(all_sequences(table.length)):
        for pattern, weight in patterns.items():
            law[index] += weight * math.exp(-_pattern_nll(table, x, pattern))
    return law


def _pattern_nll(table: Table, x: Tensor, pattern: tuple[int, ...]) -> float:
    total = 0.0
    for group in sorted(set(pattern)):
        open_positions = tuple(i for i, g in enumerate(pattern) if g >= group)
        z = code(masked(x, open_positions))
        now = [i for i, g in enumerate(pattern) if g == group]
        total -= sum(float(table.log_p[z, i, x[i]]) for i in now)
    return total


def _order_patterns(steps: Tensor, length: int) -> dict[tuple[int, ...], float]:
    """Probability of each weak order of `length` independent steps, by a pass over the T steps."""
    states: dict[tuple[int, ...], float] = {(-1,) * length: 1.0}  # -1: not drawn yet
    after = torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)])
    for j, probability in enumerate(steps.tolist()):
        # Given that a position is not drawn before j, it is drawn at j with this probability.
        now = probability / float(after[j]) if j + 1 < len(steps) else 1.0
        following: dict[tuple[int, ...], float] = {}
        for state, weight in states.items():
            waiting = [i for i, g in enumerate(state) if g < 0]
            group = max(state) + 1
            for picks in itertools.product((False, True), repeat=len(waiting)):
                chosen = {i for i, pick in zip(waiting, picks, strict=True) if pick}
                key = tuple(group if i in chosen else g for i, g in enumerate(state))
                share = now ** len(chosen) * (1.0 - now) ** (len(waiting) - len(chosen))
                following[key] = following.get(key, 0.0) + weight * share
        states = following
    return {state: weight for state, weight in states.items() if weight > 0.0}


class TableDenoiser:
    """What the estimators and samplers use of a network, answered from a table.

    A position reads the table at the sequence of everything that its layout lets it see, with the
    mask elsewhere.

    Args:
        table: the conditionals.
        drift: [ROWS ** L, L, ROWS] added to the logits times sin(3 lambda), for a table that sees
            the noise level; None: a time-free one.
    """

    def __init__(self, table: Table, drift: Tensor | None = None):
        self.logits = _disguise(table.log_p)
        self.drift = drift
        self.config = SimpleNamespace(vocab_size=ROWS)
        self.context, self.time_conditioning = table.length, drift is not None
        self.self_conditioning = None
        self.device = torch.device("cpu")
        self.calls = 0

    @staticmethod
    def output_layer(hidden: Tensor, condition: Tensor | None = None) -> Tensor:
        return hidden

    def hidden(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        layout: Layout = FULL,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        self.calls += 1
        batch, length = input_ids.shape
        seen = _seen(input_ids, context_ids, layout)  # [B, L, L]
        width = self.logits.shape[1]
        # What lies behind the table's end stays masked and is not read.
        seen = torch.nn.functional.pad(seen, (0, width - length), value=MASK)
        at = code(seen), torch.arange(length).clamp(max=width - 1)
        logits = self.logits[at]
        if self.drift is not None:
            rate = -torch.expm1(-sigma.double()).view(batch, 1, 1)
            logits = logits + torch.sin(3.0 * rate) * self.drift[at]
        return logits if positions is None else logits.flatten(0, 1)[positions], None

    def __call__(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        layout: Layout = FULL,
        positions: Tensor | None = None,
        return_dict: bool = True,
    ) -> SimpleNamespace:
        hidden, _ = self.hidden(input_ids, context_ids, sigma, layout, positions)
        return SimpleNamespace(logits=hidden)


def _disguise(log_p: Tensor) -> Tensor:
    """The same distributions as raw logits: constants added, junk and NaN where none may look."""
    generator = torch.Generator().manual_seed(1)
    states, length, _ = log_p.shape
    logits = log_p + 5.0 * torch.randn(states, length, 1, generator=generator, dtype=log_p.dtype)
    logits[..., MASK], logits[..., EXCLUDED] = 40.0, torch.nan
    digits = torch.arange(states)[:, None] // ROWS ** torch.arange(length - 1, -1, -1) % ROWS
    logits[digits != MASK] = torch.nan
    return logits


def _seen(noisy: Tensor, clean: Tensor | None, layout: Layout) -> Tensor:
    """[B, L, L] the tokens that each noisy position sees, the mask where it sees none."""
    batch, length = noisy.shape
    tokens = noisy if clean is None else torch.cat([noisy, clean], dim=1)
    total = tokens.shape[1]
    allowed = layout.mask(total, noisy.device)
    if allowed is None:
        allowed = torch.ones(total, total, dtype=torch.bool)
    allowed = (allowed if allowed.ndim == 2 else allowed[:, 0]).expand(batch, total, total)
    tokens = tokens[:, None].expand(batch, length, total).masked_fill(~allowed[:, :length], -1)
    sources = tokens.unflatten(-1, (-1, length))  # [B, L, streams, L]
    best = sources.amax(2)  # at most one stream shows a position
    return best.masked_fill(best < 0, MASK)
