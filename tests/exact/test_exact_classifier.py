"""Classifier guidance, by the hook that `docs/control.md` shows: the law of the class, exactly.

Texts are of two classes that are as likely as each other, and their tokens are independent given
the class. Then naive Bayes is not naive: the odds of the tokens in sight are the true ones, and
guidance at gamma 1 must turn the law of all texts into the law of the class.
"""

import re
from collections.abc import Callable

import pytest
import torch
from exact_tables import CLEAN, ROWS, all_sequences, family
from rule_worlds import LENGTH, conditionals, forced, total_variation
from torch import Tensor

from textdiff.sampling.controls import Controls
from textdiff.sampling.rules import build_rule

CLASSES = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], dtype=torch.float64)
ONE_AT_A_TIME = {
    "first_hitting": ("first_hitting", {}),
    "confidence": ("confidence", {}),
    "random": ("confidence", {"order_temperature": 2.0}),
    "entropy_bound": ("entropy_bound", {"entropy_bound": 0.0}),
}


@pytest.fixture
def toward(root) -> Callable:
    """The hook of the page."""
    text = (root / "docs" / "control.md").read_text()
    blocks = re.findall(r"^```python\n(.+?)^```", text, flags=re.S | re.M)
    (block,) = (block for block in blocks if "def toward(" in block)
    known: dict = {}
    exec(block[: block.index("def odds_of(")], known)
    return known["toward"]


def law_of(p: Tensor) -> Tensor:
    """[3 ** L] law of texts of independent tokens of the law p [3]."""
    digits = torch.stack([all_sequences(LENGTH) == token for token in CLEAN]).long().argmax(0)
    return p[digits].prod(-1)


@pytest.fixture
def world() -> tuple[Tensor, Tensor, Tensor]:
    """The laws of the class and of all texts, and the odds of the class that each id adds."""
    wanted, other = law_of(CLASSES[0]), law_of(CLASSES[1])
    odds = torch.zeros(ROWS, dtype=torch.float64)
    odds[list(CLEAN)] = (CLASSES[0] / CLASSES[1]).log()
    return wanted, 0.5 * (wanted + other), odds


def guided(joint: Tensor, case: str, hook: Callable, steps: int = LENGTH) -> Tensor:
    name, knobs = ONE_AT_A_TIME[case]
    rule = build_rule(name, family(), knobs)
    return forced(rule, conditionals(joint), steps, controls=Controls(hooks=(hook,)))[0]


@pytest.mark.parametrize("case", ONE_AT_A_TIME)
def test_gamma_one_is_the_law_of_the_class(toward, world, case):
    wanted, joint, odds = world
    assert total_variation(wanted, joint) > 0.3
    assert (guided(joint, case, toward(odds, 1.0)) - wanted).abs().max() < 1e-12
    assert (guided(joint, case, toward(odds, 0.0)) - joint).abs().max() < 1e-12


def test_more_gamma_means_more_of_the_class(toward, world):
    wanted, joint, odds = world
    chance = 0.5 * wanted / joint  # p(class | text)
    means = [
        float((guided(joint, "first_hitting", toward(odds, gamma)) * chance).sum())
        for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)
    ]
    assert means[0] == pytest.approx(0.5, abs=1e-12)
    assert means == sorted(means)
    assert means[-1] > 0.9


def test_tokens_that_the_class_makes_independent_can_be_drawn_together(toward, world):
    """What ties tokens together is the class: once it is given, one call loses nothing."""
    wanted, joint, odds = world
    assert total_variation(guided(joint, "confidence", toward(odds, 0.0), 1), joint) > 0.1
    for steps in (1, 2):
        law = guided(joint, "confidence", toward(odds, 1.0), steps)
        assert (law - wanted).abs().max() < 1e-12
