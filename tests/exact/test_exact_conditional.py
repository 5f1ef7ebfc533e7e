"""What is scored given what is visible, for conditionals that agree with no joint distribution.

The references enumerate sets of masked positions themselves, and the last one runs a real network
on them: nothing is compared with another estimator of the library.
"""

import itertools
import math

import pytest
import torch
from exact_tables import (
    LENGTH,
    MASK,
    Table,
    TableDenoiser,
    all_sequences,
    code,
    family,
    masked,
    random_table,
    subsets,
)
from tiny_models import tiny_pipeline

from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows
from textdiff.pipeline import TextDiffusion

TEXTS = all_sequences()


@pytest.fixture(scope="module")
def table() -> Table:
    return random_table(0)


def given_rest(table: Table, x: torch.Tensor, scored: tuple[int, ...]) -> float:
    """NELBO(x_A | x_B): sets S of A weigh 1 / (|S| C(|A|, |S|)), B is always visible."""
    n = len(scored)
    inside = [s for s in subsets() if set(s) <= set(scored)]
    return sum(table.cross_entropy(x, s) / (len(s) * math.comb(n, len(s))) for s in inside)


def scoring(texts, scored: tuple[int, ...], clean: torch.Tensor):
    mask = torch.isin(torch.arange(LENGTH), torch.tensor(scored)).numpy()
    arrays = [x.to(torch.int32).numpy() for x in texts]
    return cut_windows(arrays, ["abc"] * len(texts), LENGTH, clean, scored=[mask] * len(texts))


@pytest.mark.parametrize("scored", [s for s in subsets() if len(s) < LENGTH], ids=str)
def test_bound_of_a_part_is_enumerated_over_that_part(table, scored):
    cut = scoring(TEXTS, scored, family().process.vocabulary.clean)
    problem = TableDenoiser(table), family(), cut
    exact = torch.tensor([given_rest(table, x, scored) for x in TEXTS], dtype=torch.float64)
    found = estimate(*problem, estimator="exact", seed=0).nats[0]
    assert (found - exact).abs().max() < 1e-12
    assert cut.document_tokens.tolist() == [len(scored)] * len(TEXTS)
    drawn = estimate(*problem, seed=0, replicates=32, batch_tokens=2**14).bound()
    mean = float(exact.sum()) / len(scored) / len(TEXTS)
    assert abs(drawn.mean - mean) < 4 * drawn.stderr + 1e-12


@pytest.mark.parametrize("scored", [s for s in subsets() if len(s) < LENGTH], ids=str)
def test_chains_of_a_part_read_the_rest(table, scored):
    """Left to right within A; and the mean over random orders of A is the bound."""
    cut = scoring(TEXTS, scored, family().process.vocabulary.clean)
    found = estimate(TableDenoiser(table), family(), cut, estimator="chain_rule", seed=0).nats[0]
    for x, nats in zip(TEXTS, found.tolist(), strict=True):
        chain = 0.0
        for step in range(len(scored)):
            hidden = scored[step:]
            chain += table.cross_entropy(x, hidden) - _without(table, x, hidden)
        assert nats == pytest.approx(chain, abs=1e-12)


def _without(table: Table, x: torch.Tensor, hidden: tuple[int, ...]) -> float:
    """The cross-entropy of all but the first of the hidden positions, all of them masked."""
    z = code(masked(x, hidden))
    return -sum(float(table.log_p[z, i, x[i]]) for i in hidden[1:])


@pytest.mark.parametrize(
    ("count", "stride", "spans"),
    [
        # (start of the window, places of it that are scored)
        (3, 2, [(0, (0, 1, 2))]),
        (5, 2, [(0, (0, 1, 2)), (2, (1, 2))]),
        (6, 2, [(0, (0, 1, 2)), (2, (1, 2)), (3, (2,))]),  # the last one is pulled back
        (6, 1, [(0, (0, 1, 2)), (1, (2,)), (2, (2,)), (3, (2,))]),
        (7, None, [(0, (0, 1, 2)), (3, (0, 1, 2)), (6, (0,))]),
    ],
)
def test_overlapping_windows_score_every_token_once_given_what_came_before(
    table, count, stride, spans
):
    text = TEXTS[[5, 11, 16]].flatten()[:count]
    clean = family().process.vocabulary.clean
    cut = cut_windows([text.to(torch.int32).numpy()], ["a" * count], LENGTH, clean, stride=stride)
    found = estimate(TableDenoiser(table), family(), cut, estimator="exact", seed=0).bound()
    exact = 0.0
    for start, scored in spans:
        window = text[start : start + LENGTH]
        if len(window) == LENGTH:
            exact += given_rest(table, window, scored)
        else:  # a shorter window: what is not there is masked to the table, and costs nothing
            whole = torch.full((LENGTH,), MASK)
            whole[: len(window)] = window
            assert len(window) == len(scored) == 1
            exact += table.cross_entropy(whole, scored)
    assert found.mean * count == pytest.approx(exact, abs=1e-12)
    assert sum(len(scored) for _, scored in spans) == found.tokens == count


# --- texts, through the object that users hold ---------------------------------------------------


@pytest.fixture(scope="module")
def held() -> TextDiffusion:
    return tiny_pipeline("byte", 8, [])


def enumerated(held: TextDiffusion, text: str, scored: list[int]) -> float:
    """NELBO of the scored bytes given the others, a network row for every set of masks."""
    x = torch.tensor([held.tokenizer(text, add_special_tokens=False)["input_ids"]])
    clean, mask = held.family.process.vocabulary.clean, held.family.process.mask_token_id
    n, total = len(scored), 0.0
    for k in range(1, n + 1):
        for hit in itertools.combinations(scored, k):
            z = x.clone()
            z[0, list(hit)] = mask
            with torch.no_grad():
                logits = held.model(z).logits[0]
            log_p = logits.masked_fill(~clean, -torch.inf).log_softmax(-1)
            cost = -sum(float(log_p[i, x[0, i]]) for i in hit)
            total += cost / (k * math.comb(n, k))
    return total


def test_answers_given_prompts_and_spans_given_the_rest(held):
    nats = held.estimate(["ade"], prompts=["bc "], estimator="exact").nats
    assert float(nats) == pytest.approx(enumerated(held, "bc ade", [3, 4, 5]), abs=1e-10)
    nats = held.estimate(["bc ade"], spans=[[(0, 2), (4, 5)]], estimator="exact").nats
    assert float(nats) == pytest.approx(enumerated(held, "bc ade", [0, 1, 4]), abs=1e-10)
