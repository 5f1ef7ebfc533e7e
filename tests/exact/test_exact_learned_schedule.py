"""Identity 24: exponents per token. The bound, its draws, its gradient and its sampler."""

import itertools
import math

import pytest
import torch
from engines import alone
from exact_stats import chi_square_p, gauss_legendre
from exact_tables import (
    CLEAN,
    EXCLUDED,
    LENGTH,
    MASK,
    ROWS,
    TableDenoiser,
    _seen,
    all_sequences,
    oracle,
    random_joint,
    random_table,
    subsets,
)
from noise_calls import noise_by_count, noise_by_time
from test_exact_sampler import frequencies, sample, total_variation
from tiny_models import tiny_model
from torch import Tensor, nn

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.noise import ByCount, ByTime, Noise, NoiseUniforms, draw_noise
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import Vocabulary
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.errors import ConfigError
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows
from textdiff.loss import CleanBatch, DenoisingLoss, PositionTerms, corrupt, log_mask
from textdiff.models import FULL
from textdiff.models.layers import TokenExponents
from textdiff.sampling.predictor import PlainPredictor
from textdiff.train.learned_loss import LearnedScheduleLoss

VOCABULARY = Vocabulary.of(ROWS, MASK, [EXCLUDED])
PACES = {0: 0.6, 2: 1.0, 3: 1.9}  # by clean id
TEXTS = all_sequences()[::4]
NODES = 120


def exponents(paces: dict[int, float] = PACES) -> TokenExponents:
    module = TokenExponents(ROWS, 1.0).double()
    with torch.no_grad():
        for token, pace in paces.items():
            module.raw[token] = math.log(math.expm1(pace))
    return module


def learned(
    paces: dict[int, float] | TokenExponents = PACES,
    block_size: int | None = None,
    vocabulary: Vocabulary = VOCABULARY,
) -> Family:
    spec = {
        "process": "absorbing",
        "schedule": {"kind": "learned"},
        "objective": {"kind": "mdlm"},
        "block_size": block_size,
    }
    module = paces if isinstance(paces, nn.Module) else exponents(paces)
    return build_family(spec, vocabulary, None, module)


class TimeOracle(TableDenoiser):
    """p(x_i | x_t) of a joint law, which depends on t: t ** w of every masked token enters."""

    def __init__(self, joint: Tensor, family: Family):
        super().__init__(random_table(0))
        self.joint = joint
        self.family = family

    def hidden(self, input_ids, context_ids=None, sigma=None, layout=FULL, positions=None):
        _, length = input_ids.shape
        seen = _seen(input_ids, context_ids, layout)  # [B, L, L]
        blocks = self.family.blocks(length)
        # Sigma is float32: below its resolution any t has the same conditionals.
        t = -torch.expm1(-sigma.double().view(len(sigma), -1)).clamp(max=-1e-9)
        t = blocks.spread(t.expand(len(t), blocks.count))  # [B, L]
        texts = all_sequences(length)
        paces = self.family.process.token_exponents.detach()[texts]  # [27, L]
        logits = torch.full((*input_ids.shape, ROWS), -torch.inf, dtype=torch.float64)
        for i in range(length):
            known = seen[:, i, None]  # [B, 1, L]
            fits = ((known == texts) | (known == MASK)).all(-1)
            lost = (seen[:, i] == MASK) & (blocks.index() == blocks.index()[i])
            chance = torch.where(lost[:, None], t[:, i, None, None] ** paces, 1.0).prod(-1)
            mass = self.joint * chance * fits  # [B, 27]
            for token in CLEAN:
                logits[:, i, token] = mass[:, texts[:, i] == token].sum(-1).log()
        return logits if positions is None else logits.flatten(0, 1)[positions], None


def row_nats(denoiser, family: Family, x0: Tensor, noise) -> Tensor:
    batch = corrupt(family, x0, noise, None)
    terms = PositionTerms(denoiser, family, batch).all()
    rows = batch.positions // x0.shape[1]
    return torch.zeros(len(x0), dtype=torch.float64).index_add(0, rows, terms)


def time_nodes() -> tuple[Tensor, Tensor]:
    """Nodes and weights for t = s ** 4: fractional powers of t become smooth at 0."""
    s, weight = gauss_legendre(NODES)
    return s**4, weight * 4.0 * s**3


