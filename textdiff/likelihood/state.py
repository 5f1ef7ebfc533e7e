"""Replicates on disk: an interrupted estimate continues where it was."""

import hashlib
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.errors import CheckpointError
from textdiff.models import TextDiffusionModel
from textdiff.storage import whole_file


@dataclass
class State:
    """What is known so far.

    Attributes:
        path: where it is saved; None: nowhere.
        fingerprint: what it is of.
        writes: whether this process is the one that saves.
        shares: [P, W] nats of every window in each replicate, by part of the bound.
        tokens: [T] nats of every token, summed over replicates; empty unless they are kept.
        pilot: [W] nats of every window in each replicate of a precision's pilot.
    """

    path: Path | None
    fingerprint: dict[str, str]
    writes: bool = True
    shares: list[Tensor] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    pilot: list[Tensor] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path | None, fingerprint: dict[str, str], writes: bool) -> "State":
        """The state saved at `path`, or an empty one.

        Raises:
            CheckpointError: the file is of another job, or no state at all.
        """
        state = cls(path, fingerprint, writes)
        if path is None or not path.exists():
            return state
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata() or {}
                shares, tokens = file.get_tensor("shares"), file.get_tensor("tokens")
                pilot = file.get_tensor("pilot")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is no saved estimate ({error}); delete it") from None
        for key, value in fingerprint.items():
            if found.get(key) != value:
                raise CheckpointError(
                    f"{path} was saved with another {key}; delete it or name another file"
                )
        state.shares, state.tokens = list(shares.unbind(0)), tokens
        state.pilot = list(pilot.unbind(0))
        return state

    def add(self, share: Tensor, tokens: Tensor) -> None:
        """Adds a replicate and saves it: the file is always a whole one."""
        self.tokens = tokens if not self.shares else self.tokens + tokens
        self.shares.append(share)
        self._save()

    def add_pilot(self, nats: Tensor) -> None:
        """Adds a replicate of a pilot and saves it."""
        self.pilot.append(nats)
        self._save()

    def _save(self) -> None:
        if self.path is None or not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "shares": _stacked(self.shares),
            "tokens": self.tokens,
            "pilot": _stacked(self.pilot),
        }
        with whole_file(self.path) as file:
            save_file(tensors, file, metadata=self.fingerprint)


def _stacked(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0)


def model_digest(denoiser: TextDiffusionModel, family: Family) -> str:
    """Hash of a network's weights and of the family it is read in."""
    digest = hashlib.sha256()
    for name, value in sorted(denoiser.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    kind, options = type(family.objective), family.objective
    said = {f.name: getattr(options, f.name) for f in fields(kind) if f.name != "process"}
    process = type(family.process).__name__
    digest.update(f"{process} {kind.__name__} {said}".encode())
    digest.update(f"{family.block_size} {family.timesteps}".encode())
    if family.learned is not None:
        for name, value in sorted(family.learned.state_dict().items()):
            digest.update(f"{name} {value.tolist()}".encode())
    # A schedule is what it computes, whether its numbers are settings or learned.
    grid = family.schedule.alpha(torch.linspace(0.0, 1.0, 33, dtype=torch.float64))
    digest.update(grid.detach().numpy().tobytes())
    return digest.hexdigest()
