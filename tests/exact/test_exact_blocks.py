"""Every process in blocks, through the public estimators: the sum of its blocks' own integrals.

A real network that sees the noise level is run block by block over a clean prefix, for every noisy
block and on a grid of times; the estimators run it once over both streams.
"""

import math
from functools import partial

import pytest
import torch
from dense_tables import expected, nelbo, position_nats, sequences, world
from exact_tables import CLEAN, EXCLUDED, MASK, ROWS, all_sequences

from textdiff.likelihood.estimators import noise_levels
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows
from textdiff.models import Layout, TextDiffusionConfig, TextDiffusionModel

SIZE = 2
TEXT = torch.tensor([CLEAN[0], CLEAN[2], CLEAN[2], CLEAN[1]])
PAIRS = all_sequences(SIZE)
COPIES = 300


@pytest.fixture(scope="module")
def model():
    config = TextDiffusionConfig(
        vocab_size=ROWS,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4,
        conditioning_size=8,
        mask_token_id=MASK,
        excluded_token_ids=[EXCLUDED],
        adaln=True,
        time_conditioning=True,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        model = TextDiffusionModel(config).double().eval()
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        for parameter in model.output_layer.linear.parameters():
            parameter.mul_(0.2)  # scores are exponentials of what comes out
    return model


def logits_at(model, family, process: str, block: int, t: torch.Tensor) -> torch.Tensor:
    """[Q, S, 2, ROWS] logits at every noisy version of one block, after the clean ones before."""
    noisy = sequences(process, SIZE)
    prefix = TEXT[: block * SIZE].expand(len(t) * len(noisy), -1)
    seen = torch.cat([prefix, noisy.repeat(len(t), 1)], 1)
    sigma = torch.zeros(len(seen), block + 1)
    alpha = family.known_alpha(family.schedule.alpha(t))
    sigma[:, block] = -alpha.log().repeat_interleave(len(noisy))
    with torch.no_grad():
        logits = model(seen, sigma=sigma, layout=Layout("block_causal", SIZE)).logits
    return logits[:, block * SIZE :].unflatten(0, (len(t), len(noisy)))


def block_value(model, family, process: str, block: int) -> float:
    """The bound of one block given those before it: an integral, or a mean over steps."""
    text = TEXT[block * SIZE : (block + 1) * SIZE]
    index = int((text == PAIRS).all(1).nonzero())
    network = partial(logits_at, model, family, process, block)
    if family.timesteps is None:
        return nelbo(family, process, network, index, 60)
    t = torch.arange(1, family.timesteps + 1, dtype=torch.float64) / family.timesteps
    terms = position_nats(family, network(t), t, text, process)
    return float(expected(process, t, terms, index).mean())


CHOICES = {
    "mdlm": ("absorbing", "mdlm", None),
    "sedd": ("absorbing", "sedd", None),
    "sedd-uniform": ("uniform", "sedd", None),
    "udlm": ("uniform", "udlm", None),
    "gidd": ("hybrid", "gidd", None),
    "d3pm": ("absorbing", "d3pm", 3),
    "d3pm-uniform": ("uniform", "d3pm", 3),
}


def copies_of_text(family, copies: int = COPIES):
    arrays = [TEXT.to(torch.int32).numpy()] * copies
    return cut_windows(arrays, ["abcd"] * copies, 4, family.process.vocabulary.clean)


@pytest.mark.parametrize("name", CHOICES)
def test_the_default_estimator_expects_the_sum_of_block_integrals(model, name):
    process, kind, timesteps = CHOICES[name]
    family = world(process, kind, SIZE, timesteps)
    found = estimate(model, family, copies_of_text(family), seed=7, attribute=True)
    assert found.bound().is_bound
    each = torch.stack(found.token_nats()).unflatten(-1, (2, SIZE)).sum(-1)  # [copies, blocks]
    stderr = each.std(0) / math.sqrt(COPIES)
    for block in range(2):
        exact = block_value(model, family, process, block)
        assert abs(float(each[:, block].mean()) - exact) < 4.0 * float(stderr[block])
        assert float(stderr[block]) < 0.05 * exact


def test_counts_of_a_document_fill_the_strata_of_its_windows_and_blocks(model, monkeypatch):
    """Three windows of two blocks: each draw meets every count three times; weights are n / k."""
    drawn = []
    original = noise_levels.draw_noise

    def watched(*arguments, **options):
        drawn.append(original(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(noise_levels, "draw_noise", watched)
    family = world("absorbing", "mdlm", SIZE)
    cut = cut_windows(
        [TEXT.repeat(3).to(torch.int32).numpy()], ["x" * 12], 4, family.process.vocabulary.clean
    )
    estimate(model, family, cut, seed=0, samples=1)
    assert len(drawn) == 11  # replicates of six draws: 64 in all
    for noise in drawn:
        hit = family.blocks(4).split(noise.corrupted, False)
        counts = hit.sum(-1)
        assert sorted(counts.flatten().tolist()) == [1, 1, 1, 2, 2, 2]
        weight = family.blocks(4).split(noise.weight, 0.0)
        assert torch.equal(weight, (SIZE / counts).unsqueeze(-1).expand_as(weight).double())
    assert len({tuple(noise.corrupted.flatten().tolist()) for noise in drawn}) > 4
