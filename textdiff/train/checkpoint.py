"""Training checkpoints: tensors and JSON in `checkpoints/step-NNNNNN/`, written beside and renamed.

A manifest holds the size and SHA-256 of every file. It is written last, so a folder without a
fitting one was never finished or is damaged. It also holds the format, which is read before
anything else: what a newer version wrote is refused, not taken for damage. Nothing is unpickled:
tensors load with `weights_only`.

There are two formats, and each loads into sharded weights and into others. A whole checkpoint has
one file of each kind, which the main process writes. A sharded one has a file of each process
(`textdiff/train/shard_files.py`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
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

FORMAT, SHARDED_FORMAT = 2, 3  # of whole checkpoints and of sharded ones
MANIFEST, STATE = "manifest.json", "trainer.json"
WHOLE_FILES = {"model.safetensors", "ema.safetensors", "optimizer.pt"}  # of a whole checkpoint
GROUPS = "optimizers.json"  # settings of the optimizers' groups, of a sharded one


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
            (folder / STATE).write_text(json.dumps(self.state, indent=2) + "\n")
            write_manifest(folder, FORMAT)
        discard_old(root, keep)
        return target

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint whose manifest fits.

        Raises:
            CheckpointError: it is missing, damaged, or from another version.
        """
        refuse_damaged(path, damage(path))
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint that `damage` has passed.

        Raises:
            CheckpointError: textdiff did not write it.
        """
        try:
            optimizers = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
        except UnpicklingError:
            raise CheckpointError(
                f"{path / 'optimizer.pt'} holds more than tensors and was not loaded; textdiff "
                "did not write it",
                code="more_than_tensors",
            ) from None
        model, ema = (load_file(path / f"{name}.safetensors") for name in ("model", "ema"))
        return cls(model, ema, optimizers, read_state(path))


def checkpoints(root: Path) -> list[Path]:
    """Return finished checkpoints, oldest first, without copies of other names."""
    steps = {path: path.name.removeprefix("step-") for path in root.glob("step-*") if path.is_dir()}
    numbers = {path: int(step) for path, step in steps.items() if step.isdecimal()}
    return sorted(numbers, key=numbers.__getitem__)


def discard_old(root: Path, keep: int) -> None:
    """Delete all but the newest checkpoints."""
    for old in checkpoints(root)[:-keep]:
        discard(old)


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's step, counters and config."""
    return json.loads((path / STATE).read_text())  # type: ignore[no-any-return]


def is_sharded_checkpoint(path: Path) -> bool:
    """Return whether a checkpoint has one file of tensors for each process that wrote it."""
    manifest = json.loads((path / MANIFEST).read_text())
    return bool(manifest["format"] == SHARDED_FORMAT)


def rescue(root: Path) -> str:
    """Return how a run that cannot write is continued, as the end of a sentence."""
    saved = checkpoints(root)
    left = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint is saved yet"
    return f"{left}; make room or allow writing there, then start the same command again"


def newest_usable(
    saved: Sequence[Path],
    report: Callable[[str], None],
    problem_of: Callable[[Path], str | None],
) -> Path | None:
    """Return the newest checkpoint that is not damaged; None: there is none at all.

    Args:
        saved: the run's checkpoints, oldest first.
        report: receives a sentence about each damaged one that is skipped.
        problem_of: returns a checkpoint's damage.

    Raises:
        CheckpointError: all are damaged, or another version wrote the newest good one.
    """
    for path in reversed(saved):
        problem = problem_of(path)
        if problem is None:
            return path
        report(f"checkpoint {path} is damaged ({problem}); trying the one before")
    if saved:
        raise CheckpointError(
            f"no checkpoint in {saved[0].parent} is usable; start over with --resume never",
            code="all_damaged",
        )
    return None


def refuse_damaged(path: Path, problem: str | None) -> None:
    """Refuse a checkpoint with damage.

    Raises:
        CheckpointError: there is a problem.
    """
    if problem is not None:
        raise CheckpointError(f"checkpoint {path} cannot be used: {problem}", code="damaged")


def damage(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """Return a checkpoint's damage in words, or None.

    Args:
        path: the checkpoint.
        share: number of the share of files whose contents are hashed.
        shares: their number: several processes divide this work.

    Raises:
        CheckpointError: another version of textdiff wrote it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        _check_format(path, manifest.get("format", 1), manifest.get("textdiff", "?"))
        expected = {name: (int(f["bytes"]), f["sha256"]) for name, f in manifest["files"].items()}
        shards = int(manifest["shards"]) if manifest["format"] == SHARDED_FORMAT else None
    except FileNotFoundError:
        return "it does not exist or has no manifest.json"
    except (OSError, ValueError) as error:
        return f"its manifest.json is unreadable ({error})"
    except (KeyError, TypeError, AttributeError):
        return "its manifest.json has lost entries"
    needed = {STATE, *(WHOLE_FILES if shards is None else {GROUPS})}
    if unlisted := needed - set(expected):
        return f"its manifest.json has lost {min(unlisted)}"
    problem = _file_problem(path, {name: size for name, (size, _) in expected.items()}, shards)
    if problem is not None:
        return problem
    for name in list(expected)[share::shares]:
        if file_hash(path / name) != expected[name][1]:
            return f"{name} has changed since it was written"
    return None


def _file_problem(path: Path, sizes: Mapping[str, int], shards: int | None) -> str | None:
    """Return which file is missing, of another size, or a shard too many, in words."""
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    if shards is not None:
        present = {file.name for file in path.glob("*.safetensors")}
        listed = {name for name in sizes if name.endswith(".safetensors")}
        if present != listed or len(listed) != shards:
            return f"it has {len(present)} shards instead of {shards}"
    return None


def _check_format(path: Path, written: int, version: str) -> None:
    newest = max(FORMAT, SHARDED_FORMAT)
    if written > newest:
        raise CheckpointError(
            f"checkpoint {path} was written by textdiff {version} in format {written}, this "
            f"textdiff {textdiff.__version__} reads format {newest}; update textdiff",
            code="newer_format",
        )
    if written < FORMAT:
        raise CheckpointError(
            f"checkpoint {path} was written by an earlier textdiff in format {written}, this "
            f"textdiff {textdiff.__version__} reads format {FORMAT}; continue it with that "
            "version, or start over with --resume never",
            code="older_format",
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


def write_manifest(
    folder: Path, number: int, known: Mapping[str, Any] | None = None, **more: Any
) -> None:
    """Write the manifest of the files in a folder.

    Args:
        folder: the checkpoint.
        number: its format.
        known: size and hash of files that are not hashed again, by name.
        more: other entries of the manifest.
    """
    known = known or {}
    files = {
        path.name: known.get(path.name) or describe_file(path) for path in sorted(folder.iterdir())
    }
    manifest = {"format": number, "textdiff": textdiff.__version__, **more, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and hash of a file, as a manifest has them."""
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}
