"""What the two ends of time cost where they are not ideal: reconstruction and prior."""

import math

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.makers import ByTime, draw_noise
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Scorer, reconstruction


def survival(family: Family, time: float) -> float:
    """alpha(t) at one time."""
    return float(family.schedule.alpha(torch.tensor([time], dtype=torch.float64)))


def clean_end(batch: WindowBatch, scorer: Scorer, time: float, draw: int, draws: int) -> Tensor:
    """[B, L] nats of one draw of -log p(x_0 | x_t) at a given time.

    Args:
        batch: the windows.
        scorer: the network; where nothing is noisy by then, it is not asked.
        time: t.
        draw: the batch's draw to use.
        draws: how many it has per replicate.
    """
    rate = 1.0 - survival(batch.family, time)
    if rate == 0.0:
        return torch.zeros(batch.x0.shape, dtype=torch.float64)
    levels = torch.zeros(len(batch.x0), batch.blocks.count, dtype=torch.float64)
    uniforms = batch.noise_uniforms(levels, draw, draws)
    noise = draw_noise(batch.family, batch.x0, uniforms, ByTime((rate, rate)), batch.scorable)
    return scorer.nats(batch.x0, noise, batch.real, reconstruction)


def prior_nats(batch: WindowBatch) -> Tensor:
    """[B, L] nats of the prior at every scorable position; 0 where it would be infinite."""
    kl = batch.family.process.prior_kl(survival(batch.family, 1.0))
    return batch.scorable.double() * (kl if math.isfinite(kl) else 0.0)


def infinite_prior(family: Family) -> str:
    """The note on a prior that has to be dropped; empty if it need not be."""
    alpha = survival(family, 1.0)
    if math.isfinite(family.process.prior_kl(alpha)):
        return ""
    return (
        f"the prior's term is infinite (at the end of time {alpha:.3g} of the tokens are still "
        "visible) and was left out"
    )
