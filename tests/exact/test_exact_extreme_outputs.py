"""Nats of outputs of any size, against 60 digits; gradients stay finite where float32 overflows."""

import mpmath
import numpy as np
import pytest
import torch
from dense_tables import K, noise_at, world
from exact_tables import CLEAN, MASK, ROWS
from tiny_models import CLEAN as TINY_CLEAN
from tiny_models import EXCLUDED as TINY_EXCLUDED
from tiny_models import MASK as TINY_MASK
from tiny_models import ROWS as TINY_ROWS
from tiny_models import tiny_model
from torch import Tensor

from textdiff.diffusion.family import build_family
from textdiff.diffusion.objectives.exponentials import sum_of_excess, sum_of_exponentials
from textdiff.diffusion.process import Vocabulary
from textdiff.errors import CheckpointError
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows

TIMESTEPS = 4
CASES = [
    ("absorbing", "mdlm", {}),
    ("absorbing", "d3pm", {"parameterization": "mixture"}),
    ("absorbing", "d3pm", {"parameterization": "plugged"}),
    ("absorbing", "sedd", {}),
    ("uniform", "d3pm", {"parameterization": "mixture"}),
    ("uniform", "d3pm", {"parameterization": "plugged"}),
    ("uniform", "sedd", {}),
    ("uniform", "udlm", {}),
    ("hybrid", "gidd", {}),
]
Law = dict[int, mpmath.mpf]


def log_softmax(logits: Tensor, ids) -> Law:
    z = {i: mpmath.mpf(float(logits[i])) for i in ids}
    total = mpmath.log(sum(mpmath.exp(v - max(z.values())) for v in z.values())) + max(z.values())
    return {i: v - total for i, v in z.items()}


def posterior(process: str, x: Law, z: int, alpha_s, alpha_t) -> Law:
    """q(x_s | z, x_0 ~ x)."""
    ratio, law = alpha_t / alpha_s, {}
    for y in (*CLEAN, MASK):
        at_s = alpha_s * x.get(y, 0)
        if process == "absorbing":
            at_s += (1 - alpha_s) if y == MASK else 0
            onward = 1 if y == MASK else 1 - ratio  # to the mask
        else:
            at_s += 0 if y == MASK else (1 - alpha_s) / K
            onward = (1 - ratio) / K + (ratio if y == z else 0)
        law[y] = at_s * onward
    return {y: v / sum(law.values()) for y, v in law.items()}


def divergence(q: Law, p: Law):
    return sum(q[y] * (mpmath.log(q[y]) - mpmath.log(p[y])) for y in q if q[y] > 0)


def steps_nats(process: str, kind: str, logits: Tensor, x0: int, z: int, alpha_s, alpha_t):
    """T KL of one step."""
    ids = [*CLEAN, MASK] if process == "absorbing" and kind == "plugged" else CLEAN
    p = {i: mpmath.exp(v) for i, v in log_softmax(logits, ids).items()}
    if kind == "plugged":
        model = posterior(process, p, z, alpha_s, alpha_t)
    else:
        each = [posterior(process, {v: mpmath.mpf(1)}, z, alpha_s, alpha_t) for v in CLEAN]
        model = {y: sum(p[v] * e[y] for v, e in zip(CLEAN, each, strict=True)) for y in each[0]}
    one = {x0: mpmath.mpf(1)}
    return TIMESTEPS * divergence(posterior(process, one, z, alpha_s, alpha_t), model)


def score_nats(process: str, logits: Tensor, x0: int, z: int, alpha, weight):
    """Weighted s - r ln s + r (ln r - 1), summed over tokens other than z."""
    if process == "absorbing":
        scores = {i: mpmath.mpf(float(logits[i])) - mpmath.log(K) for i in CLEAN}
        return weight * (sum(mpmath.exp(s) for s in scores.values()) - 1 - scores[x0])
    b = (1 - alpha) / K
    low, nats = b / (alpha + b), mpmath.mpf(0)
    for y in CLEAN:
        if y != z:
            s = mpmath.mpf(float(logits[y])) * alpha / (alpha + b)
            r = low if z == x0 else 1 / low if y == x0 else mpmath.mpf(1)
            nats += mpmath.exp(s) - r * s + r * (mpmath.log(r) - 1)
    return weight * (1 - alpha) / (alpha * K) * nats


