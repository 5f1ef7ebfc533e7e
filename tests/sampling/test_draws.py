"""Identity 22: tokens come from the whole distribution, tail included, and from nothing else."""

import math

import pytest
import torch
from exact_stats import chi_square_p

from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.errors import ConfigError
from textdiff.sampling.controls import Controls
from textdiff.sampling.draws import draw_tokens

FREE = Controls()
HEAD, TAIL, TAIL_MASS = 16, 50_000, 1e-3
DRAWS, BUCKETS = 2_000_000, 32


def tail_logits(tail_first: bool) -> torch.Tensor:
    """[1, V] float32 logits: 16 likely tokens and 50,000 that share a thousandth, unevenly."""
    generator = torch.Generator().manual_seed(0)
    head = torch.rand(HEAD, generator=generator).softmax(0) * (1.0 - TAIL_MASS)
    tail = (2.0 * torch.randn(TAIL, generator=generator)).softmax(0) * TAIL_MASS
    parts = [tail, head] if tail_first else [head, tail]
    return (torch.cat(parts).log() + 7.0).float()[None]


def draw_in_chunks(logits: torch.Tensor, u: torch.Tensor, rows: int = 64) -> torch.Tensor:
    parts = [draw_tokens(logits.expand(len(part), -1), part, FREE) for part in u.split(rows)]
    return torch.cat(parts)


@pytest.mark.parametrize("tail_first", [True, False], ids=["tail-first", "tail-last"])
def test_a_tail_of_fifty_thousand_tokens_is_drawn_in_proportion(tail_first):
    """Two million draws of which about 2,000 meet the tail.

    The draw is monotone in u, so a uniform outside the outer 0.15 % cannot meet it: only those
    inside are sent through the function, and the two edges check the claim.
    """
    logits = tail_logits(tail_first)
    exact = logits[0].double().softmax(0)
    is_tail = torch.zeros(HEAD + TAIL, dtype=torch.bool)
    is_tail[slice(0, TAIL) if tail_first else slice(HEAD, None)] = True
    u = uniforms(1, Stream.TOKEN, position=torch.arange(DRAWS))
    edge = 1.5 * TAIL_MASS if tail_first else 1.0 - 1.5 * TAIL_MASS
    edges = torch.tensor([edge, 0.5], dtype=torch.float64)
    assert not is_tail[draw_in_chunks(logits, edges)].any()
    tokens = draw_in_chunks(logits, u[u < edge] if tail_first else u[u > edge])

    counts = torch.bincount(tokens, minlength=HEAD + TAIL)[is_tail].double()
    expected = exact[is_tail] * DRAWS
    deviation = (counts.sum() - expected.sum()) / math.sqrt(expected.sum())
    assert abs(deviation) < 4
    bucket = torch.arange(TAIL) * BUCKETS // TAIL
    into = torch.zeros(2, BUCKETS, dtype=torch.float64)
    into.index_add_(1, bucket, torch.stack([counts, expected * counts.sum() / expected.sum()]))
    assert chi_square_p(into[0], into[1]) > 1e-3
    # Rare tokens within the tail, not only its likely ones: half of its mass is in a few hundred.
    rare = exact[is_tail] < exact[is_tail].median()
    share = float(expected[rare].sum())
    assert abs(float(counts[rare].sum()) - share) < 4 * math.sqrt(share)


