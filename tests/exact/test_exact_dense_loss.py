"""The training loss of every objective besides cross-entropy: its gradient, chunks and weights."""

from dataclasses import replace

import pytest
import torch
from tiny_models import CLEAN, EXCLUDED, MASK, ROWS, tiny_model
from torch import Tensor

from textdiff import loss as loss_module
from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.noise import NoiseUniforms, draw_noise
from textdiff.diffusion.pairs import training_maker
from textdiff.diffusion.process import Vocabulary
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows
from textdiff.loss import Batch, DenoisingLoss, corrupt
from textdiff.models import training_layout

WIDTH, BATCH = 10, 5
CASES = {
    "udlm": ("uniform", "udlm", {}),
    "gidd": ("hybrid", "gidd", {}),
    "gidd-clipped": ("hybrid", "gidd", {"loss_weight": "clipped"}),
    "gidd-dynamic": ("hybrid", "gidd", {"loss_weight": "dynamic"}),
    "sedd-absorbing": ("absorbing", "sedd", {}),
    "sedd-uniform": ("uniform", "sedd", {}),
}
for _process in ("absorbing", "uniform"):
    for _kind in ("mixture", "plugged"):
        for _auxiliary in (0.0, 0.3):
            _name = f"d3pm-{_process}-{_kind}" + ("-auxiliary" if _auxiliary else "")
            _options = {"parameterization": _kind, "auxiliary": _auxiliary}
            CASES[_name] = (_process, "d3pm", _options)


def family_of(case: str, block_size: int | None = None) -> Family:
    process, kind, options = CASES[case]
    spec = {
        "process": process,
        "schedule": {"kind": "hybrid" if process == "hybrid" else "loglinear"},
        "objective": {"kind": kind, **options},
        "block_size": block_size,
        "timesteps": 7 if kind == "d3pm" else None,
    }
    return build_family(spec, Vocabulary.of(ROWS, MASK, EXCLUDED))


