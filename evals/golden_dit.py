"""Measures of golden folders whose network is the common DiT."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from golden_case import Comparison, Golden
from torch import Tensor

from textdiff.diffusion.objectives import OBJECTIVES
from textdiff.export.convert.dit_gidd import LEAST
from textdiff.export.loading import family_of
from textdiff.models import CAUSAL, Layout
from textdiff.sampling.cached import CachedPredictor
from textdiff.sampling.predictor import PlainPredictor, Predictor
from textdiff.sampling.rules.redrawing import Interval
from textdiff.sampling.rules.scores import Euler, Tweedie

END = torch.tensor(1e-5)  # time of the last step in the official samplers


def rows(values: Tensor, batch: int) -> Tensor:
    """Cut [B L, ...] into [B, L, ...]."""
    return values.unflatten(0, (batch, -1))


# --- masked diffusion ----------------------------------------------------------------------------


def subs(golden: Golden) -> Iterator[Comparison]:
    """Logits, log-probabilities and loss terms of MDLM."""
    x0, xt, t = golden["x0"], golden["x_t"], golden["t"]
    sigma, alpha = golden.time(t), golden.alpha(t)
    if "sigma" in golden:
        yield golden.compare("sigma", sigma)
        yield golden.compare("move_chance", 1.0 - alpha)
    logits = golden.logits(xt, sigma=sigma)
    yield golden.compare("raw_logits", logits)
    log_x0 = rows(golden.predict(logits, xt, alpha).log_x0, len(xt))
    yield golden.compare("log_probs", log_x0, golden.masked)
    yield golden.compare("nelbo", golden.terms(x0, xt, golden.noise_at(t, xt))[0])


def mdlm(golden: Golden) -> Iterator[Comparison]:
    """`subs`, discrete time and one step of each sampler."""
    yield from subs(golden)
    for steps in (1000, 8):
        name = f"discrete_T{steps}"
        if f"{name}/t" in golden:
            alpha = 1.0 - golden[f"{name}/t"].double()[:, None]
            noise = golden.noise_of(alpha, 1.0 / (1.0 - alpha), golden["x_t"], alpha + 1.0 / steps)
            yield golden.compare(
                f"{name}/nelbo", golden.terms(golden["x0"], golden["x_t"], noise)[0]
            )
    yield from masked_steps(golden)


def masked_steps(golden: Golden) -> Iterator[Comparison]:
    """Yield weights of one ancestral, cached and analytic step, and both endings."""
    process, xt = golden.family.process, golden["x_t"]
    flat, where = xt.flatten(), golden.masked.expand(2, -1, -1)
    steps: dict[str, list[Tensor]] = {"ddpm": [], "ddpm_cache": [], "analytic": []}
    for t, s in zip(golden["sampler/t"].double(), golden["sampler/s"].double(), strict=True):
        log_x0 = log_x0_at(golden, t)
        for name, alphas in {
            "ddpm": (golden.alpha(s), golden.alpha(t)),
            "ddpm_cache": (1.0 - s, 1.0 - t),
        }.items():
            alpha_s, alpha_t = (a.expand(len(flat)) for a in alphas)
            back = process.posterior(log_x0, flat, alpha_s, alpha_t)
            steps[name].append(rows(back * (1.0 - alpha_t)[:, None], len(xt)))
        alpha_s, alpha_t = (golden.alpha(a).expand(len(flat)) for a in (s, t))
        score = process.log_score(log_x0, flat, alpha_t)
        weights = process.staggered_score(score, alpha_s, alpha_t)
        steps["analytic"].append(
            rows(weights * process.likelihood(flat, alpha_s, alpha_t), len(xt))
        )
    normalise(golden, "sampler/analytic")  # its mask has lost digits where little survives
    for name, values in steps.items():
        yield golden.compare(f"sampler/{name}", torch.stack(values), where)
    log_x0 = rows(log_x0_at(golden, END.double()), len(xt))
    best = torch.where(golden.masked, log_x0.argmax(-1), xt)
    yield golden.compare("sampler/final_argmax", best)
    normalise(golden, "sampler/final_analytic")
    yield golden.compare("sampler/final_analytic", log_x0.exp(), golden.masked)


def log_x0_at(golden: Golden, t: Tensor) -> Tensor:
    """Return [B L, V] predictions of x_t at one time."""
    xt = golden["x_t"]
    times = t.expand(len(xt))
    logits = golden.logits(xt, sigma=golden.time(times))
    return golden.predict(logits, xt, golden.alpha(times)).log_x0


def normalise(golden: Golden, name: str) -> None:
    """Divide official weights by their sums, where their description says so."""
    values = golden.cases[name]
    golden.cases[name] = values / values.sum(-1, keepdim=True)


def timed(golden: Golden) -> Iterator[Comparison]:
    """`mdlm`, and the D3PM parameterisation in 1000 steps, whose noise level has eps."""
    yield from mdlm(golden)
    x0, xt, t = golden["x0"], golden["x_t"], golden["d3pm_T1000/t"]
    family = golden.in_objective(OBJECTIVES.build("d3pm", {"parameterization": "plugged"}))
    sigma, alpha = golden.time(t), 1.0 - t.double()[:, None]
    yield golden.compare("d3pm_T1000/sigma", sigma)
    state = golden.predict(golden.logits(xt, sigma=sigma), xt, alpha, family).log_state
    yield golden.compare("d3pm_T1000/log_probs", rows(state, len(xt)))
    noise = golden.noise_of(alpha, 1.0 / (1.0 - alpha), xt, alpha + 1e-3)
    diffusion = golden.terms(x0, xt, noise, sigma[:, None], family)[0]
    yield golden.compare("d3pm_T1000/diffusion", diffusion)
    clean = golden.logits(x0, sigma=torch.zeros(len(x0)))
    state = rows(golden.predict(clean, x0, alpha, family).log_state, len(x0))
    reconstruction = -state.gather(-1, x0[..., None]).squeeze(-1).double()
    yield golden.compare("d3pm_T1000/reconstruction", reconstruction)
    yield golden.compare("d3pm_T1000/loss", diffusion + reconstruction)


def averaged(golden: Golden) -> Iterator[Comparison]:
    """Logits and loss terms of averaged weights."""
    x0, xt, t = golden["x0"], golden["x_t"], golden["t"]
    yield golden.compare("ema/raw_logits", golden.logits(xt, sigma=golden.time(t)))
    yield golden.compare("ema/nelbo", golden.terms(x0, xt, golden.noise_at(t, xt))[0])


# --- blocks --------------------------------------------------------------------------------------


def blocks(golden: Golden) -> Iterator[Comparison]:
    """Logits in every layout, loss terms, and every network call of both official samplers."""
    x0, xt, t = golden["x0"], golden["x_t"], golden["t"]
    size = golden.family.block_size
    two = golden.logits(xt, x0, layout=Layout("block_diffusion", size))
    yield golden.compare("two_stream/raw_logits", two)
    alpha = golden.family.blocks(xt.shape[1]).spread(golden.alpha(t))
    yield golden.compare("move_chance", 1.0 - alpha)
    log_x0 = rows(golden.predict(two, xt, alpha).log_x0, len(xt))
    yield golden.compare("two_stream/log_probs", log_x0, golden.masked)
    yield golden.compare("nelbo", golden.terms(x0, xt, golden.noise_at(t, xt))[0])
    causal = golden.logits(x0, layout=Layout("block_causal", size))
    yield golden.compare("block_causal/raw_logits", causal)
    yield golden.compare("pretrain/raw_logits", golden.logits(xt))
    cached = CachedPredictor(golden.denoiser, golden.family, 2, xt.shape[1], None)
    cached.admit(golden["generate/cached/text"], torch.zeros(2, dtype=torch.int64))
    yield from block_calls(golden, "cached", cached)
    yield from block_calls(golden, "plain", PlainPredictor(golden.denoiser, golden.family))


@torch.no_grad()
def block_calls(golden: Golden, name: str, predictor: Predictor) -> Iterator[Comparison]:
    """Yield log-probabilities and weights of every call of one official sampler."""
    name, size = f"generate/{name}", golden.family.block_size
    text, where = golden[f"{name}/text"], torch.zeros(golden[f"{name}/log_probs"].shape[:3])
    log_x0 = torch.full(golden[f"{name}/log_probs"].shape, 0.0)
    weights, used = torch.zeros_like(log_x0), where.bool()
    before = -1
    for call, block in enumerate(golden[f"{name}/block"].tolist()):
        if f"{name}/store" in golden and bool(golden[f"{name}/store"][call]):
            continue
        if block != before:
            start = torch.full((2,), block * size)
            predictor.enter(text, start, torch.full((2,), size), torch.zeros(2, size).bool())
            before = block
        x = golden[f"{name}/x"][call]
        canvas = x if x.shape[1] == size else x[:, block * size : (block + 1) * size]
        t, dt = golden[f"{name}/t"][call].double()
        prediction = predictor(canvas, t.expand(2), torch.arange(2 * size))
        log_x0[call] = rows(prediction.log_x0, 2)
        used[call] = canvas == golden.family.process.mask_token_id
        if t > 0.0:
            alphas = ((1.0 - a).expand(2 * size) for a in (t - dt, t))
            back = golden.family.process.posterior(prediction.log_x0, canvas.flatten(), *alphas)
            weights[call] = rows(back, 2).float()
    yield golden.compare(f"{name}/log_probs", log_x0, used)
    running = used & (golden[f"{name}/t"][:, 0] > 0.0)[:, None, None]
    yield golden.compare(f"{name}/weights", weights, running)


def block_average(golden: Golden) -> Iterator[Comparison]:
    """Logits of averaged weights, two streams."""
    layout = Layout("block_diffusion", golden.family.block_size)
    two = golden.logits(golden["x_t"], golden["x0"], layout=layout)
    yield golden.compare("ema/two_stream_raw_logits", two)


def left_to_right(golden: Golden) -> Iterator[Comparison]:
    """Logits, log-probabilities and losses of a causal baseline; its first token has none."""
    x0 = golden["x0"]
    logits = golden.logits(x0, layout=CAUSAL)
    yield golden.compare("raw_logits", logits)
    log_x0 = rows(golden.predict(logits, x0, torch.zeros(len(x0))).log_x0, len(x0))
    clean = golden.family.process.vocabulary.count
    official = golden.cases["log_probs"][..., :clean]
    golden.cases["log_probs"] = official
    yield golden.compare("log_probs", log_x0)
    # As perplexity computes it: the first token has no term, and its input is hidden.
    family = golden.in_objective(OBJECTIVES.build("ar", {"start": 0}))
    noise = golden.noise_of(
        torch.zeros(1, 1), torch.ones(1, 1), torch.full_like(x0, golden.rows - 1)
    )
    noise.u[:, 0] = 2.0
    yield golden.compare("nll", golden.terms(x0, x0, noise, None, family)[0][:, 1:])


# --- scores --------------------------------------------------------------------------------------


def scores(golden: Golden, prefix: str = "") -> Iterator[Comparison]:
    """Logits, log-scores and loss terms of score entropy."""
    family, x0, xt, t = golden.family, golden["x0"], golden["x_t"], golden["t"]
    sigma, alpha = golden.time(t), golden.alpha(t)
    yield golden.compare("sigma", sigma)
    logits = golden.logits(xt, sigma=sigma)
    yield golden.compare(f"{prefix}raw_logits", logits)
    score = rows(golden.predict(logits, xt, alpha).log_score, len(xt))
    own = torch.nn.functional.one_hot(xt, golden.rows).bool() | ~family.process.vocabulary.clean
    official = golden[f"{prefix}log_score"]
    yield golden.compare(f"{prefix}log_score", score, ~own[..., : official.shape[-1]])
    nelbo = golden.terms(x0, xt, golden.noise_at(t, xt))[0]
    yield golden.compare(f"{prefix}nelbo", nelbo)
    if f"{prefix}loss" in golden:
        slope = -family.schedule.dalpha(t.double()) / alpha
        yield (
            golden.compare("dsigma", slope)
            if "dsigma" in golden
            else golden.compare("sigma", sigma)
        )
        yield golden.compare(f"{prefix}score_entropy", nelbo / slope[:, None])
        yield golden.compare(f"{prefix}loss", nelbo.sum(1))


def score_steps(golden: Golden) -> Iterator[Comparison]:
    """`scores`, one step of each official sampler, and the last one."""
    yield from scores(golden)
    dt = golden["sampler/dt"].double()
    for name, rule in {"euler": Euler(), "analytic": Tweedie()}.items():
        weights = [score_step(golden, rule, t, t - dt) for t in golden["sampler/t"].double()]
        where = None if golden.family.process.replaces_tokens else golden.masked.expand(2, -1, -1)
        yield golden.compare(f"sampler/{name}", torch.stack(weights), where)
    weights = score_step(golden, Tweedie(), END.double(), torch.zeros(()).double(), last=True)
    normalise(golden, "sampler/denoise")
    weights = weights[..., : golden["sampler/denoise"].shape[-1]]
    where = None if golden.family.process.replaces_tokens else golden.masked
    yield golden.compare("sampler/denoise", weights / weights.sum(-1, keepdim=True), where)


def score_step(
    golden: Golden, rule: Euler | Tweedie, t: Tensor, s: Tensor, last: bool = False
) -> Tensor:
    """Return [B, L, V] weights of the next tokens in one step of a rule."""
    family, xt = golden.family, golden["x_t"]
    schedule, times = family.schedule, t.expand(len(xt))
    logits = golden.logits(xt, sigma=golden.time(times))
    alpha_s = torch.ones((), dtype=torch.float64) if last else golden.alpha(s)
    steps = 1.0 / (t - s)
    interval = Interval(int(steps) - 1 if last else 0, steps, t, golden.alpha(t), alpha_s)
    score = golden.predict(logits, xt, golden.alpha(times)).log_score.double()
    if family.process.replaces_tokens:
        segment = type("Step", (), {"process": family.process, "schedule": schedule})
        return rows(rule.move(segment, score, xt.flatten(), interval), len(xt))
    weights = rule.rise(schedule, interval) * score.exp()
    mask = family.process.mask_token_id
    weights[:, mask] = 1.0 - weights.sum(-1)
    return rows(weights, len(xt))


# --- uniform and hybrid noise --------------------------------------------------------------------


def uniform(golden: Golden, eps: float) -> Iterator[Comparison]:
    """Logits, log-probabilities, bound, reconstruction and steps of UDLM and Duo.

    Args:
        golden: the folder.
        eps: of the official loss; noise levels and samplers have 1e-3 in both.
    """
    family, x0, xt, t = golden.family, golden["x0"], golden["x_t"], golden["t"]
    sigma = golden.time(t)
    yield golden.compare("sigma", sigma)
    logits = golden.logits(xt, sigma=sigma)
    yield golden.compare("raw_logits", logits)
    alpha = 1.0 - (1.0 - eps) * t.double()[:, None]
    log_x0 = rows(golden.predict(logits, xt, alpha).log_x0, len(xt))
    yield golden.compare("log_probs", log_x0)
    noise = golden.noise_of(alpha, (1.0 - eps) / (1.0 - alpha), xt)
    yield golden.compare("nelbo", golden.terms(x0, xt, noise, sigma[:, None])[0])
    if "reconstruction" in golden:
        clean = golden.predict(golden.logits(x0, sigma=0.0 * sigma), x0, alpha).log_x0
        clean = rows(clean, len(x0)).gather(-1, x0[..., None]).squeeze(-1)
        yield golden.compare("reconstruction", -clean)
    yield golden.compare("sampler/posterior", torch.stack(list(posteriors(golden))))
    if "sampler/final" in golden:
        log_x0 = log_x0_at(golden, END.double())
        alpha_t = golden.alpha(END).expand(xt.numel())
        back = family.process.posterior(log_x0, xt.flatten(), torch.ones_like(alpha_t), alpha_t)
        yield golden.compare("sampler/final", rows(back, len(xt)))
        yield golden.compare("sampler/final_greedy", rows(log_x0, len(xt)).argmax(-1))


def posteriors(golden: Golden) -> Iterator[Tensor]:
    """Yield [B, L, V] probabilities of the next tokens in each recorded step."""
    process, xt = golden.family.process, golden["x_t"]
    for t, s in zip(golden["sampler/t"].double(), golden["sampler/s"].double(), strict=True):
        alphas = (golden.alpha(a).expand(xt.numel()) for a in (s, t))
        yield rows(process.posterior(log_x0_at(golden, t), xt.flatten(), *alphas), len(xt))


def hybrid(golden: Golden) -> Iterator[Comparison]:
    """Everything of GIDD, with the config's share of uniform noise and without any."""
    for share, name in ((0.2, "p_uniform_0.2"), (LEAST, "p_uniform_0.0")):
        golden.denoiser.config.diffusion["schedule"]["uniform"] = share
        golden.family = family_of(golden.denoiser.config, torch.device("cpu"))
        yield from hybrid_share(golden, name)


