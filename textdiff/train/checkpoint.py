"""Training checkpoints: tensors and JSON in `checkpoints/step-NNNNNN/`, written beside and renamed.

A manifest holds the size and SHA-256 of every file; it is written last, so a folder without a
fitting one was never finished or is damaged. Nothing is unpickled: tensors load with
`weights_only`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from textdiff.errors import CheckpointError

FORMAT = 1


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
        """Writes `root/step-NNNNNN` and deletes all but the newest `keep` checkpoints."""
        target = root / f"step-{self.state['step']:06d}"
        scratch = root / f".writing-{target.name}-{os.getpid()}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in self.model.items()}, scratch / "model.safetensors")
        save_file({k: v.contiguous() for k, v in self.ema.items()}, scratch / "ema.safetensors")
        torch.save(list(self.optimizers), scratch / "optimizer.pt")
        state = self.state | {"format": FORMAT}
        (scratch / "trainer.json").write_text(json.dumps(state, indent=2) + "\n")
        (scratch / "manifest.json").write_text(json.dumps(_manifest(scratch), indent=2) + "\n")
        for path in scratch.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        for old in checkpoints(root)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Reads a checkpoint whose manifest fits.

        Raises:
            CheckpointError: it is missing, damaged, or from a newer version.
        """
        problem = damage(path)
        if problem:
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
        state = json.loads((path / "trainer.json").read_text())
        if state["format"] > FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {state['format']}, this textdiff reads up to "
                f"{FORMAT}; update textdiff"
            )
        try:
            optimizers = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
        except UnpicklingError:
            raise CheckpointError(
                f"{path / 'optimizer.pt'} holds more than tensors and was not loaded; textdiff "
                "did not write it"
            ) from None
        model, ema = (load_file(path / f"{name}.safetensors") for name in ("model", "ema"))
        return cls(model, ema, optimizers, state)


def checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(root.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        return "it does not exist or has no manifest.json"
    except (OSError, ValueError) as error:
        return f"its manifest.json is unreadable ({error})"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def optimizer_states(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """State dicts of the optimizers, in order."""
    return [optimizer.state_dict() for optimizer in optimizers]


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
