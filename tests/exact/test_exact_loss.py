"""Identity 26 and the training loss: what it reads, what it ignores, and its gradient."""

from types import SimpleNamespace

import pytest
import torch
from exact_tables import (
    LENGTH,
    TableDenoiser,
    all_sequences,
    family,
    random_table,
)
from noise_calls import noise_by_count, noise_by_time
from tiny_models import CLEAN, EXCLUDED, MASK, ROWS, tiny_family, tiny_model
from torch import Tensor

from textdiff import loss as loss_module
from textdiff.config import Config
from textdiff.diffusion.noise import Noise, NoiseUniforms
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.loss import DenoisingLoss, PositionTerms, corrupt
from textdiff.models import training_layout
from textdiff.train.batches import TrainingBatches

WIDTH = 10


def clean_rows(rows: int, length: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    picks = torch.randint(len(CLEAN), (rows, length), generator=generator)
    return torch.tensor(CLEAN)[picks]


def batch_of(family, rows: int = 6, by: str = "count", ragged: bool = False):
    x0 = clean_rows(rows)
    blocks = family.blocks(WIDTH)
    key = torch.arange(rows)[:, None]
    v = uniforms(0, Stream.JITTER, row=key, block=torch.arange(blocks.count))
    u = uniforms(0, Stream.POSITION, row=key, position=torch.arange(WIDTH))
    real = torch.arange(WIDTH) < 5 + key if ragged else None
    if by == "count":
        noise = noise_by_count(NoiseUniforms(v, u), blocks, scorable=real)
    else:
        noise = noise_by_time(family.schedule, NoiseUniforms(v, u), blocks, scorable=real)
    ids = None if real is None else real.to(torch.int64) - 1
    return corrupt(family, x0, noise, ids)


def plain_terms(model, family, batch) -> tuple[Tensor, Tensor]:
    """Loss and bound written out: all logits at once, log-softmax over clean tokens, autograd."""
    loss = DenoisingLoss(model, family)
    context = batch.x0 if training_layout(loss.family.block_size).streams == 2 else None
    logits = model(
        batch.xt,
        context,
        batch.sigma,
        training_layout(loss.family.block_size).within(batch.document_ids),
    ).logits.flatten(0, 1)[batch.positions]
    log_p = logits[:, list(CLEAN)].log_softmax(-1)
    target = torch.tensor([CLEAN.index(x) for x in batch.x0.flatten()[batch.positions].tolist()])
    ce = -log_p[torch.arange(len(target)), target]
    return 2.0 * ce.sum(), (batch.noise.weight * ce).sum()


def gradients(model, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


SETTINGS = {
    "plain": {},
    "rmsnorm-swiglu-qknorm": {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True},
    "adaln": {"adaln": True},
    "adaln-time-conditioned": {"adaln": True, "time_conditioning": True},
}


@pytest.mark.parametrize("weight", ["elbo", "ce"])
@pytest.mark.parametrize("block_size", [None, 5], ids=["full", "blocks"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loss_and_every_gradient_are_those_of_the_plain_composition(settings, block_size, weight):
    model, chosen = tiny_model(**settings), tiny_family(block_size, loss_weight=weight)
    batch = batch_of(chosen)
    ce, elbo = plain_terms(model, chosen, batch)
    plain = elbo if weight == "elbo" else ce
    exact = gradients(model, plain)
    loss, nelbo = DenoisingLoss(model, chosen)(batch)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-10)
    assert nelbo.item() == pytest.approx(elbo.item(), abs=1e-10)
    for name, found in gradients(model, loss).items():
        assert (found - exact[name]).abs().max() < 1e-10, name
    assert any(g.abs().max() > 1e-3 for g in exact.values())


def test_the_noise_embedding_gets_the_gradient_of_the_head_as_well():
    """With adaln the head is modulated too; the blocks' share alone is a wrong gradient."""
    model, chosen = tiny_model(adaln=True, time_conditioning=True), tiny_family()
    with torch.no_grad():  # no block looks at the noise level: the head's share is all there is
        for block in model.blocks:
            block.adaLN_modulation.weight.zero_()
    batch = batch_of(chosen)
    exact = gradients(model, plain_terms(model, chosen, batch)[1])["sigma_map.mlp.2.bias"]
    assert exact.abs().max() > 1e-3
    found = gradients(model, DenoisingLoss(model, chosen)(batch)[0])["sigma_map.mlp.2.bias"]
    assert (found - exact).abs().max() < 1e-10


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("settings", [{}, {"adaln": True, "time_conditioning": True}], ids=str)
def test_chunks_change_neither_loss_nor_gradient(settings, chunk, monkeypatch):
    model, chosen = tiny_model(**settings), tiny_family()
    batch = batch_of(chosen)
    assert len(batch.positions) > 7
    loss, nelbo = DenoisingLoss(model, chosen)(batch)
    exact = gradients(model, 3.0 * loss)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk * ROWS)
    cut, cut_nelbo = DenoisingLoss(model, chosen)(batch)
    assert cut.item() == pytest.approx(loss.item(), abs=1e-10)
    assert cut_nelbo.item() == pytest.approx(nelbo.item(), abs=1e-10)
    for name, found in gradients(model, 3.0 * cut).items():
        assert (found - exact[name]).abs().max() < 1e-10, name


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_do_not_change_the_estimator(chunk, monkeypatch):
    model, chosen = tiny_model(), tiny_family(5)
    batch = batch_of(chosen)
    with torch.no_grad():
        whole = PositionTerms(model, chosen, batch).all()
        monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk * ROWS)
        assert (PositionTerms(model, chosen, batch).all() - whole).abs().max() < 1e-12


@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("by", ["count", "time"])
def test_training_and_likelihood_pay_the_same_nats(block_size, by):
    model, chosen = tiny_model(), tiny_family(block_size)
    batch = batch_of(chosen, by=by, ragged=True)
    with torch.no_grad():
        found = float(PositionTerms(model, chosen, batch).all().sum())
    loss, nelbo = DenoisingLoss(model, chosen)(batch)
    assert loss.item() == pytest.approx(found, abs=1e-10)
    assert nelbo.item() == pytest.approx(found, abs=1e-10)


def test_a_batch_without_a_hit_costs_nothing():
    model, chosen = tiny_model(), tiny_family()
    x0 = clean_rows(2)
    never = torch.full((2, WIDTH), 0.5, dtype=torch.float64)
    batch = corrupt(chosen, x0, Noise(never, 0 * never, never, never), None)
    loss, nelbo = DenoisingLoss(model, chosen)(batch)
    assert loss.item() == nelbo.item() == 0.0
    assert all((g == 0).all() for g in gradients(model, loss).values())


# --- identity 26 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_no_clean_token_has_probability_exactly_zero(dtype):
    objective = tiny_family().objective
    generator = torch.Generator().manual_seed(0)
    logits = (20.0 * torch.randn(50, ROWS, generator=generator)).to(dtype)
    logits[:, MASK] = 1e4
    xt = torch.full((50,), MASK)
    log_x0 = objective.predict(logits, xt, torch.ones(50)).log_x0
    assert (log_x0[:, [MASK, *EXCLUDED]] == -torch.inf).all()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert log_x0.dtype == wide
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert (log_x0.double().exp().sum(-1) - 1.0).abs().max() < limit
    exact = logits[:, list(CLEAN)].double().log_softmax(-1)
    assert (log_x0[:, list(CLEAN)] - exact).abs().max() < limit


def head_of(model) -> tuple[Tensor, Tensor]:
    return model.output_layer.linear.weight, model.output_layer.linear.bias


@pytest.mark.parametrize("value", [0.0, 50.0, -1e30, 1e30])
def test_logits_of_forbidden_ids_do_not_matter(value):
    model, chosen = tiny_model(), tiny_family()
    batch = batch_of(chosen)
    loss, _ = DenoisingLoss(model, chosen)(batch)
    exact = gradients(model, loss)
    with torch.no_grad():
        head_of(model)[1][[MASK, *EXCLUDED]] = value
    again, _ = DenoisingLoss(model, chosen)(batch)
    assert again.item() == loss.item()
    found = gradients(model, again)
    for name in found:
        assert torch.equal(found[name], exact[name]), name
    for name in ("output_layer.linear.weight", "output_layer.linear.bias"):
        assert (found[name][[MASK, *EXCLUDED]] == 0.0).all()
        assert (found[name][list(CLEAN)] != 0.0).any()


def test_constants_added_to_the_logits_do_not_matter():
    model, chosen = tiny_model(), tiny_family()
    batch = batch_of(chosen)
    loss, _ = DenoisingLoss(model, chosen)(batch)
    with torch.no_grad():
        head_of(model)[1].add_(37.0)
    again, _ = DenoisingLoss(model, chosen)(batch)
    assert again.item() == pytest.approx(loss.item(), abs=1e-10)


@pytest.mark.parametrize("block_size", [None, 5], ids=["full", "blocks"])
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "padded"])
def test_visible_positions_have_no_gradient(block_size, ragged):
    model, chosen = tiny_model(), tiny_family(block_size)
    batch = batch_of(chosen, ragged=ragged)
    leaves = []

    class Watched(torch.nn.Module):
        output_layer, config = model.output_layer, model.config

        def hidden(self, *arguments):
            *everywhere, positions = arguments
            hidden, condition = model.hidden(*everywhere)
            leaves.append(hidden.detach().requires_grad_())
            return leaves[-1].flatten(0, 1)[positions], condition

    loss, _ = DenoisingLoss(Watched(), chosen)(batch)
    loss.backward()
    (hidden,) = leaves
    size = hidden.grad.flatten(0, 1).abs().sum(-1)
    hit = torch.zeros(len(size), dtype=torch.bool).index_fill(0, batch.positions, True)
    assert (size[~hit] == 0.0).all()
    assert (size[hit] > 0.0).all()
    assert torch.equal(hit.view_as(batch.xt), batch.xt == MASK)


