"""Noise makers called with blocks and a schedule in place of a family."""

from types import SimpleNamespace

from textdiff.diffusion.noise import ALL_RATES, ByCount, ByStep, ByTime, Noise


def _family(blocks, schedule=None, scores_all_positions=False):
    objective = SimpleNamespace(scores_all_positions=scores_all_positions)
    return SimpleNamespace(blocks=lambda length: blocks, schedule=schedule, objective=objective)


def noise_by_count(
    uniforms, blocks, scorable=None, rates=ALL_RATES, dense=False, pace=None
) -> Noise:
    return ByCount(rates)(_family(blocks, None, dense), uniforms, scorable, pace)


def noise_by_time(schedule, uniforms, blocks, scorable=None, rates=ALL_RATES, pace=None) -> Noise:
    return ByTime(rates)(_family(blocks, schedule), uniforms, scorable, pace)


def noise_by_step(schedule, timesteps, uniforms, blocks, scorable=None) -> Noise:
    return ByStep(timesteps)(_family(blocks, schedule), uniforms, scorable)
