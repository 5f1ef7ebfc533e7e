"""Left to right: the objective is the likelihood of a causal network, and nothing looks ahead."""

import math

import pytest
import torch
from engines import generate
from exact_stats import chi_square_p
from tiny_models import CLEAN, CONTEXT, EXCLUDED, MASK, ROWS, tiny_model
from torch import Tensor

from textdiff.diffusion.family import build_family
from textdiff.diffusion.noise import ByCount, NoiseUniforms, draw_noise
from textdiff.diffusion.process import Vocabulary
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows
from textdiff.loss import DenoisingLoss, PositionTerms, corrupt
from textdiff.models import CAUSAL
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job

SPEC = {
    "process": "absorbing",
    "schedule": {"kind": "loglinear"},
    "objective": {"kind": "ar"},
    "block_size": 1,
}
FAMILY = build_family(SPEC, Vocabulary.of(ROWS, MASK, EXCLUDED))
K = len(CLEAN)


@pytest.fixture(scope="module", params=[{}, {"adaln": True, "norm": "rmsnorm"}], ids=str)
def model(request):
    return tiny_model(seed=3, **request.param)


def texts(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(CLEAN)[torch.randint(K, (rows, length), generator=generator)]


def every_text(length: int) -> Tensor:
    return torch.cartesian_prod(*[torch.tensor(CLEAN)] * length).view(-1, length)


def next_token(model, prefix: Tensor) -> Tensor:
    """[B, ROWS] log-probabilities after a prefix: the network reads it and nothing else."""
    start = torch.full((len(prefix), 1), MASK)
    logits = model(torch.cat([start, prefix], 1), layout=CAUSAL).logits[:, -1]
    log_p = torch.full_like(logits, -torch.inf)
    log_p[:, list(CLEAN)] = logits[:, list(CLEAN)].log_softmax(-1)
    return log_p


def chain(model, x: Tensor, given: int = 0) -> Tensor:
    """[B, L - given] -log p(x_i | x_<i), one prefix after the other."""
    terms = [
        -next_token(model, x[:, :i]).gather(1, x[:, i : i + 1]) for i in range(given, x.shape[1])
    ]
    return torch.cat(terms, 1)


def batch_of(x0: Tensor, ids: Tensor | None = None):
    """A training batch; padding is not scored."""
    rows, length = x0.shape
    key, at = torch.arange(rows)[:, None], torch.arange(length)
    v = uniforms(0, Stream.JITTER, row=key, block=at)
    u = uniforms(0, Stream.POSITION, row=key, position=at)
    real = None if ids is None else ids >= 0
    noise = draw_noise(FAMILY, x0, NoiseUniforms(v, u), ByCount(), real)
    return corrupt(FAMILY, x0, noise, ids)


def nats(model, x0: Tensor, ids: Tensor | None = None) -> Tensor:
    batch = batch_of(x0, ids)
    with torch.no_grad():
        found = PositionTerms(model, FAMILY, batch).all()
    out = torch.zeros(x0.numel(), dtype=torch.float64)
    return out.index_add(0, batch.positions, found).view_as(x0)


def predictions(model, x0: Tensor, ids: Tensor | None = None) -> Tensor:
    """[B, L, ROWS] probabilities at every position."""
    terms = PositionTerms(model, FAMILY, batch_of(x0, ids))
    with torch.no_grad():
        return terms.predict(slice(None), *terms.inputs).log_x0.exp().view(*x0.shape, ROWS)


def test_nats_are_those_of_the_chain_rule(model):
    x0 = texts(5, 7)
    with torch.no_grad():
        exact = chain(model, x0)
    assert (nats(model, x0) - exact).abs().max() < 1e-10
    assert exact.std() > 0.1


def test_loss_and_gradient_are_those_of_the_chain_rule(model):
    x0 = texts(5, 7)
    exact = chain(model, x0).sum()
    model.zero_grad()
    exact.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, nelbo = DenoisingLoss(model, FAMILY)(batch_of(x0))
    loss.backward()
    assert loss.item() == nelbo.item() == pytest.approx(exact.item(), abs=1e-9)
    for name, p in model.named_parameters():
        assert (p.grad - wanted[name]).abs().max() < 1e-9, name
    assert wanted["output_layer.linear.weight"].abs().max() > 1e-3


def test_estimates_are_exact_and_forget_windows_and_padding(model):
    documents = [texts(1, n, seed=n)[0] for n in (CONTEXT + 3, 5, 1)]
    arrays = [text.to(torch.int32).numpy() for text in documents]
    clean = FAMILY.process.vocabulary.clean
    windows = cut_windows(arrays, ["x" * len(text) for text in documents], CONTEXT, clean)
    found = estimate(model, FAMILY, windows, seed=0)
    with torch.no_grad():
        for index, text in enumerate(documents):
            parts = [chain(model, part[None]).sum() for part in text.split(CONTEXT)]
            assert (found.nats[:, index] - sum(parts)).abs().max() < 1e-9
    assert found.bound().stderr < 1e-12
    assert found.bound().is_bound


def test_probabilities_of_all_texts_add_up_to_one(model):
    assert float((-nats(model, every_text(3)).sum(1)).exp().sum()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("position", range(6))
def test_a_token_changes_predictions_after_it_and_no_others(model, position):
    x0 = texts(4, 6)
    changed = x0.clone()
    shift = torch.tensor([CLEAN[(CLEAN.index(x) + 3) % K] for x in x0[:, position].tolist()])
    changed[:, position] = shift
    moved = (predictions(model, changed) - predictions(model, x0)).abs().amax(-1)
    assert moved[:, : position + 1].max() < 1e-12
    assert (moved[:, position + 1 :].amax(0) > 1e-3).all()  # of some row, at every position


IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1, -1]])


