"""Identity 22 for rules: the law of tokens over 50,000 of them does not depend on the precision.

The network here says the same at every position: a few likely tokens, and a tail of 50,000 that has
a third of the mass. Rules get its words in float32 and in float64, and the same uniforms. If any
rule raced positions against tokens in float32, rare tokens would be missing at many steps.
"""

import pytest
import torch
from exact_stats import chi_square_p
from torch import Tensor

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import Vocabulary
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.sampling.controls import Controls
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules import build_rule
from textdiff.sampling.segment import Segment

HEAD, TAIL, TAIL_MASS = 16, 50_000, 1.0 / 3.0
MASK = HEAD + TAIL
WIDTH, BUCKETS = 32, 8


def law() -> Tensor:
    """[V] float64 probabilities, of which the tail's differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    head = torch.rand(HEAD, generator=generator, dtype=torch.float64).softmax(0)
    tail = (2.0 * torch.randn(TAIL, generator=generator, dtype=torch.float64)).softmax(0)
    nothing = torch.zeros(1, dtype=torch.float64)
    return torch.cat([tail * TAIL_MASS, head * (1.0 - TAIL_MASS), nothing])


LAW = law()


def family_of(process: str, kind: str) -> Family:
    spec = {
        "process": process,
        "schedule": {"kind": "loglinear"},
        "objective": {"kind": kind},
        "block_size": None,
    }
    return build_family(spec, Vocabulary.of(MASK + 1, MASK))


def sample(
    name: str, family: Family, dtype: torch.dtype, steps: int, knobs: dict, count: int
) -> Tensor:
    """[R, L] tokens."""
    process, schedule = family.process, family.schedule
    log_x0 = LAW.log().to(dtype)

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        said = log_x0.expand(len(positions), -1)
        if not family.objective.predicts_score:
            return Prediction(said)
        xt = canvas.flatten()[positions.flat]
        alpha = family.known_alpha(schedule.alpha(t))[:1].expand(len(positions))
        if process.replaces_tokens:
            score = process.log_score(LAW.log().expand(len(positions), -1), xt, alpha)
            return Prediction(said, score.to(dtype))
        return Prediction(said, said + (alpha / (1.0 - alpha)).log()[:, None].to(dtype))

    def draws(stream: Stream, step: int) -> Tensor:
        rows = torch.arange(count)[:, None]
        return uniforms(3, stream, row=rows, step=step, position=torch.arange(WIDTH))

    canvas = process.prior((count, WIDTH), draws(Stream.PRIOR, 0))
    *_, last = build_rule(name, family, knobs)(
        Segment(
            denoise,
            process,
            schedule,
            canvas,
            steps=steps,
            frozen=torch.zeros(count, WIDTH, dtype=torch.bool),
            uniforms=draws,
            controls=Controls(),
        )
    )
    return last.canvas


def tail_fits(tokens: Tensor) -> None:
    """Head against tail, and the tail by buckets of rare and of common tokens."""
    order = LAW[:TAIL].argsort()
    cuts = (
        (LAW[:TAIL][order].cumsum(0) / TAIL_MASS * BUCKETS).to(torch.int64).clamp(max=BUCKETS - 1)
    )
    bucket = torch.full((MASK + 1,), BUCKETS)
    bucket[order] = cuts
    counts = torch.bincount(bucket[tokens.flatten()], minlength=BUCKETS + 1).double()
    expected = torch.zeros(BUCKETS + 1, dtype=torch.float64).index_add(0, bucket, LAW)
    assert chi_square_p(counts, expected * tokens.numel()) > 1e-3


# The rules that draw every masked position's token once cost little; the others get fewer rows.
CASES = [
    ("ancestral", "absorbing", "mdlm", 4096, {}, 24),
    ("first_hitting", "absorbing", "mdlm", 1, {}, 24),
    ("confidence", "absorbing", "mdlm", 8, {}, 2),
    ("entropy_bound", "absorbing", "mdlm", 8, {}, 2),
    ("remask", "absorbing", "mdlm", 64, {"eta": 0.05}, 2),
    ("tweedie", "absorbing", "sedd", 64, {}, 1),
    ("euler", "absorbing", "sedd", 64, {}, 1),
    ("ancestral", "uniform", "udlm", 3, {}, 1),
    ("tweedie", "uniform", "sedd", 3, {}, 1),
    ("predictor_corrector", "uniform", "udlm", 3, {}, 1),
]


@pytest.mark.parametrize(
    ("name", "process", "kind", "steps", "knobs", "rows"),
    CASES,
    ids=[f"{c[0]}-{c[1]}" for c in CASES],
)
def test_tokens_are_those_of_float64_and_follow_the_whole_law(
    name, process, kind, steps, knobs, rows
):
    family = family_of(process, kind)
    single = sample(name, family, torch.float32, steps, knobs, rows)
    double = sample(name, family, torch.float64, steps, knobs, rows)
    # They differ only where a uniform lies within float32's rounding of a boundary.
    assert (single != double).sum() <= 2
    assert (single < TAIL).sum() > 0.15 * single.numel()
    if rows > 20:
        tail_fits(single)
