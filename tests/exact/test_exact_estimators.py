"""Every estimator against enumeration: its exact expectation, or what it computes exactly.

Identities 1, 2, 4, 18, 27, 31 and 32 of the masked bound, through the public `estimate`.
"""

import itertools
import math
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from exact_stats import beta_cdf, gauss_legendre
from exact_tables import (
    CLEAN,
    LENGTH,
    MASK,
    Table,
    TableDenoiser,
    all_sequences,
    code,
    family,
    masked,
    oracle,
    random_joint,
    random_table,
    subsets,
)
from noise_calls import noise_by_time
from refusals import refused

from textdiff.config import Config
from textdiff.diffusion.family import Blocks
from textdiff.diffusion.noise import NoiseUniforms
from textdiff.diffusion.randomness import Stream
from textdiff.errors import CheckpointError, ConfigError
from textdiff.likelihood.estimators import ESTIMATORS
from textdiff.likelihood.estimators.estimator import WindowBatch
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows
from textdiff.loss import DenoisingLoss
from textdiff.train.batches import TrainingBatches

TEXTS = all_sequences()
ORDERS = list(itertools.permutations(range(LENGTH)))
MANY = 60


def windows(family, texts=TEXTS, **options):
    arrays = [x.to(torch.int32).numpy() for x in texts]
    clean = family.process.vocabulary.clean.clone()
    clean[MASK] = True  # so that tests can leave holes in a context
    return cut_windows(arrays, ["abc"] * len(texts), LENGTH, clean, **options)


@pytest.fixture(scope="module")
def table() -> Table:
    return random_table(0)


@pytest.fixture(scope="module")
def joint() -> torch.Tensor:
    return random_joint(3)


def agrees(denoiser, chosen, texts, exact: list[float], name: str, draws=2400, **options) -> None:
    """Every text's mean nats within 4.5 standard errors, by many documents of the same text.

    Documents have noise of their own, so they are as good as replicates, and share calls.
    """
    copies = draws // 8
    repeated = texts.repeat_interleave(copies, 0)
    nats = estimate(
        denoiser, chosen, windows(chosen, repeated), estimator=name, seed=1, **options
    ).nats
    nats = nats.view(8, len(texts), copies).transpose(1, 2).reshape(-1, len(texts))
    stderr = nats.std(0) / math.sqrt(len(nats))
    error = (nats.mean(0) - torch.tensor(exact, dtype=torch.float64)).abs()
    assert (error < 4.5 * stderr + 1e-9).all()
    total = float((nats.mean(0) - torch.tensor(exact, dtype=torch.float64)).sum())
    assert abs(total) < 4 * float(stderr.square().sum().sqrt()) + 1e-9


