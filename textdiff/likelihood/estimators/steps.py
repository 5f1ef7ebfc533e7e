"""Noise of a process in T steps, drawn so that no weight is large.

A step drawn uniformly, with independent hits, weighs T (alpha_s - alpha_t) / lambda, lambda = 1 -
alpha_t: T at the first steps of a linear schedule, where hardly anything is hit. Here a step i has
the chance p_i = (alpha_s - alpha_t) / (alpha_0 - alpha_T), one of the n positions is hit in any
case and the others independently with probability lambda. A set of k positions then has the chance

    sum_i p_i (k / n) lambda_i ** (k - 1) (1 - lambda_i) ** (n - k),

of which the bound's terms are the share n (alpha_0 - alpha_T) / k: the weight is that of counts in
continuous time, and T = 1 has no variance at all.

Where positions that are not hit cost nats too, nothing is hit in one of n + 1 draws. Its step has a
chance c_i of its own and the weight p_i (1 - lambda_i) ** n / (c_i lambda_i). What the T-step bound
has there per unit of p_i is bounded for a network that takes a clean text for what it is, and in
proportion to 1 / lambda_i for one that does not: most of that is in the first steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.diffusion.blocks import Blocks
from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import Noise, NoiseMaker, NoiseUniforms
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.likelihood.estimators.subsets import NEVER


@dataclass(frozen=True)
class ByStepAndHits(NoiseMaker):
    """One of T grid points per block, drawn with its hits, one of which is certain."""

    timesteps: int

    def __call__(
        self,
        family: Family,
        uniforms: NoiseUniforms,
        scorable: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> Noise:
        """Make noise whose weight is that of counts in continuous time."""
        assert scorable is not None
        blocks, dense = (
            family.blocks(uniforms.position.shape[1]),
            family.objective.scores_all_positions,
        )
        return noise_by_step_and_hits(
            family.schedule, self.timesteps, uniforms, blocks, scorable, dense
        )


def noise_by_step_and_hits(
    schedule: NoiseSchedule,
    timesteps: int,
    uniforms: NoiseUniforms,
    blocks: Blocks,
    scorable: Tensor,
    dense: bool = False,
) -> Noise:
    """Return noise at one of T grid points per block, with one hit that is certain.

    Args:
        schedule: gives alpha.
        timesteps: T.
        uniforms: their levels place the step; a block's smallest position is hit in any case.
        blocks: how L falls into blocks.
        scorable: [B, L] bool, the positions that may be hit.
        dense: whether positions that are not hit cost nats too.
    """
    v = uniforms.level
    alphas = schedule.alpha(torch.arange(timesteps + 1, dtype=torch.float64) / timesteps)
    shares, total = alphas[:-1] - alphas[1:], alphas[0] - alphas[-1]
    n = blocks.split(scorable, False).sum(-1)
    bare = int(dense)  # draws of n + bare that hit nothing
    empty = v * (n + bare) < bare
    step = _drawn(shares, ((v * (n + bare) - bare) / n.clamp(min=1)).clamp(min=0.0))
    rest = torch.zeros_like(v)
    for size in sorted(set(n[empty].tolist())):
        here, quiet = empty & (n == size), shares * alphas[1:] ** size
        chances = _chances_without_hits(quiet, 1.0 - alphas[1:])
        step[here] = _drawn(chances, v[here] * (size + bare))
        # Where every step hits something (T = 1), such a draw stands for nothing.
        rest[here] = (quiet / chances).where(quiet > 0.0, 0.0)[step[here]]
    alpha_s, alpha = alphas[step], alphas[step + 1]
    place = uniforms.position.masked_fill(~scorable, NEVER)
    first = blocks.spread(blocks.split(place, NEVER).amin(-1))
    # Given which is the smallest, the others are uniform above it.
    place = ((place - first) / (1.0 - first)).masked_fill(~scorable, NEVER)
    threshold = blocks.spread((1.0 - alpha).masked_fill(empty, 0.0))
    k = blocks.split(place < threshold, False).sum(-1)
    each = torch.where(empty, rest / (1.0 - alpha), total / k.clamp(min=1))
    weight = blocks.spread(((n + bare) * each).masked_fill(n == 0, 0.0))
    return Noise(
        blocks.spread(alpha), threshold, place, weight, uniforms.token, blocks.spread(alpha_s)
    )


def _chances_without_hits(quiet: Tensor, rate: Tensor) -> Tensor:
    """[T] how often each step is drawn when nothing is hit.

    What is paid there is between nearly the same at all steps (per unit of `quiet`), if the network
    takes the text for clean, and in proportion to 1 / lambda, if it takes it for something else.
    Half of the draws suit the first and half the second; neither then varies without limit.

    Args:
        quiet: [T] share of each step times its chance to hit nothing.
        rate: [T] lambda.
    """
    tiny = torch.finfo(rate.dtype).tiny
    steep = quiet / rate.clamp(min=tiny)  # a step may lose nothing
    return 0.5 * (quiet / quiet.sum().clamp(min=tiny) + steep / steep.sum().clamp(min=tiny))


def _drawn(chances: Tensor, v: Tensor) -> Tensor:
    """[...] indices where the running sum of `chances` [T], whatever it adds up to, passes v."""
    running = chances.cumsum(0)
    at = torch.searchsorted(running / running[-1], v.contiguous(), right=True)
    return at.clamp(max=len(chances) - 1)
