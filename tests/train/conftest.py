"""One folder of runs for all tests of this wing."""

import pytest
from training_runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory, request) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), request.config.rootpath)


@pytest.fixture(scope="session")
def single(runs) -> list[dict]:
    """The curve of one process: 1 x 8."""
    return runs.train("single")
