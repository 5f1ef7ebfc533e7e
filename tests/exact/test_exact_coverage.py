"""Intervals of wrong and of nearly right networks: given where they hold the exact value."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "evals" / "coverage.py"


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("coverage_of_intervals", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_wrong_networks_have_no_interval_from_few_draws(coverage):
    for name, setting in coverage.FOUND.items():
        row = coverage.measure(setting, 200, 1, 1)
        assert row["given_and_missed"] <= 0.02, name
        assert row["given"] <= 0.02, name
        assert abs(row["bias_in_standard_errors"]) < 4.0, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d3pm uniform, T 1000, one text", "sedd absorbing, six tokens"])
def test_many_draws_bring_the_interval_back(coverage, name):
    row = coverage.measure(coverage.FOUND[name], 60, 1, 64)
    assert row["given"] >= 0.95
    assert row["covered_of_given"] >= 0.85  # 0.95 less 3.5 deviations of 60 repetitions


@pytest.mark.slow
def test_nearly_right_networks_keep_theirs(coverage):
    for name, setting in coverage.RIGHT.items():
        row = coverage.measure(setting, 300, 1, 1)
        assert row["given"] >= 0.98, name
        assert row["covered_of_given"] >= 0.91, name  # 0.95 less 3 deviations
