from pathlib import Path

import pytest
from tiny_judges import build_judge


@pytest.fixture(scope="session")
def judges(tmp_path_factory) -> dict[str, Path]:
    """Folders `gpt2`, which has a first token, and `llama`, which has none."""
    folder = tmp_path_factory.mktemp("judges")
    build_judge(folder / "gpt2", bos=True)
    build_judge(folder / "llama", bos=False)
    return {name: folder / name for name in ("gpt2", "llama")}