def test_visible_tokens_never_cost_anything():
    """The table is NaN wherever a token is visible, so reading one there would show."""
    x0 = all_sequences()
    u = torch.tensor([[0.2, 0.9, 0.5]], dtype=torch.float64).expand(len(x0), -1)
    v = torch.full((len(x0), 1), 0.4, dtype=torch.float64)
    noise = noise_by_count(NoiseUniforms(v, u), family().blocks(LENGTH))
    batch = corrupt(family(), x0, noise, None)
    found = PositionTerms(TableDenoiser(random_table(0)), family(), batch).all()
    assert found.isfinite().all()
    assert len(found) == 2 * len(x0)


@pytest.mark.parametrize("by", ["count", "time"])
def test_plain_cross_entropy_counts_masked_tokens_alike(by):
    model = tiny_model()
    batch = batch_of(tiny_family(), by=by)
    ce, elbo = plain_terms(model, tiny_family(), batch)
    loss, nelbo = DenoisingLoss(model, tiny_family(loss_weight="ce"))(batch)
    assert loss.item() == pytest.approx(ce.item(), abs=1e-10)
    assert nelbo.item() == pytest.approx(elbo.item(), abs=1e-10)


# --- identity 23 in training ---------------------------------------------------------------------


def training_batches(rank: int, processes: int, micro: int, block_size=None) -> TrainingBatches:
    raw = {
        "data": {"sequence_length": 4},
        "sample": {"max_new_tokens": 4},
        "diffusion": {"noise": {"draw": "time"}, "block_size": block_size},
        "train": {"global_batch_size": 16, "micro_batch_size": micro},
    }

    def rows(samples):
        tokens = clean_rows(64, 4)[torch.tensor(samples) % 64].numpy()
        return SimpleNamespace(tokens=tokens, documents=None)

    chosen = tiny_family(block_size)
    sequences = SimpleNamespace(rows=rows)
    return TrainingBatches(sequences, chosen, Config.model_validate(raw), rank, processes)


