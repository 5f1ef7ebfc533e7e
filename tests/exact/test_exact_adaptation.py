"""Options of adaptation: the bound is the sum over masks, and texts are distributed so.

With `shift` outputs are about the next token, with `ar_weight` finished tokens see only those
before them.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from adapted_worlds import LENGTH, TEXTS, World, adapted, network
from engines import generate
from exact_stats import chi_square_p
from exact_tables import ROWS
from refusals import refused
from test_exact_loss import batch_of, gradients
from tiny_models import CLEAN as MODEL_CLEAN
from tiny_models import MASK as MODEL_MASK
from tiny_models import tiny_family, tiny_model

from textdiff import loss as loss_module
from textdiff.config.reading import validate
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives import OBJECTIVES
from textdiff.errors import ConfigError
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows
from textdiff.loss import DenoisingLoss, PositionTerms, corrupt
from textdiff.models import CAUSAL, sampling_layout, training_layout
from textdiff.sampling.job import Job

SHIFT, CAUSAL_CONTEXT = {"shift": True}, {"ar_weight": 0.7}
WORLDS = [(size, SHIFT) for size in (None, 1, 2, 3)]
WORLDS += [(size, CAUSAL_CONTEXT) for size in (2, 3)] + [(2, SHIFT | CAUSAL_CONTEXT)]


@cache
def cached_world(size: int | None, options: tuple[tuple[str, float], ...]) -> World:
    return World(network(), adapted(size, **dict(options)))


@pytest.fixture(params=WORLDS, ids=str)
def world(request) -> World:
    size, options = request.param
    return cached_world(size, tuple(options.items()))


def windows_of(family, texts):
    arrays = [text.to(torch.int32).numpy() for text in texts]
    clean = family.process.vocabulary.clean
    return cut_windows(arrays, ["x" * LENGTH] * len(texts), LENGTH, clean)


def scored(chosen: World, estimator: str, **options):
    """[texts] nats by a public estimator."""
    windows = windows_of(chosen.family, TEXTS[::7])
    return estimate(
        chosen.model, chosen.family, windows, estimator=estimator, seed=0, **options
    ).nats.mean(0)


def test_the_bound_is_the_sum_over_all_masks(world):
    exact = torch.tensor([world.nelbo(x) for x in TEXTS[::7]], dtype=torch.float64)
    assert (scored(world, "exact") - exact).abs().max() < 1e-10
    plain = World(world.model, adapted(world.family.block_size))
    assert abs(plain.nelbo(TEXTS[49]) - exact[7]) > 1e-6


@pytest.mark.parametrize("cache_", ["off", "auto"])
def test_texts_follow_the_distribution(world, cache_):
    """One token at a time in a random order, block by block."""
    rows = 20_000
    enumerated = torch.tensor([world.likelihood(x) for x in TEXTS], dtype=torch.float64)
    assert float(enumerated.sum()) == pytest.approx(1.0, abs=1e-9)
    job = Job([[]] * rows, [LENGTH] * rows, seed=4)
    *_, last = generate(world.model, world.family, job, rule="first_hitting", cache=cache_)
    powers = ROWS ** torch.arange(LENGTH)
    code = {int((x * powers).sum()): i for i, x in enumerate(TEXTS)}
    drawn = torch.tensor([code[int(c)] for c in (last.canvas * powers).sum(1)])
    counts = torch.bincount(drawn, minlength=len(TEXTS)).double()
    assert chi_square_p(counts, rows * enumerated) > 1e-3


def test_documents_begin_with_themselves():
    """In one row, each document has the nats that it has alone."""
    for size in (None, 2):
        chosen = cached_world(size, tuple(SHIFT.items()))
        x0 = torch.cat([TEXTS[5], TEXTS[50]])[None]
        ids = torch.tensor([[0] * LENGTH + [1] * LENGTH])
        u = torch.tensor([[0.2, 0.7, 0.1, 0.9, 0.3, 0.4, 0.8, 0.6]], dtype=torch.float64)
        half = torch.full((1, 8), 0.5, dtype=torch.float64)
        noise = Noise(half, half, u, torch.ones_like(half))

        def nats(x0, noise, ids, chosen=chosen):
            batch = corrupt(chosen.family, x0, noise, ids)
            with torch.no_grad():
                found = PositionTerms(chosen.model, chosen.family, batch).all()
            return batch.positions, found

        places, together = nats(x0, noise, ids)
        for first in (0, LENGTH):
            inside = slice(first, first + LENGTH)
            _, alone = nats(x0[:, inside], noise.map(lambda v, i=inside: v[:, i]), None)
            own = (places >= first) & (places < first + LENGTH)
            assert (together[own] - alone).abs().max() < 1e-10


def log_p_of(logits, x0):
    """[B, L] log-probabilities of tokens among the clean ones."""
    at = torch.tensor([[MODEL_CLEAN.index(x) for x in row] for row in x0.tolist()])
    return logits[..., list(MODEL_CLEAN)].log_softmax(-1).gather(-1, at[..., None]).squeeze(-1)


def plain_loss(model, family, batch):
    """All logits at once, those of clean tokens from a pass over them alone, and autograd.

    Returns:
        The training loss and the bound's sample.
    """
    size, ids, objective = family.block_size, batch.document_ids, family.objective
    noisy = model(
        batch.xt,
        None if size is None else batch.x0,
        batch.sigma,
        training_layout(size, family.causal_context).within(ids),
    ).logits
    clean, first = noisy, torch.zeros(batch.x0.shape[1] - 1, 1, dtype=torch.bool)
    if size is not None:
        layout = CAUSAL if family.causal_context else sampling_layout(size)
        clean = model(batch.x0, sigma=0 * batch.sigma[:, :1], layout=layout.within(ids)).logits
        first = (torch.arange(1, batch.x0.shape[1]) % size == 0)[:, None]
    logits = noisy
    if objective.shift:
        ahead = torch.where(first, clean[:, :-1], noisy[:, :-1])
        logits = torch.cat([noisy[:, :1], ahead], 1)
    nats = -log_p_of(logits, batch.x0).flatten()[batch.positions]
    nelbo = (batch.noise.weight * nats).sum()
    if not objective.ar_weight:
        return nelbo, nelbo
    following = -log_p_of(clean[:, :-1], batch.x0[:, 1:])
    if ids is not None:
        following = following[(ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)]
    return nelbo + objective.ar_weight * following.sum(), nelbo


@pytest.mark.parametrize(
    ("block_size", "options", "ragged"),
    [
        (None, SHIFT, False),
        (5, SHIFT, True),
        (5, CAUSAL_CONTEXT, False),
        (5, SHIFT | CAUSAL_CONTEXT, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [{}, {"adaln": True, "time_conditioning": True}], ids=str)
def test_loss_and_every_gradient_are_those_of_the_plain_composition(
    settings, backend, block_size, options, ragged, monkeypatch
):
    model = tiny_model(**settings, attn_implementation=backend)
    chosen = tiny_family(block_size, **options)
    batch = batch_of(chosen, ragged=ragged)
    plain, bound = plain_loss(model, chosen, batch)
    exact = gradients(model, plain)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 7 * model.config.vocab_size)
    loss, nelbo = DenoisingLoss(model, chosen)(batch)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-10)
    assert nelbo.item() == pytest.approx(bound.item(), abs=1e-10)
    for name, grad in gradients(model, loss).items():
        assert (grad - exact[name]).abs().max() < 1e-10, name


def test_prompts_that_are_hidden_are_not_predicted():
    model, chosen = tiny_model(), tiny_family(5, **CAUSAL_CONTEXT)
    batch = batch_of(chosen)
    hidden = torch.zeros_like(batch.x0, dtype=torch.bool)
    hidden[:, :3] = True
    none = batch.positions[:0]
    batch = replace(batch, positions=none, noise=batch.noise.map(lambda value: value[none]))
    seen = replace(batch, x0=batch.x0.masked_fill(hidden, MODEL_MASK))
    loss, _ = DenoisingLoss(model, chosen)(seen)
    logits = model(seen.x0, layout=CAUSAL).logits[:, 2:-1]
    nats = -log_p_of(logits, seen.x0[:, 3:])
    assert loss.item() == pytest.approx(0.7 * nats.sum().item(), abs=1e-10)


def test_in_blocks_of_one_it_is_the_left_to_right_model_of_its_clean_text():
    model, chosen = tiny_model(), tiny_family(1, **SHIFT, **CAUSAL_CONTEXT)
    batch = batch_of(chosen)
    with torch.no_grad():
        found = PositionTerms(model, chosen, batch).all().view(batch.x0.shape)
        logits = model(batch.x0, layout=CAUSAL).logits
    exact = -log_p_of(logits[:, :-1], batch.x0[:, 1:])
    assert (found[:, 1:] - exact).abs().max() < 1e-10


def test_where_it_has_no_meaning_it_is_refused():
    with refused(ConfigError, "value_error", "ar", "shift: false"):
        OBJECTIVES.build("ar", {"shift": True})
    with refused(ConfigError, "value_error", "ar_weight: 0"):
        OBJECTIVES.build("ar", {"ar_weight": 0.1})
    weighted = {"kind": "mdlm", "ar_weight": 0.1}
    for sizes in (None, [4, None]):
        with refused(ConfigError, None, "block_size", "ar_weight: 0"):
            validate({"diffusion": {"objective": weighted, "block_size": sizes}})
    assert validate({"diffusion": {"objective": weighted, "block_size": 4}})