def test_every_token_owns_an_interval_as_long_as_its_probability():
    generator = torch.Generator().manual_seed(1)
    logits = 3.0 * torch.randn(1, 200, generator=generator)
    upper = logits.double().softmax(-1).cumsum(-1)[0]
    lower = torch.cat([upper.new_zeros(1), upper[:-1]])
    for inside in (1e-6, 0.5, 1.0 - 1e-6):
        u = lower + inside * (upper - lower)
        drawn = draw_tokens(logits.expand(200, -1), u, FREE)
        assert torch.equal(drawn, torch.arange(200))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_without_probability_are_never_drawn(dtype):
    impossible = torch.tensor([0, 1, 4, 8, 9])
    log_x0 = torch.linspace(-4.0, 0.0, 10, dtype=dtype)[None]
    log_x0[0, impossible] = -torch.inf
    tiny, half = 2.0**-53, 2.0**-1074
    edges = [0.0, half, tiny, 0.5, 1.0 - tiny, 1.0]
    exact = log_x0.double().softmax(-1).cumsum(-1)[0]
    u = torch.cat([torch.tensor(edges, dtype=torch.float64), exact, exact.nextafter(0 * exact)])
    tokens = draw_tokens(log_x0.expand(len(u), -1), u, FREE)
    assert not torch.isin(tokens, impossible).any()
    assert tokens[0] == 2
    assert tokens[5] == 7


def test_one_possible_token_is_always_drawn():
    log_x0 = torch.full((3, 5), -torch.inf)
    log_x0[:, 3] = -1e4  # raw, not normalised
    u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert draw_tokens(log_x0, u, FREE).tolist() == [3, 3, 3]


def test_each_position_uses_its_own_distribution_and_uniform():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(40, 7, generator=generator)
    u = torch.rand(40, generator=generator, dtype=torch.float64)
    together = draw_tokens(logits, u, FREE)
    alone = [int(draw_tokens(logits[i : i + 1], u[i : i + 1], FREE)) for i in range(40)]
    assert together.tolist() == alone


# --- controls ------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]], dtype=torch.float64)


def kept(controls: Controls) -> list[int]:
    return controls.probabilities(PROBABILITIES.log())[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [
        (1.0, [0, 1, 2, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
        (0.94, [0, 1, 3, 4]),
        (0.64, [1, 3]),  # 0.4 + 0.25 just covers it
        (0.66, [1, 3, 4]),  # the token that crosses is kept
        (0.39, [1]),
        (0.001, [1]),  # never empty
    ],
)
def test_top_p_keeps_the_token_that_crosses(top_p, tokens):
    assert kept(Controls(top_p=top_p)) == tokens


@pytest.mark.parametrize(
    ("top_k", "tokens"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_most_likely(top_k, tokens):
    assert kept(Controls(top_k=top_k)) == tokens


def test_truncation_leaves_the_ratios_of_what_is_kept():
    for controls in (Controls(top_k=3), Controls(top_p=0.8)):
        weights = controls.probabilities(PROBABILITIES.log())[0]
        share = weights[[1, 3, 4]] / weights.sum()
        exact = PROBABILITIES[0, [1, 3, 4]] / PROBABILITIES[0, [1, 3, 4]].sum()
        assert (share - exact).abs().max() < 1e-12


def test_top_p_counts_the_probability_that_is_left_after_top_k():
    assert kept(Controls(top_k=2, top_p=0.6)) == [1]  # 0.4 / 0.65 covers 0.6


def test_temperature_raises_probabilities_to_its_inverse():
    for temperature in (0.5, 1.0, 2.0):
        weights = Controls(temperature=temperature).probabilities(PROBABILITIES.log())
        exact = PROBABILITIES ** (1.0 / temperature)
        assert (weights - exact / exact.sum()).abs().max() < 1e-12


def test_temperature_zero_takes_the_most_likely_whatever_the_uniform():
    u = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    log_x0 = PROBABILITIES.log().expand(3, -1)
    assert draw_tokens(log_x0, u, Controls(temperature=0.0)).tolist() == [1, 1, 1]
    assert draw_tokens(log_x0, u, Controls(temperature=1e-3)).tolist() == [1, 1, 1]


def test_controls_do_not_depend_on_constants_in_the_logits():
    log_x0 = PROBABILITIES.log()
    for controls in (FREE, Controls(temperature=0.3), Controls(top_k=3, top_p=0.9)):
        moved = controls.probabilities(log_x0 + 123.0)
        assert (controls.probabilities(log_x0) - moved).abs().max() < 1e-12


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="give"):
        Controls(**wrong)
