"""Self-conditioning on three tokens and four places: two passes, written out for every text."""

import math

import pytest
import torch
from dense_tables import expected, position_nats, sequences, time_grid, world
from engines import alone, generate
from exact_tables import (
    CLEAN,
    EXCLUDED,
    MASK,
    ROWS,
    Table,
    all_sequences,
    code,
    family,
    masked,
    subsets,
)
from noise_calls import noise_by_count
from test_exact_bound import every_draw, expected_nats
from torch import Tensor

from textdiff.diffusion.noise import Noise, NoiseUniforms
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.windows import cut_windows
from textdiff.loss import DenoisingLoss, corrupt
from textdiff.models import (
    FULL,
    Layout,
    Previous,
    TextDiffusionConfig,
    TextDiffusionModel,
    sampling_layout,
)
from textdiff.sampling.controls import NEUTRAL
from textdiff.sampling.job import Job
from textdiff.sampling.request import Request
from textdiff.sampling.teacher_forcing import ForcedEngine

LENGTH = 4
TEXTS = all_sequences(LENGTH)
SIX = [0, 13, 27, 41, 66, 80]


def network(self_conditioning: bool = True, scale: float = 0.6, **settings) -> TextDiffusionModel:
    """Every parameter random, those of the second input too."""
    config = TextDiffusionConfig(
        vocab_size=ROWS,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        conditioning_size=8,
        mask_token_id=MASK,
        excluded_token_ids=[EXCLUDED],
        self_conditioning=self_conditioning,
        **settings,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = TextDiffusionModel(config).double().eval()
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


TIMED = {"adaln": True, "time_conditioning": True}


def clean_softmax(logits: Tensor) -> Tensor:
    """[..., ROWS] probabilities of clean tokens alone."""
    p = torch.zeros_like(logits)
    p[..., list(CLEAN)] = logits[..., list(CLEAN)].softmax(-1)
    return p


def second_logits(
    model, z: Tensor, at: Tensor, layout: Layout = FULL, sigma: Tensor | None = None
) -> Tensor:
    """[B, L, ROWS] of f(z, f(z, none)), where `at` [N] are the flat positions that are predicted.

    By one stream of tokens; the library scores blocks by two.
    """
    first = model(z, sigma=sigma, layout=layout).logits.flatten(0, 1)[at]
    believed = clean_softmax(first) @ model.vocab_embed.embedding
    return model(z, sigma=sigma, layout=layout, previous=Previous(at, believed)).logits


@torch.no_grad()
def two_pass_table(model, layout: Layout = FULL) -> Table:
    """The network's conditionals at every masked sequence."""
    z = torch.cartesian_prod(*[torch.tensor((*CLEAN, MASK))] * LENGTH)
    at = (z == MASK).flatten().nonzero().squeeze(1)
    logits = second_logits(model, z, at, layout)
    log_p = torch.full((ROWS**LENGTH, LENGTH, ROWS), torch.nan, dtype=torch.float64)
    log_p[code(z)] = clean_softmax(logits).log()
    return Table(log_p)


def masked_nelbo(table: Table, x: Tensor, block: int) -> float:
    """Sum over blocks and subsets S of a block of CE_S / (k C(n, k)), with what follows masked."""
    total = 0.0
    for start in range(0, LENGTH, block):
        rest = tuple(range(start + block, LENGTH))
        for s in subsets(block):
            open_ = tuple(start + i for i in s)
            z = code(masked(x, (*open_, *rest)))
            ce = -sum(float(table.log_p[z, i, x[i]]) for i in open_)
            total += ce / (len(s) * math.comb(block, len(s)))
    return total


def expected_bound(model, chosen, x: Tensor, keep: Tensor | None = None) -> float:
    """The scorer's exact expectation, over every count and every order."""
    v, u = every_draw(LENGTH, math.factorial(LENGTH))
    blocks = chosen.blocks(LENGTH)
    noise = noise_by_count(NoiseUniforms(v.expand(-1, blocks.count), u), blocks)
    scorer, rows = Scorer(model, chosen, 4096), x.expand(len(u), -1)
    real = torch.ones_like(rows, dtype=torch.bool)
    nats = scorer.nats(rows, noise, real, keep=None if keep is None else keep.expand(len(u), -1))
    assert scorer.rows == 2 * len(u)  # calls are counted as they are
    return float(nats.sum(1).mean())


@pytest.mark.parametrize("block", [LENGTH, 2, 1])
def test_masked_bound_is_that_of_the_two_pass_network(block):
    model = network()
    chosen = family(None if block == LENGTH else block)
    table = two_pass_table(model, sampling_layout(chosen.block_size))
    for x in TEXTS[SIX]:
        wanted = masked_nelbo(table, x, block)
        assert abs(expected_bound(model, chosen, x) - wanted) < 1e-12
    model.self_conditioning = None  # and not that of one pass
    assert abs(expected_nats(model, chosen, x) - wanted) > 1e-3


def test_masked_bound_is_a_bound():
    """Of one token at a time in a random order: a distribution, and never less likely than said."""
    table = two_pass_table(network())
    orders = [tuple(map(int, u.argsort())) for u in every_draw(LENGTH, 1)[1]]
    chances = [math.fsum(math.exp(-table.chain(x, o)) for o in orders) / 24 for x in TEXTS[::5]]
    bounds = [table.nelbo(x) for x in TEXTS[::5]]
    assert all(nats > -math.log(p) for nats, p in zip(bounds, chances, strict=True))
    every = math.fsum(math.exp(-table.chain(x, orders[7])) for x in TEXTS)
    assert abs(every - 1.0) < 1e-12


def test_positions_that_are_left_out_of_a_score_still_have_a_first_prediction():
    model, chosen = network(), family()
    first = torch.tensor([True, True, False, False])
    parts = [expected_bound(model, chosen, TEXTS[41], keep) for keep in (first, ~first)]
    assert abs(sum(parts) - expected_bound(model, chosen, TEXTS[41])) < 1e-12


def noise_for(z: Tensor, t: Tensor, chosen, blocks: int = 1) -> Noise:
    """Noise at time t that turns any text into z [B, L]: all of it is drawn anew."""
    alpha = chosen.schedule.alpha(t).view(-1, 1).expand(z.shape)
    which = torch.searchsorted(torch.tensor(CLEAN), z)
    u_token = (which + 0.5) / len(CLEAN)
    weight = chosen.schedule.elbo_weight(t).view(-1, 1).expand(z.shape)
    return Noise(alpha, 1.0 - alpha, torch.zeros_like(alpha), weight, u_token)


def scored(model, chosen, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """[B, L] nats of the library."""
    rows = x.expand(len(z), -1)
    noise = noise_for(z, t, chosen)
    return Scorer(model, chosen, 4096).nats(rows, noise, torch.ones_like(rows, dtype=torch.bool))


@torch.no_grad()
def two_pass_logits(model, chosen, t: Tensor) -> Tensor:
    """[Q, S, L, ROWS] of every noisy sequence, all of whose positions are predicted."""
    z = sequences("uniform", LENGTH)
    found = []
    for level in t:
        sigma = chosen.network_time(chosen.schedule.alpha(level)).expand(len(z))
        found.append(second_logits(model, z, torch.arange(z.numel()), sigma=sigma))
    return torch.stack(found)


def test_uniform_bound_is_that_of_the_two_pass_network():
    model, chosen = network(**TIMED), world("uniform", "udlm")
    t, weight = time_grid(8)
    z, logits = sequences("uniform", LENGTH), two_pass_logits(model, chosen, t)
    for index in SIX[::2]:
        x = TEXTS[index]
        wanted = position_nats(chosen, logits, t, x, "uniform")  # [Q, S, L]
        each = [scored(model, chosen, x, z, level.expand(len(z))) for level in t]
        found = torch.stack(each)
        total = (weight * expected("uniform", t, found, index)).sum()
        assert abs(float(total - (weight * expected("uniform", t, wanted, index)).sum())) < 1e-12
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_uniform_blocks_read_clean_text_without_a_prediction_of_it():
    """The second block by one stream after the clean first one, which nothing is added to."""
    model, chosen = network(**TIMED), world("uniform", "udlm", block_size=2)
    x, t = TEXTS[41], torch.tensor(0.35, dtype=torch.float64)
    noisy = sequences("uniform", 2)  # [9, 2]
    z = torch.cat([x[:2].expand(len(noisy), -1), noisy], 1)
    flat = (torch.arange(len(z))[:, None] * LENGTH + torch.tensor([2, 3])).flatten()
    level = chosen.network_time(chosen.schedule.alpha(t)).expand(len(z), 1)
    sigma = torch.cat([torch.zeros_like(level), level], 1)
    logits = second_logits(model, z, flat, sampling_layout(2), sigma)[:, 2:]
    wanted = position_nats(
        world("uniform", "udlm"), logits[None], t[None], x[2:], "uniform"
    )  # [1, 9, 2]
    noise = torch.cat([noisy.flip(0), noisy], 1)  # what the first block holds does not matter
    found = scored(model, chosen, x, noise, t.expand(len(z)))[:, 2:]
    torch.testing.assert_close(found, wanted[0], rtol=1e-11, atol=1e-12)


# --- training ------------------------------------------------------------------------------------


def training_batch(chosen, rows: int = 6):
    u = torch.rand(rows, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = (torch.arange(rows, dtype=torch.float64)[:, None] + 0.5) / rows
    blocks = chosen.blocks(LENGTH)
    noise = noise_by_count(NoiseUniforms(v.expand(-1, blocks.count), u), blocks)
    return corrupt(chosen, TEXTS[7 : 7 + rows * 12 : 12], noise, None)


@pytest.mark.parametrize("block", [None, 2])
def test_gradients_do_not_pass_through_the_first_prediction(block):
    """Those of a loss in which what is added is a constant; the embedding's rows enter once."""
    model, chosen = network(), family(block)
    plain = training_batch(chosen)
    picked = torch.tensor([True, False, True, True, False, False])
    batch = plain.self_conditioned(torch.tensor([0, 2, 3]))
    loss, nelbo = DenoisingLoss(model, chosen)(batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(found[f"self_conditioning.mlp.{i}.weight"].abs().max() > 1e-3 for i in (0, 2))
    model.zero_grad()

    context = None if block is None else plain.x0
    layout = FULL if block is None else Layout("block_diffusion", block)
    logits = model(plain.xt, context_ids=context, layout=layout).logits.flatten(0, 1)
    at = plain.positions[picked[plain.positions // LENGTH]]
    believed = (clean_softmax(logits[at]) @ model.vocab_embed.embedding).detach()
    logits = model(
        plain.xt, context_ids=context, layout=layout, previous=Previous(at, believed)
    ).logits.flatten(0, 1)[plain.positions]
    p = clean_softmax(logits).gather(1, plain.x0.flatten()[plain.positions][:, None])[:, 0]
    other = -(plain.noise.weight * p.log()).sum()
    other.backward()
    assert abs(float((loss - other).detach())) < 1e-11
    assert abs(float(nelbo - other.detach())) < 1e-11
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-11, msg=name)


def test_rows_that_are_not_picked_are_those_without_a_prediction():
    model, chosen = network(), family()
    plain = training_batch(chosen)
    none = plain.self_conditioned(torch.arange(0))
    loss, _ = DenoisingLoss(model, chosen)(none)
    assert torch.equal(loss, DenoisingLoss(model, chosen)(plain)[0])
    loss.backward()  # every process has a gradient of every parameter, if only zero
    assert all(p.grad is not None for p in model.parameters())
    picked = torch.tensor([0, 2, 3])
    several, everywhere = (plain.self_conditioned(picked, whole) for whole in (False, True))
    assert [len(b.first.rows) for b in (none, several, everywhere)] == [1, 3, 6]
    losses = [DenoisingLoss(model, chosen)(b)[0] for b in (several, everywhere)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0.0)
    assert abs(float((losses[0] - loss).detach())) > 1e-3


def test_an_untrained_second_input_changes_nothing():
    config = network().config
    torch.manual_seed(3)
    fresh = TextDiffusionModel(config).double()
    without = network(self_conditioning=False)
    missing = without.load_state_dict(fresh.state_dict(), strict=False)
    assert all(name.startswith("self_conditioning.") for name in missing.unexpected_keys)
    z = TEXTS.where(CLEAN[1] != TEXTS, MASK)
    previous = Previous(torch.arange(z.numel()), torch.randn(z.numel(), 8, dtype=torch.float64))
    assert torch.equal(fresh(z, previous=previous).logits, without(z).logits)


# --- generation ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_call_reads_what_the_last_one_predicted_where_it_is_still_open():
    model, chosen = network(), family()
    denoise = alone(model, chosen, torch.tensor([LENGTH, LENGTH]))
    t = torch.tensor([0.5, 0.5], dtype=torch.float64)
    canvas = torch.full((2, LENGTH), MASK)
    first = denoise(canvas, t, torch.tensor([1, 5]))
    logits = model(canvas).logits.flatten(0, 1)
    believed = clean_softmax(logits) @ model.vocab_embed.embedding
    torch.testing.assert_close(first.log_x0.exp(), clean_softmax(logits)[[1, 5]])
    canvas = torch.tensor([[MASK, CLEAN[0], MASK, MASK], [MASK] * LENGTH])
    second = denoise(canvas, t, torch.tensor([3, 0]))  # the other row is not called
    at = torch.tensor([0, 2, 3])
    logits = model(canvas[:1], previous=Previous(at, believed[at])).logits[0]
    torch.testing.assert_close(second.log_x0.exp(), clean_softmax(logits)[[3, 0]])
    believed[at] = clean_softmax(logits)[at] @ model.vocab_embed.embedding
    canvas[0, :2] = torch.tensor([CLEAN[1], MASK])  # masked again: nothing is known there
    third = denoise(canvas, t, torch.tensor([1, 4]))
    at = torch.tensor([2, 3, *range(4, 8)])
    logits = model(canvas, previous=Previous(at, believed[at])).logits.flatten(0, 1)
    torch.testing.assert_close(third.log_x0.exp(), clean_softmax(logits)[[1, 4]])
    assert (denoise.calls, denoise.rows) == (3, 5)


@pytest.mark.parametrize("block", [None, 2, 1])
@pytest.mark.parametrize(("rule", "knobs"), [("confidence", {}), ("threshold", {"threshold": 0.6})])
def test_a_rule_writes_texts_of_probabilities_that_add_up_to_one(rule, knobs, block):
    config = NEUTRAL.merge(rule=rule, knobs=knobs, steps=2, cache="off")
    request = Request(Job([[None] * LENGTH] * len(TEXTS), [0] * len(TEXTS)), config)
    model, chosen = network(), family(block)
    with torch.no_grad():
        log_p = ForcedEngine(model, chosen, request, TEXTS).log_likelihoods().sum(1)
    assert abs(float(log_p.exp().sum()) - 1.0) < 1e-12
    documents = [x.numpy().astype("int32") for x in TEXTS]
    windows = cut_windows(documents, [""] * len(TEXTS), LENGTH, chosen.process.vocabulary.clean)
    options = {"rule": rule, "knobs": knobs, "steps": 2, "seed": 0}
    found = estimate(model, chosen, windows, estimator="policy", **options)
    torch.testing.assert_close(found.nats[0], -log_p, rtol=1e-12, atol=1e-12)


def test_chances_are_those_of_generated_texts():
    """Rows of one prompt differ in their draws alone."""
    model, chosen, count = network(), family(), 4000
    job = Job([[]] * count, [LENGTH] * count, seed=1)
    *_, last = generate(model, chosen, job, rule="confidence", steps=2)
    config = NEUTRAL.merge(rule="confidence", steps=2, cache="off")
    request = Request(Job([[None] * LENGTH] * len(TEXTS), [0] * len(TEXTS)), config)
    with torch.no_grad():
        log_p = ForcedEngine(model, chosen, request, TEXTS).log_likelihoods().sum(1)
    order = code(TEXTS)
    drawn = torch.searchsorted(order, code(last.canvas))
    counts = torch.bincount(drawn, minlength=len(TEXTS)).double()
    wanted = count * log_p.exp()
    often = wanted > 5.0
    chi = float(((counts - wanted).square() / wanted)[often].sum())
    assert chi < int(often.sum()) + 4.0 * math.sqrt(2.0 * int(often.sum()))