def blockwise(table: Table, x, block_size: int | None) -> float:
    """The exact bound in blocks: the mean chain over orders that keep the blocks' order."""
    size = block_size or LENGTH
    kept = [o for o in ORDERS if [i // size for i in o] == sorted(i // size for i in o)]
    return fmean(table.chain(x, order) for order in kept)


UNBIASED = [
    ("masked_count", {}),
    ("masked_count", {"samples": 3}),
    ("any_order", {}),
    ("any_order", {"samples": 2}),
    ("balanced", {}),
    ("balanced", {"samples": 2}),
    ("balanced", {"samples": 5}),
    ("importance", {"orders": 1}),
    ("time", {}),
]


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize(("name", "options"), UNBIASED, ids=str)
def test_expectation_is_the_bound(table, block_size, name, options):
    chosen = family(block_size)
    texts = TEXTS[::4]
    exact = [blockwise(table, x, block_size) for x in texts]
    agrees(TableDenoiser(table), chosen, texts, exact, name, **options)


@pytest.mark.parametrize("block_size", [None, 1, 2])
def test_enumeration_is_the_bound_without_error(table, block_size):
    chosen = family(block_size)
    found = estimate(
        TableDenoiser(table), chosen, windows(chosen), estimator="exact", seed=0, batch_tokens=7
    )
    for index, x in enumerate(TEXTS):
        document = found.document(index)
        assert document.mean * LENGTH == pytest.approx(blockwise(table, x, block_size), abs=1e-12)
        assert document.stderr == 0.0
        assert document.interval() == (document.mean, document.mean)
    assert found.replicates == 1


def test_left_to_right_is_the_chain_without_error(table):
    found = estimate(
        TableDenoiser(table), family(), windows(family()), estimator="chain_rule", seed=0
    )
    for index, x in enumerate(TEXTS):
        chain = table.chain(x, tuple(range(LENGTH)))
        assert found.document(index).mean * LENGTH == pytest.approx(chain, abs=1e-12)


def conditioned_value(table: Table, drift, x) -> float:
    """The bound of a table that sees the rate: sum over S of int l^(k-1) (1-l)^(n-k) CE_S(l) dl."""
    rates, weights = gauss_legendre(40)
    total = 0.0
    for s in subsets():
        k, z = len(s), int(code(masked(x, s)))
        logits = table.log_p[z] + torch.sin(3.0 * rates)[:, None, None] * drift[z]
        log_p = logits[..., list(CLEAN)].log_softmax(-1)
        cost = -sum(log_p[:, i, CLEAN.index(int(x[i]))] for i in s)
        total += float((weights * rates ** (k - 1) * (1.0 - rates) ** (LENGTH - k) * cost).sum())
    return total


@pytest.mark.parametrize("name", ["masked_count", "balanced", "time"])
def test_networks_that_see_the_noise_level(table, name):
    generator = torch.Generator().manual_seed(2)
    drift = torch.randn(table.log_p.shape, generator=generator, dtype=torch.float64)
    texts = TEXTS[::4]
    exact = [conditioned_value(table, drift, x) for x in texts]
    agrees(TableDenoiser(table, drift), family(), texts, exact, name, draws=8000)


def test_longer_blocks_have_arcs_of_every_size():
    """Four tokens: counts up to 4, arcs that wrap around, a last block of one."""
    longer = random_table(4, length=4)
    texts = all_sequences(4)[::17]
    clean = family().process.vocabulary.clean
    arrays = [x.to(torch.int32).numpy() for x in texts.repeat_interleave(300, 0)]
    cut = cut_windows(arrays, ["abcd"] * len(arrays), 4, clean)
    for block_size in (None, 3):
        nats = estimate(
            TableDenoiser(longer),
            family(block_size),
            cut,
            estimator="balanced",
            samples=3,
            seed=0,
        ).nats
        exact = estimate(
            TableDenoiser(longer), family(block_size), cut, estimator="exact", seed=0
        ).nats[0, ::300]
        nats = nats.view(8, -1, 300).transpose(1, 2).flatten(0, 1)
        stderr = nats.std(0) / math.sqrt(len(nats))
        assert ((nats.mean(0) - exact).abs() < 4.5 * stderr).all()


# --- several orders ------------------------------------------------------------------------------


def importance_value(table: Table, x, count: int) -> float:
    """E of -log mean over `count` orders, by enumeration of all tuples."""
    likelihoods = [math.exp(-table.chain(x, order)) for order in ORDERS]
    tuples = itertools.product(likelihoods, repeat=count)
    return fmean(-math.log(fmean(chosen)) for chosen in tuples)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_importance_weighted_expectation(table, count):
    texts = TEXTS[::3]
    exact = [importance_value(table, x, count) for x in texts]
    agrees(TableDenoiser(table), family(), texts, exact, "importance", orders=count)


def enumerated(table: Table, x, count: int, monkeypatch) -> float:
    """What the library's estimator expects: one document for every tuple of orders."""
    tuples = list(itertools.product(ORDERS, repeat=count))
    ranks = torch.tensor(tuples, dtype=torch.float64).argsort(-1)  # [tuples, K, L]

    def forced(self, stream, draw=0, draws=1):
        assert (stream, draws) == (Stream.POSITION, count)
        return (1.0 - (ranks[:, draw] + 0.5) / LENGTH)[self.document]

    monkeypatch.setattr(WindowBatch, "uniforms", forced)
    texts = x.expand(len(tuples), -1)
    problem = TableDenoiser(table), family(), windows(family(), texts)
    found = estimate(*problem, estimator="importance", orders=count, seed=0, batch_tokens=2**16)
    return float(found.nats[0].mean())


def test_more_orders_never_loosen_nor_pass_the_order_average(table, monkeypatch):
    for x in TEXTS[::9]:
        values = [enumerated(table, x, count, monkeypatch) for count in (1, 2, 3, 4)]
        assert values[0] == pytest.approx(table.nelbo(x), abs=1e-12)
        for count in (2, 4):
            assert values[count - 1] == pytest.approx(importance_value(table, x, count), abs=1e-12)
        assert values == sorted(values, reverse=True)
        limit = -math.log(fmean(math.exp(-table.chain(x, order)) for order in ORDERS))
        assert values[-1] > limit - 1e-12


@pytest.mark.parametrize("orders", [1, 2, 5])
def test_oracle_has_its_likelihood_for_any_number_of_orders(joint, orders):
    problem = TableDenoiser(oracle(joint)), family(), windows(family())
    found = estimate(*problem, estimator="importance", orders=orders, seed=0)
    assert (found.nats + joint.log()).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["any_order", "importance", "chain_rule", "exact"])
def test_oracle_has_its_likelihood_in_every_replicate(joint, name):
    found = estimate(
        TableDenoiser(oracle(joint)), family(), windows(family()), estimator=name, seed=0
    )
    assert (found.nats + joint.log()).abs().max() < 1e-12


# --- truncated and finite time -------------------------------------------------------------------


class TrainableTable(torch.nn.Module):
    """A table with the face of a denoiser that trains: its head has one parameter."""

    def __init__(self, table: Table):
        super().__init__()
        denoiser = TableDenoiser(table)
        self.config, self.hidden = denoiser.config, denoiser.hidden
        self.output_layer = Shifted()


class Shifted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.shift


def truncated(table: Table, x, noise_eps: float, eps: float) -> float:
    """What uniform times in [eps, 1] expect, by incomplete Beta integrals."""
    low, high = (1.0 - noise_eps) * eps, 1.0 - noise_eps
    total = 0.0
    for s in subsets():
        k = len(s)
        share = beta_cdf(torch.tensor(high).double(), k, LENGTH)
        share = float(share - beta_cdf(torch.tensor(low).double(), k, LENGTH))
        total += table.cross_entropy(x, s) * share / (k * math.comb(LENGTH, k))
    return total / (1.0 - eps)


@pytest.mark.parametrize(("noise_eps", "eps"), [(0.0, 0.1), (1e-3, 1e-3), (0.2, 0.05)])
def test_published_form_expects_the_truncated_integral(table, noise_eps, eps):
    chosen = family(schedule={"kind": "loglinear", "eps": noise_eps})
    texts = TEXTS[::4]
    exact = [truncated(table, x, noise_eps, eps) for x in texts]
    options = {"eps": eps, "complete": False}
    agrees(TableDenoiser(table), chosen, texts, exact, "time", draws=16000, **options)
    bound = estimate(
        TableDenoiser(table), chosen, windows(chosen), estimator="time", seed=2, **options
    ).bound()
    assert not bound.is_bound
    assert "reconstruction" in bound.note


@pytest.mark.parametrize(("noise_eps", "cut"), [(0.0, 0.1), (0.2, 0.2)])
def test_training_by_time_expects_the_integral_over_its_rates(table, noise_eps, cut):
    """The loss of a run's own batches, whose times are stratified over each of them."""
    chosen = family(schedule={"kind": "loglinear", "eps": noise_eps}, loss_weight="elbo")
    x, steps, rows = TEXTS[15], 60, 2048  # costs change with the rate
    raw = {
        "data": {"sequence_length": LENGTH},
        "sample": {"max_new_tokens": LENGTH},
        "diffusion": {"noise": {"draw": "time", "range": [cut, 1.0]}},
        "train": {"global_batch_size": rows, "micro_batch_size": rows},
    }
    corpus = SimpleNamespace(
        rows=lambda which: SimpleNamespace(tokens=x.expand(len(which), -1).numpy(), documents=None)
    )
    batches = TrainingBatches(corpus, chosen, Config.model_validate(raw))
    loss = DenoisingLoss(TrainableTable(table), chosen)
    values = [loss(batches[step]) for step in range(steps)]
    assert all(a.item() == pytest.approx(b.item(), abs=1e-12) for a, b in values)
    found = torch.stack([trained.detach() for trained, _ in values]) / rows
    exact = truncated(table, x, noise_eps, cut / (1.0 - noise_eps))
    stderr = float(found.std()) / math.sqrt(steps)
    assert stderr < 0.004 * exact
    assert abs(float(found.mean()) - exact) < 4 * stderr


def test_completed_form_adds_what_is_noisy_by_then(table):
    """(1 - eps) times the truncated mean, and the cross-entropy of what is masked at eps."""
    eps, texts = 0.3, TEXTS[::4]

    def begun(x) -> float:
        chance = {s: eps ** len(s) * (1.0 - eps) ** (LENGTH - len(s)) for s in subsets()}
        return sum(p * table.cross_entropy(x, s) for s, p in chance.items())

    exact = [(1.0 - eps) * truncated(table, x, 0.0, eps) + begun(x) for x in texts]
    agrees(TableDenoiser(table), family(), texts, exact, "time", draws=16000, eps=eps)


def test_an_infinite_prior_is_dropped_and_said(table):
    chosen = family(schedule={"kind": "loglinear", "eps": 1e-3})
    bound = estimate(
        TableDenoiser(table), chosen, windows(chosen), estimator="time", seed=2
    ).bound()
    assert not bound.is_bound
    assert "prior" in bound.note
    assert math.isfinite(bound.mean)


def test_terms_add_up(table):
    bound = estimate(
        TableDenoiser(table), family(), windows(family()), estimator="time", eps=0.1, seed=2
    ).bound()
    assert set(bound.terms) == {"diffusion", "reconstruction", "prior"}
    assert bound.terms["reconstruction"] > 0.0
    assert sum(bound.terms.values()) == pytest.approx(bound.mean, abs=1e-15)


def finite_value(table: Table, x, steps: int) -> float:
    """The bound of a T-step linear schedule, by enumeration of masks at every step."""
    total = 0.0
    for step, s in itertools.product(range(1, steps + 1), subsets()):
        rate, k = step / steps, len(s)
        chance = rate**k * (1.0 - rate) ** (LENGTH - k)
        total += chance * table.cross_entropy(x, s) / step
    return total


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_finite_time_expectation(table, steps, samples):
    texts = TEXTS[::4]
    exact = [finite_value(table, x, steps) for x in texts]
    options = {"timesteps": steps, "samples": samples}
    agrees(TableDenoiser(table), family(), texts, exact, "finite_t", **options)


def test_one_step_has_no_variance_and_many_have_that_of_counts(table):
    """Uniform steps with independent hits would weigh 1000 at the first of them."""
    problem = TableDenoiser(table), family(), windows(family())
    one = estimate(*problem, estimator="finite_t", timesteps=1, seed=0).nats
    assert one.std(0).max() < 1e-12
    many, counts = (
        estimate(*problem, estimator=name, seed=0, replicates=200, **options).nats.var(0).mean()
        for name, options in (("finite_t", {"timesteps": 1000}), ("masked_count", {}))
    )
    assert 0.8 < float(many / counts) < 1.3


# --- variance ------------------------------------------------------------------------------------


def second_moment(table: Table, x, eps: float) -> float:
    """E of the squared published estimate at a linear schedule, by quadrature in log t.

    Times, mask rates and weights are those of the library's noise, sets of masks are enumerated.
    """
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    t = torch.exp(math.log(eps) * (1.0 - u))
    v = ((t - eps) / (1.0 - eps))[:, None]
    blocks = Blocks.of(LENGTH, None)
    noise = noise_by_time(family().schedule, NoiseUniforms(v, v), blocks, rates=(eps, 1.0))
    rate, weight = noise.threshold[:, 0], noise.weight[:, 0]
    total = 0.0
    for s in subsets():
        k = len(s)
        chance = rate**k * (1.0 - rate) ** (LENGTH - k)
        # dt = t |ln eps| du
        square = (weight * table.cross_entropy(x, s)) ** 2
        total += float((t * chance * square).mean()) * -math.log(eps)
    return total / (1.0 - eps)


def test_variance_of_random_times_grows_without_limit(table):
    """The second moment rises by sum CE_i^2 per unit of ln(1 / eps); that by counts is finite."""
    for x in TEXTS[::6]:
        slope = sum(table.cross_entropy(x, (i,)) ** 2 for i in range(LENGTH))
        coarse, fine = (second_moment(table, x, eps) for eps in (1e-4, 1e-6))
        assert (fine - coarse) / math.log(100.0) == pytest.approx(slope, rel=2e-3)


def test_counts_vary_less_than_times_and_balanced_sets_less_than_both(table):
    def spread(name, **options):
        nats = estimate(
            TableDenoiser(table),
            family(),
            windows(family()),
            estimator=name,
            seed=0,
            replicates=MANY,
            **options,
        ).nats
        return float(nats.var(0).mean())

    times, counts = spread("time", complete=False), spread("masked_count", samples=2)
    assert counts < 0.25 * times
    assert spread("balanced", samples=2) < 0.7 * counts


# --- context -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "chain_rule", "importance"])
@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 2), (0, 1)])
def test_oracle_of_a_part_given_the_rest(joint, name, given):
    """The nats of x_A given x_B are -ln P(x_A | x_B), and with those of x_B they are all."""
    scored = ~torch.isin(torch.arange(LENGTH), torch.tensor(given))
    denoiser, chosen = TableDenoiser(oracle(joint)), family()
    masks = [scored.numpy()] * len(TEXTS)
    rest = estimate(
        denoiser, chosen, windows(chosen, TEXTS, scored=masks), estimator=name, seed=0
    ).nats[0]
    alone = TEXTS.masked_fill(scored, MASK)  # x_A is never revealed
    masks = [~scored.numpy()] * len(TEXTS)
    first = estimate(
        denoiser, chosen, windows(chosen, alone, scored=masks), estimator=name, seed=0
    ).nats[0]
    cube = joint.view(3, 3, 3)
    away = tuple(i for i in range(LENGTH) if i not in given)
    marginal = cube.sum(away, keepdim=True).expand(3, 3, 3).flatten()
    assert (first + marginal.log()).abs().max() < 1e-12
    assert (rest + (joint / marginal).log()).abs().max() < 1e-12


