"""Training checkpoints: tensors and JSON in `checkpoints/step-NNNNNN/`, written beside and renamed.

A manifest holds the size and SHA-256 of every file. It is written last, so a folder without a
fitting one was never finished or is damaged. It also holds the format, which is read before
anything else: what a newer version wrote is refused, not taken for damage. Nothing is unpickled:
tensors load with `weights_only`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import textdiff
from textdiff.errors import CheckpointError
from textdiff.storage import discard, file_hash, whole_folder

FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """Training checkpoint: all that a run continues from.

    Attributes:
        model: parameters by name.
        ema: averaged parameters by name.
        optimizers: one state dict per optimizer.
        state: step, counters and the config, plain JSON values.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizers: Sequence[dict[str, Any]]
    state: dict[str, Any]

    def save(self, root: Path, keep: int) -> Path:
        """Write `root/step-NNNNNN` and delete all but the newest `keep` checkpoints.

        Raises:
            CheckpointError: it cannot be written; the earlier ones are as they were.
        """
        target = root / f"step-{self.state['step']:06d}"
        with whole_folder(target, rescue(root)) as folder:
            for name, tensors in (("model", self.model), ("ema", self.ema)):
                contiguous = {k: v.contiguous() for k, v in tensors.items()}
                save_file(contiguous, folder / f"{name}.safetensors")
            _save(list(self.optimizers), folder / "optimizer.pt")
            (folder / "trainer.json").write_text(json.dumps(self.state, indent=2) + "\n")
            (folder / "manifest.json").write_text(json.dumps(_manifest(folder), indent=2) + "\n")
        for old in checkpoints(root)[:-keep]:
            discard(old)
        return target

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint whose manifest fits.

        Raises:
            CheckpointError: it is missing, damaged, or from another version.
        """
        refuse_damaged(path)
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint that `damage` has passed.

        Raises:
            CheckpointError: textdiff did not write it.
        """
        state = json.loads((path / "trainer.json").read_text())
        try:
            optimizers = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
        except UnpicklingError:
            raise CheckpointError(
                f"{path / 'optimizer.pt'} holds more than tensors and was not loaded; textdiff "
                "did not write it",
                code="more_than_tensors",
            ) from None
        model, ema = (load_file(path / f"{name}.safetensors") for name in ("model", "ema"))
        return cls(model, ema, optimizers, state)


def checkpoints(root: Path) -> list[Path]:
    """Return finished checkpoints, oldest first."""
    return sorted(root.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def rescue(root: Path) -> str:
    """Return how a run that cannot write is continued, as the end of a sentence."""
    saved = checkpoints(root)
    left = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint is saved yet"
    return f"{left}; make room or allow writing there, then start the same command again"


def newest_usable(root: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is not damaged; None: there is none at all.

    Args:
        root: the folder of the run's checkpoints.
        report: receives a sentence about each damaged one that is skipped.

    Raises:
        CheckpointError: all are damaged, or another version wrote the newest good one.
    """
    saved = checkpoints(root)[::-1]
    for path in saved:
        problem = damage(path)
        if problem is None:
            return path
        report(f"checkpoint {path} is damaged ({problem}); trying the one before")
    if saved:
        raise CheckpointError(f"no checkpoint in {root} is usable; start over with --resume never")
    return None


def refuse_damaged(path: Path) -> None:
    """Refuse a checkpoint that is damaged.

    Raises:
        CheckpointError: it is, or another version of textdiff wrote it.
    """
    problem = damage(path)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path} cannot be used: {problem}", code="damaged")


def damage(path: Path) -> str | None:
    """Return a checkpoint's damage in words, or None.

    Raises:
        CheckpointError: another version of textdiff wrote it.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        _check_format(path, manifest.get("format", 1), manifest.get("textdiff", "?"))
        expected = {name: (int(f["bytes"]), f["sha256"]) for name, f in manifest["files"].items()}
    except FileNotFoundError:
        return "it does not exist or has no manifest.json"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest.json is unreadable ({error})"
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if file_hash(file) != digest:
            return f"{name} has changed since it was written"
    return None


def _check_format(path: Path, written: int, version: str) -> None:
    if written > FORMAT:
        raise CheckpointError(
            f"checkpoint {path} was written by textdiff {version} in format {written}, this "
            f"textdiff {textdiff.__version__} reads format {FORMAT}; update textdiff",
            code="newer_format",
        )
    if written < FORMAT:
        raise CheckpointError(
            f"checkpoint {path} was written by an earlier textdiff in format {written}, this "
            f"textdiff {textdiff.__version__} reads format {FORMAT}; continue it with that "
            "version, or start over with --resume never"
        )


def _save(states: list[dict[str, Any]], path: Path) -> None:
    """Save with `torch.save` into a file of Python's, which says why a write fails.

    Raises:
        OSError: the system refused.
    """
    try:
        with path.open("wb") as file:
            torch.save(states, file)
    except RuntimeError as error:  # about the end of the archive, in the middle of that failure
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _manifest(folder: Path) -> dict[str, Any]:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(folder.iterdir())
    }
    return {"format": FORMAT, "textdiff": textdiff.__version__, "files": files}