@torch.no_grad()
def nelbo(denoiser, family: Family, x: Tensor) -> float:
    """The expectation over masks, integrated over mean rates by quadrature; one block."""
    rate, weight = time_nodes()
    pace = family.process.token_exponents[x]
    rows, total = x.expand(NODES, -1), 0.0
    for subset in subsets(len(x)):
        hit = torch.zeros(len(x), dtype=torch.bool)
        hit[list(subset)] = True
        u = torch.where(hit, 0.0, 1.0).double().expand(NODES, -1)
        noise = draw_noise(family, rows, NoiseUniforms(rate[:, None], u), ByTime())
        assert torch.equal(noise.corrupted, hit.expand(NODES, -1))
        lost = noise.threshold**pace
        assert (lost.mean(-1) - rate).abs().max() < 1e-14
        chance = torch.where(hit, lost, 1.0 - lost).prod(-1)
        total += float((weight * chance * row_nats(denoiser, family, rows, noise)).sum())
    return total


@pytest.fixture(scope="module")
def joint():
    return random_joint(3)


# --- the process and the pointwise loss ----------------------------------------------------------


def random_prediction(rows: int = 50) -> Prediction:
    generator = torch.Generator().manual_seed(4)
    logits = 2.0 * torch.randn(rows, ROWS, generator=generator, dtype=torch.float64)
    masks = torch.full((rows,), MASK)
    return learned().objective.predict(logits, masks, torch.ones(rows))


def point(x: int) -> Tensor:
    log_x0 = torch.full((1, ROWS), -torch.inf, dtype=torch.float64)
    log_x0[0, x] = 0.0
    return log_x0


def at(*values: float) -> list[Tensor]:
    """Survival probabilities of the clock at these times."""
    return [torch.tensor([1.0 - value], dtype=torch.float64) for value in values]


def test_marginals_lose_each_token_at_its_pace():
    process = learned().process
    for token, pace in PACES.items():
        law = process.marginal(point(token).exp(), *at(0.3))[0].detach()
        assert float(law[MASK]) == pytest.approx(0.3**pace, abs=1e-12)
        assert float(law[token]) == pytest.approx(1.0 - 0.3**pace, abs=1e-12)
    assert process.prior_kl(0.0) == 0.0


@pytest.mark.parametrize("token", CLEAN)
def test_posterior_is_bayes_and_two_moves_are_one(token):
    process, masked = learned().process, torch.tensor([MASK])
    r, s, t = 0.1, 0.4, 0.7
    process = process.to(torch.device("cpu"))  # a copy that is not learned
    back = process.posterior(point(token), masked, *at(s, t))[0]
    at_s, at_t = (process.marginal(point(token).exp(), a)[0] for a in at(s, t))
    # q(x_t = mask | x_s = token) is what is lost between the two.
    lost = 1.0 - float(at_t[token] / at_s[token])
    assert float(back[token]) == pytest.approx(float(at_s[token]) * lost / float(at_t[MASK]))
    assert float(back.sum()) == pytest.approx(1.0, abs=1e-12)
    again = torch.stack(
        [process.posterior(point(token), torch.tensor([y]), *at(r, s))[0] for y in range(ROWS)]
    )
    direct = process.posterior(point(token), masked, *at(r, t))[0]
    assert (back @ again - direct).abs().max() < 1e-12
    assert float(process.posterior(point(token), masked, *at(t, t))[0, MASK]) == 1.0


def test_one_survival_probability_for_all_tokens_is_refused():
    family, u = learned(), torch.full((1, LENGTH), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="need one alpha"):
        family.process.likelihood(torch.tensor([MASK]), *at(0.2, 0.5))
    with pytest.raises(ValueError, match="no scores"):
        family.process.log_score(point(CLEAN[0]), torch.tensor([MASK]), *at(0.5))
    with pytest.raises(ValueError, match="depends on the clean tokens"):
        ByCount()(family, NoiseUniforms(u[:, :1], u), None, family.process.rate_exponents(None))


def terms_at(family: Family, prediction: Prediction, x0: Tensor, t: float) -> Tensor:
    """Nats of single masked positions at one time."""
    rows = len(x0)
    time = torch.full((rows,), t, dtype=torch.float64)
    noise = Noise(1.0 - time, time, 0.0 * time, 1.0 / time)
    masks = torch.full((rows,), MASK)
    return family.objective.nelbo_terms(prediction, x0, masks, noise).detach()


