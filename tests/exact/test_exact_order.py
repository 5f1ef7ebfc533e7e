"""The search for a fixed order: its costs are the rule's, and the best order is met."""

from itertools import permutations
from math import comb

import pytest
import torch
from exact_tables import TableDenoiser, all_sequences, family, random_table
from refusals import refused
from test_exact_policy import some_texts, windows
from tiny_models import CONTEXT, tiny_family, tiny_model

from textdiff.errors import ConfigError
from textdiff.likelihood.order_search import find_order
from textdiff.sampling.controls import NEUTRAL
from textdiff.sampling.teacher_forcing import policy_log_likelihood

LENGTH = 4
TEXTS = all_sequences(LENGTH)[::3]
TABLE = TableDenoiser(random_table(0, LENGTH))


def nats(model, chosen, texts, places) -> float:
    """Cost of texts that the rule writes in an order, one token per call."""
    knobs = {"order": "position", "positions": list(places)}
    config = NEUTRAL.merge(rule="confidence", knobs=knobs, steps=texts.shape[1])
    with torch.no_grad():
        return -float(policy_log_likelihood(model, chosen, texts, config).sum())


def searched(block: int | None, beam: int):
    chosen = family(block)
    cut = windows(TEXTS, LENGTH, chosen.process.vocabulary.clean)
    return chosen, find_order(TABLE, chosen, cut, beam=beam)


@pytest.mark.parametrize("block", [2, None])
def test_a_search_over_all_sets_meets_the_best_of_all_orders(block):
    chosen, order = searched(block, comb(LENGTH, 2))
    orders = permutations(range(block or LENGTH))
    costs = {places: nats(TABLE, chosen, TEXTS, places) for places in orders}
    assert order.best
    assert order.places == min(costs, key=costs.__getitem__)
    assert order.nats == pytest.approx(min(costs.values()), abs=1e-9)
    assert max(costs.values()) - order.nats > 1.0
    assert order.sets == 2 ** len(order.places) - 1
    assert order.rows == order.sets * len(TEXTS)


def test_a_beam_that_leaves_sets_out_says_so_and_knows_its_cost():
    chosen, order = searched(None, 1)
    assert not order.best
    assert order.sets <= 2 * LENGTH  # one, and the one of the order from left to right
    assert order.nats == pytest.approx(nats(TABLE, chosen, TEXTS, order.places), abs=1e-9)
    assert order.nats <= nats(TABLE, chosen, TEXTS, range(LENGTH)) + 1e-9


def test_networks_that_read_the_noise_level_read_the_one_of_the_rule():
    model, chosen = tiny_model(seed=2, adaln=True, time_conditioning=True), tiny_family(4)
    texts = some_texts(5, 10)
    cut = windows(texts, CONTEXT, chosen.process.vocabulary.clean)
    order = find_order(model, chosen, cut, beam=6)
    assert order.nats == pytest.approx(nats(model, chosen, texts, order.places), abs=1e-9)
    assert order.tokens == texts.numel()


def test_a_beam_of_no_set_is_refused():
    with refused(ConfigError, "beam_out_of_range"):
        searched(None, 0)
