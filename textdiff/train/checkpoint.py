"""Training checkpoints: tensors and JSON in `checkpoints/step-NNNNNN/`, written beside and renamed.

A manifest holds the size and SHA-256 of every file; it is written last, so a folder without a
fitting one was never finished or is damaged. It also holds the format, which is read before
anything else: what a newer version wrote is refused, not taken for damage. Nothing is unpickled:
tensors load with `weights_only`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

import textdiff
from textdiff.config import Config
from textdiff.errors import CheckpointError
from textdiff.export.card import model_card, training_facts
from textdiff.export.provenance import TRAINING_FILE
from textdiff.likelihood import Bound
from textdiff.pipeline import TextDiffusion
from textdiff.storage import discard, whole_folder

FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What training continues from.

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
        """Writes `root/step-NNNNNN` and deletes all but the newest `keep` checkpoints.

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
        """Reads a checkpoint whose manifest fits.

        Raises:
            CheckpointError: it is missing, damaged, or from another version.
        """
        problem = damage(path)
        if problem:
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Reads a checkpoint that was found undamaged.

        Raises:
            CheckpointError: textdiff did not write it.
        """
        state = json.loads((path / "trainer.json").read_text())
        try:
            optimizers = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
        except UnpicklingError:
            raise CheckpointError(
                f"{path / 'optimizer.pt'} holds more than tensors and was not loaded; textdiff "
                "did not write it"
            ) from None
        model, ema = (load_file(path / f"{name}.safetensors") for name in ("model", "ema"))
        return cls(model, ema, optimizers, state)


def write_export(
    target: Path, model: TextDiffusion, config: Config, state: dict[str, Any], bound: Bound | None
) -> None:
    """Writes the export beside its place and swaps it in: a reader never sees half of one.

    Raises:
        CheckpointError: it cannot be written; the earlier export is as it was.
    """
    with whole_folder(target, rescue(target.with_name("checkpoints"))) as folder:
        model.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(config, state, bound), encoding="utf-8")
        record = json.dumps(training_facts(config, state), indent=2, ensure_ascii=False)
        (folder / TRAINING_FILE).write_text(record + "\n", encoding="utf-8")


def checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(root.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def rescue(root: Path) -> str:
    """What is left of a run that cannot write, and how it goes on; the end of a sentence."""
    found = checkpoints(root)
    left = f"the newest checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    return f"{left}; make room or allow writing there, then start the same command again"


def newest_usable(root: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is not damaged; None where there is no checkpoint at all.

    Args:
        root: the folder of the run's checkpoints.
        tell: told of the damaged ones that were passed over.

    Raises:
        CheckpointError: all are damaged, or another version wrote the newest good one.
    """
    found = checkpoints(root)[::-1]
    for path in found:
        problem = damage(path)
        if problem is None:
            return path
        tell(f"checkpoint {path} is damaged ({problem}); trying the one before")
    if found:
        raise CheckpointError(f"no checkpoint in {root} is usable; start over with --resume never")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None.

    Raises:
        CheckpointError: nothing is, but another version of textdiff wrote it.
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
        if _sha256(file) != digest:
            return f"{name} has changed since it was written"
    return None


def _check_format(path: Path, found: int, version: str) -> None:
    if found > FORMAT:
        raise CheckpointError(
            f"checkpoint {path} was written by textdiff {version} in format {found}, this textdiff "
            f"{textdiff.__version__} reads format {FORMAT}; update textdiff"
        )
    if found < FORMAT:
        raise CheckpointError(
            f"checkpoint {path} was written by an earlier textdiff in format {found}, this "
            f"textdiff {textdiff.__version__} reads format {FORMAT}; continue it with that "
            "version, or start over with --resume never"
        )


def optimizer_states(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """State dicts of the optimizers, in order."""
    return [optimizer.state_dict() for optimizer in optimizers]


def _save(states: list[dict[str, Any]], path: Path) -> None:
    """`torch.save` into a file of Python's, which knows why a write fails.

    Raises:
        OSError: it did.
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
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    return {"format": FORMAT, "textdiff": textdiff.__version__, "files": files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