@pytest.mark.parametrize("w", [0.5, 1.0, 3.0])
def test_equal_exponents_are_weighted_cross_entropy(w):
    prediction = random_prediction()
    x0 = torch.tensor(CLEAN).repeat(17)[:50]
    found = terms_at(learned(dict.fromkeys(CLEAN, w)), prediction, x0, 0.3)
    exact = -(w / 0.3) * prediction.log_x0.gather(-1, x0[:, None])[:, 0]
    assert (found - exact).abs().max() < 1e-12


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_loss_is_the_limit_of_the_divergence_of_reverse_steps(t):
    """Eq. 12, arXiv:2406.04329 (GenMD4, Sec. 6 there), as the rate of ever smaller steps."""
    family, prediction, h = learned(), random_prediction(), 1e-6 * t
    x0 = torch.tensor(CLEAN).repeat(17)[:50]
    masks = torch.full((50,), MASK)
    points = torch.cat([point(x) for x in x0.tolist()])
    alphas = [alpha.expand(50) for alpha in at(t - h, t)]
    q = family.process.posterior(points, masks, *alphas)
    p = family.process.posterior(prediction.log_x0, masks, *alphas)
    kl = torch.where(q > 0.0, q * (q / p).log(), 0.0).sum(-1)
    found = terms_at(family, prediction, x0, t)
    assert ((kl / h - found) / found).abs().max() < 1e-4
    assert (found > 0.0).all()


