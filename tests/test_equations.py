"""The index of equations is up to date, and every equation that the code cites has a test."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def equation_index():
    path = Path(__file__).resolve().parent.parent / "scripts" / "equation_index.py"
    spec = importlib.util.spec_from_file_location("equation_index", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["equation_index"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def index(equation_index):
    return equation_index.rows(equation_index.ROOT)


def test_the_page_is_what_the_script_writes(equation_index, index):
    page = (equation_index.ROOT / equation_index.PAGE).read_text()
    assert equation_index.table(index) in page, "run python scripts/equation_index.py"


def test_every_citation_has_a_test(index):
    assert len(index) > 50
    assert [row for row in index if row.test is None] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weight (Eq. 10, arXiv:2406.07524).", [("2406.07524", "Eq. 10")]),
        ("(Eq. 5 and 9, arXiv:2310.16834)", [("2310.16834", "Eq. 5 and 9")]),
        ("update (arXiv:2502.16982, Sec. 2.1)", [("2502.16982", "Sec. 2.1")]),
        (
            "of arXiv:2107.03006 (Eq. 4 there), or plugged in (Eq. 16 of arXiv:2406.07524)",
            [("2107.03006", "Eq. 4"), ("2406.07524", "Eq. 16")],
        ),
        (
            "App. C.2, arXiv:2310.16834; Table 1 there",
            [("2310.16834", "App. C.2"), ("2310.16834", "Table 1")],
        ),
        ("(Thm. 4.2) without a paper", [("", "Thm. 4.2")]),
        ("a paper alone, arXiv:2503.00307", [("2503.00307", "")]),
        ("no citation: Equal, Section 3", []),
    ],
)
def test_citations_are_read(equation_index, text, expected):
    assert equation_index.citations(text) == expected