def test_documents_in_one_row_cost_what_they_cost_alone(model):
    x0 = texts(1, 10)
    found = nats(model, x0, IDS)[0]
    with torch.no_grad():
        for index in range(3):
            mine = IDS[0] == index
            assert (found[mine] - chain(model, x0[:, mine])[0]).abs().max() < 1e-9
    assert (found[IDS[0] < 0] == 0.0).all()


def test_the_first_token_of_every_document_sees_the_start_alone(model):
    one, other = texts(1, 10, seed=1), texts(1, 10, seed=2)
    ids = IDS.clamp(min=0)  # every position scored, the last two as document 0 again
    ids[0, 8:] = 3
    first = predictions(model, one, ids)[0, [0, 3, 5, 8]]
    with torch.no_grad():
        alone = next_token(model, torch.zeros(1, 0, dtype=torch.int64)).exp()
    assert (first - alone).abs().max() < 1e-10
    assert (first - predictions(model, other, ids)[0, [0, 3, 5, 8]]).abs().max() < 1e-10
    inside = predictions(model, one, ids)[0, [1, 4, 6]] - alone
    assert (inside.abs().amax(-1) > 1e-4).all()


# --- generation ----------------------------------------------------------------------------------


def sample(model, prompts, new, steps: int = 1, first_row: int = 0) -> Tensor:
    job = Job(prompts, new, first_row=first_row, seed=11)
    *_, last = generate(model, FAMILY, job, rule="ancestral", steps=steps, controls=Controls())
    return last.canvas


def counts(canvas: Tensor) -> Tensor:
    """[K ** 2] how often every text of two tokens came up."""
    digit = torch.full((ROWS,), -1)
    digit[list(CLEAN)] = torch.arange(K)
    assert (digit[canvas] >= 0).all()
    return torch.bincount(digit[canvas] @ torch.tensor([K, 1]), minlength=K**2).double()


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_follow_the_exact_law(model, steps):
    rows = 20_000
    with torch.no_grad():
        law = (-chain(model, every_text(2)).sum(1)).exp()
    found = counts(sample(model, [[]] * rows, [2] * rows, steps))
    assert chi_square_p(found, rows * law) > 1e-3
    independent = law.view(K, K).sum(1)[:, None] * law.view(K, K).sum(0)
    assert chi_square_p(found, rows * independent.flatten()) < 1e-6


def test_samples_after_a_prompt_follow_the_exact_law(model):
    rows, prompt = 20_000, [CLEAN[2], CLEAN[5], CLEAN[5]]
    whole = torch.cat([torch.tensor([prompt]).expand(K**2, -1), every_text(2)], 1)
    with torch.no_grad():
        law = (-chain(model, whole, given=3).sum(1)).exp()
    canvas = sample(model, [prompt] * rows, [2] * rows)
    assert (canvas[:, :3] == torch.tensor(prompt)).all()
    assert chi_square_p(counts(canvas[:, 3:]), rows * law) > 1e-3


def test_a_row_does_not_depend_on_who_shares_its_batch(model):
    prompts = [[], [CLEAN[1]] * 4, [CLEAN[3], CLEAN[0]], [CLEAN[7]]]
    new = [9, 3, 1, 12]
    together = sample(model, prompts, new)
    for row, (prompt, count) in enumerate(zip(prompts, new, strict=True)):
        alone = sample(model, [prompt], [count], first_row=row)[0]
        assert torch.equal(together[row, : len(alone)], alone)


def test_the_most_likely_token_is_taken_at_temperature_zero(model):
    job = Job([[CLEAN[4]]], [5])
    *_, last = generate(
        model, FAMILY, job, rule="ancestral", steps=2, controls=Controls(temperature=0.0)
    )
    text = last.canvas[:1]
    for i in range(1, 6):
        with torch.no_grad():
            best = int(next_token(model, text[:, :i]).argmax())
        assert int(text[0, i]) == best


def test_entropy_of_a_uniform_network_is_that_of_the_clean_tokens():
    flat = tiny_model()
    with torch.no_grad():
        for parameter in flat.output_layer.parameters():
            parameter.zero_()
    assert (nats(flat, texts(3, 6)) - math.log(K)).abs().max() < 1e-12