def hybrid_share(golden: Golden, name: str) -> Iterator[Comparison]:
    """Yield the quantities of one share of uniform noise."""
    family, x0, t = golden.family, golden["x0"], golden["t"]
    golden.cases["x_t"] = xt = golden[f"{name}/x_t"]
    alpha = golden.alpha(t)
    m, b = family.process.shares(alpha)
    yield golden.compare(f"{name}/alpha", alpha)
    pi = torch.cat([b[:, None].expand(-1, golden.rows - 1), m[:, None]], dim=1)
    yield golden.compare(f"{name}/beta_pi", pi)
    logits = golden.logits(xt, sigma=golden.time(t))
    yield golden.compare(f"{name}/raw_logits", logits)
    log_x0 = rows(golden.predict(logits, xt, alpha).log_x0, len(xt))
    yield golden.compare(f"{name}/log_probs", log_x0)
    noise = golden.noise_at(t, xt)
    yield golden.compare(f"{name}/nelbo", golden.terms(x0, xt, noise)[0])
    for weight, loss in (("released", "dynamic"), ("clipped", "clip")):
        other = golden.in_objective(OBJECTIVES.build("gidd", {"loss_weight": weight}))
        yield golden.compare(f"{name}/loss_{loss}", golden.terms(x0, xt, noise, None, other)[1])
    yield golden.compare(f"{name}/sampler/posterior", torch.stack(list(posteriors(golden))))


MEASURES: dict[str, tuple[Callable[[Golden], Iterator[Comparison]], str]] = {
    "mdlm-owt": (mdlm, ""),
    "mdlm-time": (timed, ""),
    "mdlm-lightning": (averaged, "last.ckpt"),
    "mdlm-noeos": (subs, ""),
    "sedd-absorb": (score_steps, ""),
    "sedd-uniform": (score_steps, ""),
    "sedd-checkpoint": (partial(scores, prefix="ema/"), "checkpoints-meta/checkpoint.pth"),
    "sedd-noeos": (scores, ""),
    "bd3lm-owt": (blocks, ""),
    "bd3lm-lightning": (block_average, "13-150000.ckpt"),
    "bd3lm-hf-lightning": (block_average, "last.ckpt"),
    "ar-owt": (left_to_right, ""),
    "udlm": (partial(uniform, eps=0.0), ""),
    "duo": (partial(uniform, eps=1e-3), ""),
    "gidd": (hybrid, ""),
}
"""By folder: what is compared, and the file of weights where the folder has several."""
