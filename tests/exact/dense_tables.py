"""Noise that draws tokens, small enough to enumerate, with matrices that the library never sees.

The ids are those of `exact_tables`. Letters: Q times, S noisy sequences, X clean ones, L positions.
"""

import math

import torch
from exact_stats import gauss_legendre
from exact_tables import CLEAN, EXCLUDED, MASK, ROWS, all_sequences
from torch import Tensor

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.process import Vocabulary

UNIFORM = 0.3  # largest share of uniform tokens in hybrid noise
STATES = {"absorbing": (*CLEAN, MASK), "uniform": CLEAN, "hybrid": (*CLEAN, MASK)}
K = len(CLEAN)


def world(
    process: str,
    kind: str,
    block_size: int | None = None,
    timesteps: int | None = None,
    schedule: dict | None = None,
    **objective,
) -> Family:
    default = {"kind": "hybrid", "uniform": UNIFORM} if process == "hybrid" else {}
    spec = {
        "process": process,
        "schedule": schedule or default or {"kind": "loglinear"},
        "objective": {"kind": kind, **objective},
        "block_size": block_size,
        "timesteps": timesteps,
    }
    return build_family(spec, Vocabulary.of(ROWS, MASK, [EXCLUDED]))


def kernel(process: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """[Q] survival and [Q, ROWS, ROWS] q(z = row | x = column) at times t, written out.

    Linear schedules for absorbing and uniform noise; Eq. 5 and 9 of arXiv:2503.04482 for hybrid.
    """
    t = t.double()
    c = torch.zeros_like(t)
    if process == "hybrid":
        c = 2.0 * UNIFORM / (1.0 - UNIFORM) * (t * (1.0 - t)).sqrt()
    alpha = (1.0 - t) / (1.0 + c)
    mask = torch.zeros_like(t) if process == "uniform" else t / (1.0 + c)
    each = (1.0 - alpha - mask) / K
    matrix = torch.zeros(*t.shape, ROWS, ROWS, dtype=torch.float64)
    for x in CLEAN:
        matrix[..., MASK, x] = mask
        for z in CLEAN:
            matrix[..., z, x] = each + (alpha if z == x else 0.0)
    return alpha, matrix


def sequences(process: str, length: int) -> Tensor:
    """[S, L] every noisy sequence."""
    return torch.cartesian_prod(*[torch.tensor(STATES[process])] * length).view(-1, length)


def likelihoods(process: str, t: Tensor, length: int) -> Tensor:
    """[Q, S, X, L] q(z_i | x_i)."""
    z, x = sequences(process, length), all_sequences(length)
    return kernel(process, t)[1][:, z[:, None, :], x[None, :, :]]


def oracle(process: str, joint: Tensor, t: Tensor, length: int, leave_out: bool) -> Tensor:
    """[Q, S, L, ROWS] log p(x_i | the other positions of z), or given all of z."""
    each = likelihoods(process, t, length)
    texts = all_sequences(length)
    out = torch.full((len(t), each.shape[1], length, ROWS), -torch.inf, dtype=torch.float64)
    for i in range(length):
        rest = each.clone()
        if leave_out:
            rest[..., i] = 1.0
        mass = rest.prod(-1) * joint
        for token in CLEAN:
            out[:, :, i, token] = (mass[..., texts[:, i] == token].sum(-1) / mass.sum(-1)).log()
    return out


def drifting_logits(process: str, t: Tensor, length: int, seed: int = 0) -> Tensor:
    """[Q, S, L, ROWS] arbitrary logits that move with time."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(sequences(process, length)), length, ROWS)
    base, drift = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return base + torch.sin(3.0 * t).view(-1, 1, 1, 1) * drift


def noise_at(family: Family, t: Tensor, alpha_s: Tensor | None = None) -> Noise:
    """[N] the bundle of given times."""
    alpha = family.schedule.alpha(t)
    weight = family.schedule.elbo_weight(t)
    if alpha_s is not None:
        weight = family.timesteps * (alpha_s - alpha) / (1.0 - alpha)
    return Noise(alpha, 1.0 - alpha, torch.zeros_like(t), weight, None, alpha_s)


def position_nats(family: Family, logits: Tensor, t: Tensor, x: Tensor, process: str) -> Tensor:
    """[Q, S, L] the library's terms for one clean text; 0 where predictions are not used."""
    length = len(x)
    z = sequences(process, length)
    shape = (len(t), len(z), length)
    flat = t.view(-1, 1, 1).expand(shape).flatten()
    alpha_s = None
    if family.timesteps is not None:
        alpha_s = family.schedule.alpha((flat - 1.0 / family.timesteps).clamp(min=0.0))
    noise = noise_at(family, flat, alpha_s)
    xt = z.expand(shape).flatten()
    x0 = x.expand(shape).flatten()
    prediction = family.objective.predict(logits.flatten(0, 2), xt, noise.alpha)
    terms = family.objective.nelbo_terms(prediction, x0, xt, noise).view(shape)
    return terms if family.objective.scores_all_positions else terms.where(z == MASK, 0.0)


def expected(process: str, t: Tensor, terms: Tensor, index: int) -> Tensor:
    """[Q] mean of [Q, S, L] terms over noisy versions of text `index`, summed over positions."""
    chance = likelihoods(process, t, terms.shape[-1])[:, :, index].prod(-1)
    nats = terms.sum(-1).where(chance > 0.0, 0.0)  # where z cannot be, no oracle has an answer
    return (chance * nats).sum(-1)


def time_grid(count: int, low: float = 0.0) -> tuple[Tensor, Tensor]:
    """Nodes and weights on (low, 1) that make logs at 0 and square roots at both ends smooth."""
    s, weight = gauss_legendre(count)
    angle = 0.5 * math.pi * s.square()
    t = angle.sin().square()
    slope = (2.0 * angle).sin() * math.pi * s
    return low + (1.0 - low) * t, (1.0 - low) * weight * slope


def nelbo(family: Family, process: str, logits_at, index: int, count: int = 60) -> float:
    """The continuous-time bound of one text by quadrature; `logits_at(t)` is the network."""
    t, weight = time_grid(count)
    logits = logits_at(t)
    x = all_sequences(logits.shape[2])[index]
    terms = position_nats(family, logits, t, x, process)
    return float((weight * expected(process, t, terms, index)).sum())
