"""Shared fixtures. One thread: the tensors here are small, and threads that wait for a busy core
cost more than they bring."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real corpora, where the machine has them."""
    folder = os.environ.get("TEXTDIFF_DATA")
    if not folder:
        pytest.skip("TEXTDIFF_DATA is not set")
    return Path(folder)
