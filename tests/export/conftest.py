"""Golden data of the official codes, where the machine has them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "evals"))


@pytest.fixture(scope="session")
def golden_folder(data_folder) -> Path:
    folder = data_folder.parent / "golden"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    return folder