def test_half_precision_networks_cost_what_they_cost_in_float32():
    """Autocast must not reach the sum over the vocabulary."""
    family, x0 = learned(), torch.tensor(CLEAN).repeat(17)[:50]
    prediction = Prediction(random_prediction().log_x0.float(), mixture=True)
    exact = terms_at(family, prediction, x0, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(terms_at(family, prediction, x0, 0.3), exact)


# --- the bound -----------------------------------------------------------------------------------


def test_oracle_bound_is_the_likelihood(joint):
    family = learned()
    for x, p in list(zip(all_sequences(), joint, strict=True))[::4]:
        # The network is told sigma in float32.
        assert nelbo(TimeOracle(joint, family), family, x) == pytest.approx(-math.log(p), abs=2e-6)


def test_the_best_prediction_depends_on_time(joint):
    """The conditionals given the visible tokens alone, the optimum elsewhere, are too dear here."""
    family, total = learned(), 0.0
    for x, p in zip(all_sequences(), joint.tolist(), strict=True):
        total += p * (nelbo(TableDenoiser(oracle(joint)), family, x) + math.log(p))
    assert total > 0.01


@torch.no_grad()
def count_expectation(denoiser, family: Family, x: Tensor) -> float:
    """E over which positions go first, and when the last of them goes, by quadrature."""
    t, weight = time_nodes()
    n, total = len(x), 0.0
    pace = family.process.token_exponents[x]
    lost = t[:, None] ** pace
    for subset in subsets(n):
        for last in subset:
            others = [i for i in range(n) if i in subset and i != last]
            later = [i for i in range(n) if i not in subset]
            density = pace[last] * lost[:, last] / t
            density = density * lost[:, others].prod(-1) * (1.0 - lost[:, later]).prod(-1) / n
            u = 0.5 * (1.0 + lost)
            u[:, others], u[:, last] = 0.5 * lost[:, others], lost[:, last]
            v = torch.full((NODES, 1), (len(subset) - 0.5) / n, dtype=torch.float64)
            rows = x.expand(NODES, -1)
            noise = draw_noise(family, rows, NoiseUniforms(v, u), ByCount())
            assert noise.corrupted.sum(1).eq(len(subset)).all()
            assert (1.0 - noise.alpha[:, 0] - t).abs().max() < 1e-12
            total += float((weight * density * row_nats(denoiser, family, rows, noise)).sum())
    return total


def test_counts_are_the_time_integral(joint):
    """For an arbitrary network that sees the time; the weight is n over the sum of paces."""
    family = learned()
    arbitrary = TableDenoiser(random_table(0), drift=2.0 * random_table(9).log_p.clamp(min=-3.0))
    for x in TEXTS:
        exact = nelbo(arbitrary, family, x)
        assert count_expectation(arbitrary, family, x) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("block_size", [None, 2])
def test_drawn_counts_estimate_the_likelihood(joint, block_size):
    family, rows = learned(block_size=block_size), 20_000
    blocks = family.blocks(LENGTH)
    key = torch.arange(rows)[:, None]
    v = uniforms(5, Stream.JITTER, row=key, block=torch.arange(blocks.count))
    u = uniforms(5, Stream.POSITION, row=key, position=torch.arange(LENGTH))
    x, p = all_sequences()[5].expand(rows, -1), joint[5]
    noise = draw_noise(family, x, NoiseUniforms(v, u), ByCount())
    found = row_nats(TimeOracle(joint, family), family, x, noise).detach()
    error = float(found.std()) / math.sqrt(rows)
    assert abs(float(found.mean()) + math.log(p)) < 4 * error
    assert error < 0.02


@pytest.mark.parametrize("estimator", ["masked_count", "time"])
def test_public_estimators_of_the_oracle_give_the_likelihood(joint, estimator):
    family, texts = learned(), all_sequences()
    tokens = [x.to(torch.int32).numpy() for x in texts]
    windows = cut_windows(tokens, ["abc"] * len(texts), LENGTH, VOCABULARY.clean)
    denoiser = TimeOracle(joint, family)
    found = estimate(denoiser, family, windows, estimator=estimator, seed=4, replicates=200)
    bound = found.bound()
    exact = -float(joint.log().mean()) / LENGTH
    assert abs(bound.mean - exact) < 4 * bound.stderr
    assert bound.is_bound
    assert bound.stderr < 0.04


def test_estimators_by_orders_are_refused(joint):
    family = learned()
    windows = cut_windows([TEXTS[0].to(torch.int32).numpy()], ["abc"], LENGTH, VOCABULARY.clean)
    for estimator in ("any_order", "importance", "chain_rule", "exact", "finite_t"):
        with pytest.raises(ConfigError):
            estimate(TimeOracle(joint, family), family, windows, estimator=estimator, seed=0)


def test_counts_of_equal_exponents_are_the_ordinary_ones():
    blocks, x = learned().blocks(8), torch.tensor([CLEAN[0]]).expand(100, 8)
    u = uniforms(1, Stream.POSITION, row=torch.arange(100)[:, None], position=torch.arange(8))
    v, real = u[:, :1], u[:, 3:4] + torch.arange(8) / 8 < 1.0
    plain = noise_by_count(NoiseUniforms(v, u), blocks, scorable=real)
    noise = draw_noise(learned({0: 1.0}), x, NoiseUniforms(v, u), ByCount(), real)
    assert torch.equal(noise.corrupted, plain.corrupted)
    assert (noise.weight - plain.weight).abs().max() < 1e-12
    double = draw_noise(learned({0: 2.0}), x, NoiseUniforms(v, u), ByCount(), real)
    assert torch.equal(double.corrupted, plain.corrupted)
    assert (2.0 * double.weight - plain.weight).abs().max() < 1e-12


def test_times_of_equal_exponents_are_the_ordinary_ones_whatever_their_scale():
    x = torch.tensor([CLEAN[0]]).expand(100, 8)
    u = uniforms(1, Stream.POSITION, row=torch.arange(100)[:, None], position=torch.arange(8))
    v, real = u[:, :2].flip(0), u[:, 3:4] + torch.arange(8) / 8 < 1.0
    for w in (0.3, 1.0, 7.0):
        family = learned({0: w}, block_size=5)
        plain = noise_by_time(family.schedule, NoiseUniforms(v, u), family.blocks(8), scorable=real)
        noise = draw_noise(family, x, NoiseUniforms(v, u), ByTime(), real)
        assert torch.equal(noise.corrupted, plain.corrupted)
        assert (w * noise.weight / plain.weight - 1.0)[real].abs().max() < 1e-12
        assert (noise.threshold**w - plain.threshold)[real].abs().max() < 1e-14


def test_the_level_of_a_rate_is_found_however_far_apart_the_exponents():
    family = learned({0: 0.1, 2: 1.0, 3: 40.0})
    x = all_sequences().repeat(3, 1)
    v = torch.logspace(-9, -1e-9, len(x), dtype=torch.float64)[:, None]
    noise = draw_noise(family, x, NoiseUniforms(v, 0.5 * v.expand(-1, LENGTH)), ByTime())
    rate = (noise.threshold ** family.process.token_exponents[x]).mean(-1)
    exact = 1.0 - family.schedule.alpha(v[:, 0])
    assert ((rate - exact) / exact).abs().max() < 1e-12


# --- the gradient --------------------------------------------------------------------------------


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.shift


class Net(nn.Module):
    """A table with the face of a denoiser that trains."""

    def __init__(self, table: TableDenoiser):
        super().__init__()
        self.output_layer, self.config, self.hidden = Head(), table.config, table.hidden


def open_batch(family: Family, x: Tensor, rows: int, seed: int) -> CleanBatch:
    """Rows of one text with independent times."""
    blocks = family.blocks(len(x))
    row, position = torch.arange(rows)[:, None], torch.arange(len(x))
    v = uniforms(seed, Stream.JITTER, row=row, block=torch.arange(blocks.count))
    streams = (Stream.POSITION, Stream.PAIR)
    u = torch.cat([uniforms(seed, s, row=row, position=position) for s in streams])
    pair = NoiseUniforms(v.repeat(2, 1), u)
    return CleanBatch(x.expand(rows, -1), pair, None, family.block_size)


def single_masks(batch: CleanBatch) -> list[NoiseUniforms]:
    """The uniforms of a batch's two masks apart."""
    both, rows = batch.uniforms, len(batch.x0)
    return [both.map(lambda x, part=part: x[part]) for part in (slice(rows), slice(rows, None))]


STEEP = {0: 1.5, 2: 2.0, 3: 3.1}


def drifting() -> TableDenoiser:
    return TableDenoiser(random_table(0), drift=random_table(9).log_p.clamp(min=-3.0))


def exact_gradient(x: Tensor) -> Tensor:
    """[ROWS] of the enumerated bound with respect to `raw`, by central differences."""
    module, step = exponents(STEEP), 1e-4
    gradient = torch.zeros(ROWS, dtype=torch.float64)
    for token in set(x.tolist()) | set(CLEAN):
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                module.raw[token] += sign * step
                values.append(nelbo(drifting(), learned(module), x))
                module.raw[token] -= sign * step
        gradient[token] = (values[0] - values[1]) / (2 * step)
    return gradient


def estimates(net, family: Family, x: Tensor, groups: int, rows: int) -> tuple[Tensor, Tensor]:
    """[groups, ROWS] gradients of the library, and of plain REINFORCE with the same draws."""
    raw, found, plain = family.learned.raw, [], []
    for seed in range(groups):
        batch = open_batch(family, x, rows, seed)
        loss, value = LearnedScheduleLoss(net, family)(batch)
        assert loss.item() == pytest.approx(value.item(), abs=1e-9)
        found.append(torch.autograd.grad(loss, raw)[0] / rows)
        plain.append(torch.autograd.grad(plain_surrogate(net, family, batch), raw)[0] / rows)
    return torch.stack(found), torch.stack(plain)


def plain_surrogate(net, family: Family, batch: CleanBatch) -> Tensor:
    """Pathwise part and f (ln q)' without a baseline, the mean over both masks."""
    total = torch.zeros((), dtype=torch.float64)
    for single in single_masks(batch):
        with torch.no_grad():
            noise = draw_noise(family, batch.x0, single, ByTime())
            nats = row_nats(net, family, batch.x0, noise)
        terms = PositionTerms(net, family, corrupt(family, batch.x0, noise, None))
        pathwise = terms.losses(slice(None), terms.head(*terms.inputs))[0].sum()
        log_q = log_mask(noise, family.process.rate_exponents(batch.x0)).sum(-1)
        total = total + ((nats * log_q).sum() + pathwise) / 2
    return total


@pytest.mark.parametrize("x", [(0, 2, 3), (0, 0, 2), (3, 3, 3)])
def test_gradient_of_the_exponents_is_that_of_the_enumerated_bound(x):
    x = torch.tensor(x)
    exact = exact_gradient(x)
    family = learned(STEEP)
    found, plain = estimates(Net(drifting()), family, x, groups=150, rows=60)
    tokens = list(CLEAN)
    for sample_of in (found, plain):
        error = sample_of.std(0)[tokens] / math.sqrt(len(sample_of))
        assert ((sample_of.mean(0) - exact)[tokens].abs() < 4 * error).all()
    assert exact[tokens].abs().max() > 0.05
    assert (found[:, [MASK, EXCLUDED]] == 0.0).all()


def trained_family(block_size: int | None = None, exponent: float = 0.8):
    """A real network that holds the exponents."""
    schedule = {"kind": "learned", "exponent": exponent}
    spec = {"process": "absorbing", "schedule": schedule, "objective": {"kind": "mdlm"}}
    spec["block_size"] = block_size
    model = tiny_model(diffusion=spec)
    config = model.config
    vocabulary = Vocabulary.of(config.vocab_size, config.mask_token_id, config.excluded_token_ids)
    return model, build_family(spec, vocabulary, None, model.exponents)


@pytest.mark.parametrize("block_size", [None, 8])
def test_each_mask_is_a_baseline_for_the_other(block_size):
    """From a few tokens on; at three there is little to subtract."""
    model, family = trained_family(block_size, exponent=2.0)
    ids = family.process.vocabulary.ids
    x = ids[torch.arange(16) % len(ids)]
    found, plain = estimates(model, family, x, groups=150, rows=1)
    assert float(found.var(0).sum()) < 0.6 * float(plain.var(0).sum())
    difference = found - plain
    error = difference.std(0) / math.sqrt(len(difference))
    assert (difference.mean(0).abs() <= 4 * error).all()


@pytest.mark.parametrize("block_size", [None, 5])
def test_network_gradient_is_the_mean_over_both_masks(block_size):
    model, family = trained_family(block_size)
    ids = family.process.vocabulary.ids
    batch = open_batch(family, ids[torch.arange(10) % len(ids)], 4, 0)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    exact: dict[str, Tensor] = {}
    for single in single_masks(batch):
        with torch.no_grad():
            noise = draw_noise(family, batch.x0, single, ByTime())
        loss, _ = DenoisingLoss(model, family)(corrupt(family, batch.x0, noise, None))
        for name, gradient in gradients(loss).items():
            exact[name] = exact.get(name, 0.0) + gradient / 2
    found = gradients(LearnedScheduleLoss(model, family)(batch)[0])
    assert (found.pop("exponents.raw") != 0.0).any()
    for name, gradient in found.items():
        assert (gradient - exact[name]).abs().max() < 1e-9, name


# --- the sampler ---------------------------------------------------------------------------------


def ancestral_law(denoise: PlainPredictor, family: Family, steps: int) -> Tensor:
    """[27] the law of T steps: the chain on all 64 states, position by position independent."""
    states = torch.tensor(list(itertools.product((*CLEAN, MASK), repeat=LENGTH)))
    digits = torch.tensor(list(itertools.product(range(4), repeat=LENGTH)))
    law = torch.zeros(len(states), dtype=torch.float64)
    law[-1] = 1.0
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    everywhere = torch.arange(states.numel())
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            prediction = denoise(states, t.expand(len(states)), everywhere)
            alphas = [(1.0 - time).expand(states.numel()) for time in (s, t)]
            back = family.process.posterior(prediction.log_x0, states.flatten(), *alphas)
            back = back[:, [*CLEAN, MASK]].view(len(states), LENGTH, 4)
            move = torch.stack([back[:, i, digits[:, i]] for i in range(LENGTH)]).prod(0)
            law = law @ move
    clean = (states != MASK).all(-1)
    assert float(law[clean].sum()) == pytest.approx(1.0, abs=1e-9)
    return law[clean]


def test_distance_to_the_joint_falls_with_the_steps(joint):
    family = learned()
    denoise = alone(TimeOracle(joint, family), family, torch.full((64,), LENGTH))
    distances = [
        total_variation(ancestral_law(denoise, family, 2**power), joint) for power in range(9)
    ]
    assert all(fine < coarse for coarse, fine in itertools.pairwise(distances))
    assert distances[-1] < 0.01
    assert 1.7 < distances[-2] / distances[-1] < 2.3


def test_samples_follow_the_law_of_their_steps(joint):
    family, rows = learned(), 20_000
    oracle_of_time = TimeOracle(joint, family)
    denoise = alone(oracle_of_time, family, torch.full((64,), LENGTH))
    law = ancestral_law(denoise, family, 6)
    counts = frequencies(sample(oracle_of_time, family, rows, 6))
    assert chi_square_p(counts, rows * law) > 1e-3
    assert chi_square_p(counts, rows * joint) < 1e-6