@pytest.mark.parametrize("block_size", [1, 2])
def test_a_prompt_in_blocks(joint, block_size):
    denoiser, chosen = TableDenoiser(oracle(joint)), family(block_size)
    mask = torch.tensor([False, True, True])
    masks = [mask.numpy()] * len(TEXTS)
    rest = estimate(
        denoiser, chosen, windows(chosen, TEXTS, scored=masks), estimator="exact", seed=0
    ).nats[0]
    marginal = joint.view(3, 9).sum(1, keepdim=True).expand(3, 9).flatten()
    assert (rest + (joint / marginal).log()).abs().max() < 1e-12


def test_context_after_scored_text_is_refused_in_blocks(joint):
    chosen = family(1)
    masks = [torch.tensor([True, False, True]).numpy()]
    with refused(ConfigError, "context_in_later_block", "later block"):
        estimate(
            TableDenoiser(oracle(joint)),
            chosen,
            windows(chosen, TEXTS[:1], scored=masks),
            seed=0,
        )


@pytest.mark.parametrize("name", ["masked_count", "time", "any_order", "balanced"])
def test_context_is_never_hit_and_never_scored(table, name):
    masks = [torch.tensor([True, False, True]).numpy()] * len(TEXTS)
    seen = []

    class Watching(TableDenoiser):
        def hidden(self, input_ids, *rest):
            seen.append((input_ids[:, 1] != MASK).all())
            return super().hidden(input_ids, *rest)

    chosen = windows(family(), TEXTS, scored=masks)
    found = estimate(
        Watching(table), family(), chosen, estimator=name, seed=0, replicates=MANY, attribute=True
    )
    assert all(seen)
    assert all(float(nats[1]) == 0.0 for nats in found.token_nats())
    exact = estimate(Watching(table), family(), chosen, estimator="exact", seed=0)
    assert found.bound().tokens == 2 * len(TEXTS)
    assert abs(found.bound().mean - exact.bound().mean) < 4 * found.bound().stderr


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["any_order", "importance", "chain_rule", "exact"])
def test_networks_that_see_the_noise_level_have_no_orders(table, name):
    denoiser = TableDenoiser(table)
    denoiser.time_conditioning = True
    with pytest.raises(ConfigError) as error:
        estimate(denoiser, family(), windows(family()), estimator=name, seed=0)
    assert error.value.code == "time_conditioning"


