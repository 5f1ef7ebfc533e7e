"""Outputs about the next token: the bound is the sum over masks, and texts are distributed so."""

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
from tiny_models import tiny_family, tiny_model

from textdiff.config.reading import validate
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives import OBJECTIVES
from textdiff.errors import ConfigError
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows
from textdiff.loss import DenoisingLoss, PositionTerms, corrupt
from textdiff.models import sampling_layout, training_layout
from textdiff.sampling.job import Job

SETTINGS = {"full": None, "blocks of 2": 2, "blocks of 3": 3, "blocks of 1": 1}
WORLDS = pytest.mark.parametrize("size", SETTINGS.values(), ids=SETTINGS)


@cache
def world(size: int | None, **objective) -> World:
    return World(network(), adapted(size, shift=True, **objective))


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


@WORLDS
def test_the_bound_is_the_sum_over_all_masks(size):
    chosen = world(size)
    exact = torch.tensor([chosen.nelbo(x) for x in TEXTS[::7]], dtype=torch.float64)
    assert (scored(chosen, "exact") - exact).abs().max() < 1e-10
    plain = World(chosen.model, adapted(size))
    assert abs(plain.nelbo(TEXTS[7]) - exact[1]) > 0.01


@WORLDS
@pytest.mark.parametrize("cache_", ["off", "auto"])
def test_texts_follow_the_distribution(size, cache_):
    """One token at a time in a random order, block by block."""
    chosen, rows = world(size), 20_000
    law = torch.tensor([chosen.likelihood(x) for x in TEXTS], dtype=torch.float64)
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-9)
    job = Job([[]] * rows, [LENGTH] * rows, seed=4)
    *_, last = generate(chosen.model, chosen.family, job, rule="first_hitting", cache=cache_)
    powers = ROWS ** torch.arange(LENGTH)
    code = {int((x * powers).sum()): i for i, x in enumerate(TEXTS)}
    drawn = torch.tensor([code[int(c)] for c in (last.canvas * powers).sum(1)])
    counts = torch.bincount(drawn, minlength=len(TEXTS)).double()
    assert chi_square_p(counts, rows * law) > 1e-3


def test_documents_begin_with_themselves():
    """In one row, each document has the nats that it has alone."""
    for size in (None, 2):
        chosen = world(size)
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


def plain_loss(model, family, batch):
    """All logits at once, those of clean tokens from a pass over them alone, and autograd."""
    size = family.block_size
    if size is None:
        logits = model(batch.xt, sigma=batch.sigma).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    else:
        noisy = model(batch.xt, batch.x0, batch.sigma, training_layout(size)).logits
        clean = model(batch.x0, sigma=0 * batch.sigma, layout=sampling_layout(size)).logits
        first = (torch.arange(1, batch.x0.shape[1]) % size == 0)[:, None]
        ahead = torch.where(first, clean[:, :-1], noisy[:, :-1])
        logits = torch.cat([noisy[:, :1], ahead], 1)
    log_p = logits.flatten(0, 1)[batch.positions][:, list(MODEL_CLEAN)].log_softmax(-1)
    targets = batch.x0.flatten()[batch.positions].tolist()
    at = torch.tensor([MODEL_CLEAN.index(x) for x in targets])
    return -(batch.noise.weight * log_p[torch.arange(len(at)), at]).sum()


@pytest.mark.parametrize("block_size", [None, 5], ids=["full", "blocks"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [{}, {"adaln": True, "time_conditioning": True}], ids=str)
def test_loss_and_every_gradient_are_those_of_the_plain_composition(settings, backend, block_size):
    model = tiny_model(**settings, attn_implementation=backend)
    chosen = tiny_family(block_size, shift=True)
    batch = batch_of(chosen)
    plain = plain_loss(model, chosen, batch)
    exact = gradients(model, plain)
    loss, nelbo = DenoisingLoss(model, chosen)(batch)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-10)
    assert nelbo.item() == loss.item()
    for name, grad in gradients(model, loss).items():
        assert (grad - exact[name]).abs().max() < 1e-10, name


def test_where_it_has_no_meaning_it_is_refused():
    with refused(ConfigError, "value_error", "ar", "shift: false"):
        OBJECTIVES.build("ar", {"shift": True})
    with refused(ConfigError, None, "shift: false"):
        validate({"diffusion": {"objective": {"kind": "ar", "shift": True}, "block_size": 1}})
