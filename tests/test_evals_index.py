"""The index of evals/ names every program and every result."""

import re

import pytest


@pytest.fixture
def named(root):
    return set(re.findall(r"[\w./]+\.(?:py|json|png)", (root / "evals" / "README.md").read_text()))


def test_the_index_names_every_program(root, named):
    assert {path.name for path in (root / "evals").glob("*.py")} <= named


def test_the_index_names_every_result_and_no_other(root, named):
    results = {path.name for path in (root / "evals" / "results").iterdir()}
    assert results == {name for name in named if name.endswith((".json", ".png"))}