def global_step(step: int, processes: int, micro: int, block_size=None):
    """The slots and micro-batches of one optimizer step over all processes."""
    loaders = [training_batches(r, processes, micro, block_size) for r in range(processes)]
    accumulation = loaders[0].accumulation
    each = [(loader, micro_step) for micro_step in range(accumulation) for loader in loaders]
    slots = [loader.slots(step, micro_step) for loader, micro_step in each]
    return slots, [loader[step * accumulation + micro_step] for loader, micro_step in each]


@pytest.mark.parametrize(("processes", "micro"), [(1, 16), (1, 4), (2, 8), (4, 2)])
@pytest.mark.parametrize("block_size", [None, 2])
def test_times_are_one_per_stratum_over_ranks_accumulation_and_blocks(processes, micro, block_size):
    for step in range(5):
        _, parts = global_step(step, processes, micro, block_size)
        sigma = torch.cat([batch.sigma for batch in parts])
        t = 1.0 - torch.exp(-sigma.double()).flatten()
        assert len(t) == 16 * (2 if block_size else 1)
        assert torch.equal((t * len(t)).long().sort().values, torch.arange(len(t)))


def weights(batch) -> Tensor:
    """The weights of a batch's masked positions, 0 elsewhere."""
    values = batch.noise.weight.new_zeros(batch.x0.numel())
    return values.index_copy(0, batch.positions, batch.noise.weight.flatten()).view_as(batch.x0)


@pytest.mark.parametrize(("processes", "micro"), [(1, 4), (2, 8), (4, 2)])
def test_training_noise_does_not_know_how_the_batch_is_split(processes, micro):
    _, (whole,) = global_step(3, 1, 16)
    slots, parts = global_step(3, processes, micro)
    assert torch.equal(torch.cat(slots).sort().values, torch.arange(16))
    for at, part in zip(slots, parts, strict=True):
        assert torch.equal(part.xt, whole.xt[at])
        assert torch.equal(part.x0, whole.x0[at])
        assert torch.equal(part.sigma, whole.sigma[at])
        assert torch.equal(weights(part), weights(whole)[at])