def plugged_nats(family, logits: Tensor, x0: int, z: int, noise):
    """Weighted divergences of uniform and hybrid noise."""
    alpha, weight = mpmath.mpf(float(noise.alpha)), mpmath.mpf(float(noise.weight))
    b = mpmath.mpf(float(family.process.shares(noise.alpha)[1]))
    p = {i: mpmath.exp(v) for i, v in log_softmax(logits, CLEAN).items()}
    q = {i: b + (alpha if i == x0 else 0) for i in CLEAN}
    model = {i: b + alpha * p[i] for i in CLEAN}
    ratio = mpmath.mpf(1) if z == MASK else q[z] / model[z]
    nats = divergence(q, model) + ratio - 1 - mpmath.log(ratio)
    if family.process.name == "uniform":
        return weight * (1 - alpha) / (alpha * K * q[z]) * nats
    time = family.schedule.t_of_alpha(noise.alpha)
    rate = family.objective.rate(torch.tensor([x0]), torch.tensor([z]), time)
    return weight * float(rate / family.schedule.elbo_weight(time)) * nats


def exact_nats(family, kind: str, options: dict, logits: Tensor, x0: int, z: int, noise):
    process = family.process.name
    alpha, weight = mpmath.mpf(float(noise.alpha)), mpmath.mpf(float(noise.weight))
    if kind == "mdlm":
        return -weight * log_softmax(logits, CLEAN)[x0]
    if kind == "d3pm":
        alpha_s = mpmath.mpf(float(noise.alpha_s))
        return steps_nats(process, options["parameterization"], logits, x0, z, alpha_s, alpha)
    if kind == "sedd":
        return score_nats(process, logits, x0, z, alpha, weight)
    return plugged_nats(family, logits, x0, z, noise)


@pytest.mark.parametrize("size", [1.0, 80.0, 89.0, 100.0, 300.0, 700.0, 1e4, 1e38])
@pytest.mark.parametrize(("process", "kind", "options"), CASES)
def test_nats_of_outputs_of_any_size(process, kind, options, size):
    timesteps = TIMESTEPS if kind == "d3pm" else None
    family = world(process, kind, timesteps=timesteps, **options)
    states = {"absorbing": [MASK], "uniform": CLEAN[:2], "hybrid": [*CLEAN[:2], MASK]}[process]
    x0, x1, x2 = CLEAN
    for t in (0.25, 0.5):
        times = torch.tensor([t], dtype=torch.float64)
        alpha_s = family.schedule.alpha(times - 0.25) if timesteps else None
        noise = noise_at(family, times, alpha_s)
        for values in ((-0.9, 0.3, 0.8), (1.0, -1.0, 1.0), (-1.0, -1.0, 0.2)):
            logits = torch.full((1, ROWS), torch.nan)
            logits[0, [x0, x1, x2]] = size * torch.tensor(values)
            logits[0, MASK] = 0.5 * size
            logits.requires_grad_()
            for z in states:
                at, clean = torch.tensor([z]), torch.tensor([x0])
                prediction = family.objective.predict(logits, at, noise.alpha)
                nats = family.objective.nelbo_terms(prediction, clean, at, noise)
                (gradient,) = torch.autograd.grad(nats.sum(), logits)
                assert gradient[0, list(CLEAN)].isfinite().all()
                with mpmath.workdps(60):
                    exact = exact_nats(family, kind, options, logits.detach()[0], x0, z, noise)
                    if exact > mpmath.mpf(torch.finfo(torch.float64).max):
                        assert float(nats.detach()) == torch.inf
                        continue
                assert float(nats.detach()) == pytest.approx(float(exact), rel=3e-5, abs=1e-5)


