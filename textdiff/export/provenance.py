"""Origin of a result: the code, the model's files and the machine, as plain data.

No program is run: the commit is read from the checkout's files, and the hash of the package's
sources tells a changed checkout (or an installed wheel) from the commit it started at.
"""

import hashlib
import json
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import textdiff
from textdiff.storage import file_hash

PACKAGE = Path(__file__).resolve().parent.parent
TRAINING_FILE = "training.json"


def code_record() -> dict[str, str | None]:
    """Return versions of the libraries, the commit of a checkout (or None) and a source hash."""
    return {
        "textdiff": textdiff.__version__,
        "commit": commit_of(PACKAGE.parent),
        "source_sha256": source_hash(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def model_record(folder: Path | None) -> dict[str, Any]:
    """Return hashes of an export's weights and tokenizer, and which weights they are.

    Args:
        folder: the export; None for a model that was never saved.

    Returns:
        `model_sha256`, `tokenizer_sha256` (None where there is no such file) and `weights`: `ema`,
        `raw`, or `unknown` where the export does not say.
    """
    if folder is None:
        return {"model_sha256": None, "tokenizer_sha256": None, "weights": "unknown"}
    return {
        "model_sha256": file_hash(*sorted(folder.glob("model*.safetensors"))),
        "tokenizer_sha256": file_hash(folder / "tokenizer.json"),
        "weights": str(training_record(folder).get("weights", "unknown")),
    }


def training_record(folder: Path) -> dict[str, Any]:
    """Return the training record of an export; empty where it is missing or unreadable."""
    try:
        record = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


@cache
def source_hash() -> str:
    """Return the SHA-256 of the package's Python files, their names included."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def commit_of(checkout: Path) -> str | None:
    """Return the commit that a checkout is at, read from its `.git`; None where there is none."""
    try:
        directory = _git_directory(checkout / ".git")
        head = (directory / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        return _reference(directory, head.removeprefix("ref: "))
    except (OSError, UnicodeDecodeError):
        return None


def _git_directory(path: Path) -> Path:
    """Return `.git`, or the folder that it names in a worktree or submodule."""
    if path.is_file():
        return path.parent / path.read_text().strip().removeprefix("gitdir: ")
    return path


def _reference(directory: Path, name: str) -> str | None:
    """Return the commit of a branch: in a file of its own, or among the packed ones."""
    common = directory / "commondir"
    roots = [directory]
    if common.is_file():  # a worktree keeps its HEAD and shares the branches
        roots.append(directory / common.read_text().strip())
    for root in roots:
        if (root / name).is_file():
            return (root / name).read_text().strip()
        if (root / "packed-refs").is_file():
            for line in (root / "packed-refs").read_text().splitlines():
                if line.endswith(f" {name}"):
                    return line.split()[0]
    return None