def test_unknown_estimators_and_options_are_refused(table):
    problem = TableDenoiser(table), family(), windows(family())
    for options, reason in [
        ({"estimator": "best"}, "unknown_estimator"),
        ({"eps": 0.1}, "extra_forbidden"),
        ({"estimator": "finite_t"}, "no_timesteps"),
        ({"estimator": "importance", "attribute": True}, "no_token_nats"),
    ]:
        with pytest.raises(ConfigError) as error:
            estimate(*problem, seed=0, **options)
        assert error.value.code == reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"samples": 0}, "greater_than_equal"),  # no row would cost 0
        ({"samples": -1}, "greater_than_equal"),
        ({"samples": 2.5}, "int_from_float"),
        ({"estimator": "importance", "orders": 0}, "greater_than_equal"),
        ({"estimator": "finite_t", "timesteps": -3}, "greater_than_equal"),
        ({"estimator": "time", "eps": math.nan}, "finite_number"),
        ({"estimator": "time", "eps": 1.0}, "less_than"),
        ({"precision": 0.0}, "precision_out_of_range"),
        ({"precision": -0.01}, "precision_out_of_range"),
        ({"precision": math.nan}, "precision_out_of_range"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_scored(table, options, reason):
    denoiser = TableDenoiser(table)
    with pytest.raises(ConfigError) as error:
        estimate(denoiser, family(), windows(family()), seed=0, **options)
    assert error.value.code == reason
    assert denoiser.calls == 0


def test_output_that_is_no_number_is_refused_by_document():
    broken = random_table(0)
    x = torch.tensor([[CLEAN[0]] * LENGTH, [CLEAN[0], CLEAN[1], CLEAN[0]]])
    broken.log_p[..., CLEAN[1]] = torch.nan
    with pytest.raises(CheckpointError, match=r"document [12], window 1.*nan nats"):
        estimate(TableDenoiser(broken), family(), windows(family(), x), estimator="exact", seed=0)
    infinite = random_table(0)
    infinite.log_p[..., CLEAN[1]] = -torch.inf
    with pytest.raises(CheckpointError, match=r"document 2, window 1.*inf nats at token 2"):
        estimate(TableDenoiser(infinite), family(), windows(family(), x), estimator="exact", seed=0)


@pytest.mark.parametrize(
    "name", [n for n in ESTIMATORS if n not in ("importance", "finite_t", "policy")]
)
def test_attributions_add_up_to_documents(table, name):
    chosen = family(2)
    found = estimate(
        TableDenoiser(table), chosen, windows(chosen), estimator=name, seed=0, attribute=True
    )
    for index, nats in enumerate(found.token_nats()):
        assert float(nats.sum()) == pytest.approx(float(found.nats[:, index].mean()), abs=1e-12)
