"""Replicates on disk: an interrupted estimate continues where it was."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
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
class SavedReplicates:
    """Replicates so far; each that a stream adds is saved before the next is drawn.

    Attributes:
        path: where they are saved; None: nowhere.
        fingerprint: what they are of.
        split: returns the [parts, W] nats and [T or 0] nats per token of a replicate.
        writes: whether this process is the one that saves.
        shares: [parts, W] nats of every window in each replicate.
        tokens: [T] nats of every token, summed over replicates; empty unless they are kept.
        pilot: [W] nats of every window in each replicate of a precision's pilot.
    """

    path: Path | None
    fingerprint: dict[str, str]
    split: Callable[[Tensor], tuple[Tensor, Tensor]]
    writes: bool = True
    shares: list[Tensor] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    pilot: list[Tensor] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        path: Path | None,
        fingerprint: dict[str, str],
        split: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> "SavedReplicates":
        """Load what is saved at `path`, if there is anything.

        Raises:
            CheckpointError: the file is of another job, or holds no replicates.
        """
        state = cls(path, fingerprint, split)
        if path is None or not path.exists():
            return state
        try:
            with safe_open(path, "pt") as file:
                known = file.metadata() or {}
                state.shares = list(file.get_tensor("shares").unbind(0))
                state.tokens = file.get_tensor("tokens")
                state.pilot = list(file.get_tensor("pilot").unbind(0))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a saved estimate ({error}); delete it", code="not_a_saved_estimate"
            ) from None
        for key, value in fingerprint.items():
            if known.get(key) != value:
                raise CheckpointError(
                    f"{path} was saved with another {key}; delete it or name another file",
                    code=f"saved_with_another_{key.replace(' ', '_')}",
                )
        return state

    def take(self, stream: Iterator[Tensor], count: int) -> Tensor:
        """Return at least `count` replicates [R, parts, W]; the missing ones come from a stream."""
        for replicate in islice(stream, max(0, count - len(self.shares))):
            nats, tokens = self.split(replicate)
            self.tokens = self.tokens + tokens if self.shares else tokens
            self.shares.append(nats)
            self._save()
        return torch.stack(self.shares)

    def take_pilot(self, stream: Iterator[Tensor], count: int) -> Tensor:
        """Return `count` replicates of a pilot [P, W]; the missing ones come from a stream."""
        for replicate in islice(stream, max(0, count - len(self.pilot))):
            nats, _ = self.split(replicate)
            self.pilot.append(nats.sum(0))
            self._save()
        return torch.stack(self.pilot[:count]) if count else torch.zeros(0, 0)

    def _save(self) -> None:
        """Write all of them to the file, whole or not at all."""
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
    """Return a hash of a network's weights and of the family it is evaluated in."""
    digest = hashlib.sha256()
    for name, value in sorted(denoiser.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    kind, said = type(family.objective), family.objective.model_dump(exclude={"kind"})
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