def batch_of(family: Family, draw: str = "count", ragged: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(2)
    x0 = torch.tensor(CLEAN)[torch.randint(len(CLEAN), (BATCH, WIDTH), generator=generator)]
    blocks = family.blocks(WIDTH)
    key, at = torch.arange(BATCH)[:, None], torch.arange(WIDTH)
    v = uniforms(0, Stream.JITTER, row=key, block=torch.arange(blocks.count))
    u = uniforms(0, Stream.POSITION, row=key, position=at)
    u_token = uniforms(0, Stream.TOKEN, row=key, position=at)
    real = at < 5 + key if ragged else None
    noise = draw_noise(family, x0, NoiseUniforms(v, u, u_token), training_maker(family, draw), real)
    return corrupt(family, x0, noise, None if real is None else real.long() - 1)


@pytest.fixture(scope="module")
def model():
    return tiny_model(adaln=True, time_conditioning=True)


def plain(model, family: Family, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and bound of all logits at once, over the network's public call."""
    layout = training_layout(family.block_size)
    context = batch.x0 if layout.streams == 2 else None
    logits = model(
        batch.xt, context, batch.sigma, layout.within(batch.document_ids)
    ).logits.flatten(0, 1)[batch.positions]
    x0, xt = batch.x0.flatten()[batch.positions], batch.xt.flatten()[batch.positions]
    prediction = family.objective.predict(logits, xt, batch.noise.alpha)
    nelbo = family.objective.nelbo_terms(prediction, x0, xt, batch.noise)
    loss = family.objective.loss_terms(nelbo, prediction, x0, xt, batch.noise)
    return loss.sum(), nelbo.sum()


def gradients(model, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Equal up to float64 rounding, and not all zero."""
    scale = max(float(g.abs().max()) for g in exact.values())
    assert scale > 1e-3
    assert exact.keys() == found.keys()
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert (gradient - exact[name]).abs().max() < 1e-11 * scale, name


@pytest.mark.parametrize("block_size", [None, 5], ids=["full", "blocks"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_are_those_of_all_logits_at_once(
    model, case, block_size, monkeypatch
):
    family = family_of(case, block_size)
    for draw in ("count", "time"):
        batch = batch_of(family, draw)
        loss, nelbo = plain(model, family, batch)
        exact = gradients(model, 3.0 * loss)
        for chunk in (1, 4, 1000):
            monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk * ROWS)
            found, found_nelbo = DenoisingLoss(model, family)(batch)
            assert found.item() == pytest.approx(loss.item(), rel=1e-12)
            assert found_nelbo.item() == pytest.approx(nelbo.item(), rel=1e-12)
            assert not found_nelbo.requires_grad
            agree(gradients(model, 3.0 * found), exact)


@pytest.mark.parametrize("case", CASES)
def test_padding_gets_no_nats_and_gives_no_gradient(model, case):
    family = family_of(case)
    batch = batch_of(family, ragged=True)
    loss, nelbo = DenoisingLoss(model, family)(batch)
    exact = gradients(model, loss)
    for junk in (MASK, CLEAN[3]):
        x0, xt = (x.masked_fill(batch.document_ids < 0, junk) for x in (batch.x0, batch.xt))
        other = replace(batch, x0=x0, xt=xt)
        found, found_nelbo = DenoisingLoss(model, family)(other)
        assert found.item() == pytest.approx(loss.item(), rel=1e-12)
        assert found_nelbo.item() == pytest.approx(nelbo.item(), rel=1e-12)
        agree(gradients(model, found), exact)
    assert (batch.document_ids.flatten()[batch.positions] >= 0).all()


# --- weights -------------------------------------------------------------------------------------

WEIGHTED = {
    "gidd-clipped": "gidd",
    "gidd-dynamic": "gidd",
    "d3pm-absorbing-mixture-auxiliary": "d3pm-absorbing-mixture",
    "d3pm-absorbing-plugged-auxiliary": "d3pm-absorbing-plugged",
    "d3pm-uniform-mixture-auxiliary": "d3pm-uniform-mixture",
    "d3pm-uniform-plugged-auxiliary": "d3pm-uniform-plugged",
}


@pytest.mark.parametrize("case", WEIGHTED)
def test_weights_change_the_loss_and_not_the_bound(model, case):
    weighted, own = family_of(case), family_of(WEIGHTED[case])
    batch = batch_of(own)
    loss, nelbo = DenoisingLoss(model, weighted)(batch)
    own_loss, own_nelbo = DenoisingLoss(model, own)(batch)
    assert nelbo.item() == own_nelbo.item() == own_loss.item()
    assert abs(loss.item() - own_loss.item()) > 0.01
    arrays = [batch.x0[0].to(torch.int32).numpy()]
    windows = cut_windows(arrays, ["x" * WIDTH], WIDTH, own.process.vocabulary.clean)
    found = estimate(model, weighted, windows, seed=1).nats
    assert torch.equal(found, estimate(model, own, windows, seed=1).nats)


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("parameterization", ["mixture", "plugged"])
def test_the_auxiliary_loss_is_plain_cross_entropy(model, process, parameterization):
    """0.3 times -log p(x_0 | x_t) wherever nats are paid, from a softmax over clean tokens."""
    family = family_of(f"d3pm-{process}-{parameterization}-auxiliary")
    batch = batch_of(family)
    loss, nelbo = DenoisingLoss(model, family)(batch)
    with torch.no_grad():
        logits = model(batch.xt, None, batch.sigma).logits.flatten(0, 1)[batch.positions]
    log_p = logits[:, list(CLEAN)].log_softmax(-1)
    at = [CLEAN.index(x) for x in batch.x0.flatten()[batch.positions].tolist()]
    cross_entropy = -log_p[torch.arange(len(at)), at].sum()
    assert loss.item() - nelbo.item() == pytest.approx(0.3 * cross_entropy.item(), rel=1e-10)