@pytest.mark.parametrize("top", [0.0, 20.0, 59.0, 61.0, 88.0, 89.0, 200.0, 600.0])
def test_gradients_of_sums_of_exponentials_are_exact_up_to_what_float32_holds(top):
    x = torch.tensor([[top, top - 30.0, 1.0, -2.0, -torch.inf]])
    finite = x.where(x > -torch.inf, 0.0)
    most = torch.finfo(torch.float32).max
    for function, values, less in ((sum_of_exponentials, x, 0.0), (sum_of_excess, finite, 1.0)):
        for scale in (1.0, 1e3):
            leaf = values.clone().requires_grad_()
            found = function(leaf)
            (gradient,) = torch.autograd.grad(scale * found.sum(), leaf)
            exact = values.double().exp()
            expected = (scale * (exact - less)).clamp(max=most)
            least = 1e-30 * float(expected.max()) + 1e-12  # underflow beside the largest
            wanted = pytest.approx(expected[0].tolist(), rel=1e-5, abs=least)
            assert gradient.double()[0].tolist() == wanted
            total = (exact - less * (1.0 + finite.double())).sum()
            assert float(found.detach()) == pytest.approx(float(total), rel=1e-5)


def test_ordinary_sums_are_those_of_float32_bit_for_bit():
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 8.0
    for function, plain in (
        (sum_of_exponentials, lambda v: v.exp().sum(-1).double()),
        (sum_of_excess, lambda v: (torch.expm1(v) - v).sum(-1).double()),
    ):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        found, expected = function(leaves[0]), plain(leaves[1])
        assert torch.equal(found, expected)
        weights = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        gradients = [
            torch.autograd.grad((weights * value).sum(), leaf)[0]
            for value, leaf in zip((found, expected), leaves, strict=True)
        ]
        assert torch.equal(*gradients)


def test_learned_exponents_weigh_outputs_of_any_size():
    """GenMD4's term, with exponents that differ: (1 / t) (-w_x (ln c(x) + 1) + sum w c)."""
    family = world("absorbing", "mdlm", schedule={"kind": "learned"})
    exponents = torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64)
    family.process.schedule._exponents = exponents
    noise = noise_at(family, torch.tensor([0.5], dtype=torch.float64))
    for size in (1.0, 89.0, 800.0, 1e38):
        logits = torch.full((1, ROWS), torch.nan)
        logits[0, list(CLEAN)] = size * torch.tensor([-0.9, 0.3, 0.8])
        logits.requires_grad_()
        at, clean = torch.tensor([MASK]), torch.tensor([CLEAN[0]])
        prediction = family.objective.predict(logits, at, noise.alpha)
        nats = family.objective.nelbo_terms(prediction, clean, at, noise)
        (gradient,) = torch.autograd.grad(nats.sum(), logits)
        with mpmath.workdps(60):
            log_c = log_softmax(logits.detach()[0], CLEAN)
            w = {i: mpmath.mpf(float(exponents[i])) for i in CLEAN}
            mean = sum(w[i] * mpmath.exp(log_c[i]) for i in CLEAN)
            exact = 2 * (mean - w[CLEAN[0]] * (log_c[CLEAN[0]] + 1))
        assert float(nats.detach()) == pytest.approx(float(exact), rel=1e-6)
        assert gradient[0, list(CLEAN)].isfinite().all()


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (
            1e4,
            torch.float32,
            "inf nats at token .*, more than a float holds; .* use another checkpoint$",
        ),
        (torch.nan, torch.float32, "nan nats at token .*another checkpoint$"),
        (6e4, torch.float16, "float16 overflows, use float32$"),
    ],
)
def test_a_bound_that_is_infinite_says_why(value, dtype, said):
    """Advice to use float32 only where it helps."""
    model = tiny_model(adaln=True, time_conditioning=True).to(dtype)

    def louder(module, inputs, logits):
        return torch.full_like(logits, value) * 4.0  # 2.4e5 overflows float16

    model.output_layer.register_forward_hook(louder)
    spec = {
        "process": "uniform",
        "schedule": {"kind": "loglinear"},
        "objective": {"kind": "sedd"},
        "block_size": None,
    }
    family = build_family(spec, Vocabulary.of(TINY_ROWS, TINY_MASK, TINY_EXCLUDED))
    text = np.array(TINY_CLEAN[:3], dtype=np.int32)
    windows = cut_windows([text], ["abc"], 4, family.process.vocabulary.clean)
    with pytest.raises(CheckpointError, match=said):
        estimate(model, family, windows, seed=0)
