"""A family: one forward process, one schedule, one objective and one block size, put together.

The network is chosen separately and the decoding rule later; nothing here knows either.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from textdiff.diffusion.blocks import Blocks
from textdiff.diffusion.objectives import Objective, build_objective
from textdiff.diffusion.process import ForwardProcess, Vocabulary, build_process
from textdiff.diffusion.schedule import Learned, NoiseSchedule, build_schedule


@dataclass(frozen=True)
class Family:
    """The four choices that training fixes.

    Attributes:
        process: how tokens are destroyed.
        schedule: how fast.
        objective: what the network predicts and what it costs.
        block_size: tokens per block; None: the whole sequence.
        timesteps: T where time is discrete; None: continuous time.
        hides_prompts: whether training showed masks in a prompt's place, whatever the noise.
    """

    process: ForwardProcess
    schedule: NoiseSchedule
    objective: Objective
    block_size: int | None
    timesteps: int | None = None
    hides_prompts: bool = False

    @property
    def learned(self) -> nn.Module | None:
        """What training learns besides the network, and noise depends on; None: nothing."""
        exponents = self.schedule.exponents if isinstance(self.schedule, Learned) else None
        return exponents if isinstance(exponents, nn.Module) else None

    @property
    def on_cpu(self) -> "Family":
        """The same family with its tables on the host, where noise is made."""
        process = self.process.to(torch.device("cpu"))
        return replace(self, process=process, objective=replace(self.objective, process=process))

    def among(self, allowed: Tensor) -> "Family":
        """Return the family whose clean tokens are among those allowed, [V] bool; mostly itself."""
        vocabulary = self.process.vocabulary
        if bool(allowed[vocabulary.ids].all()):
            return self
        clean = vocabulary.clean & allowed
        narrowed = Vocabulary(clean, clean.nonzero().squeeze(1), vocabulary.mask_token_id)
        process = replace(self.process, vocabulary=narrowed)
        return replace(self, process=process, objective=replace(self.objective, process=process))

    def with_block_size(self, block_size: int | None) -> "Family":
        """The same family in other blocks."""
        return replace(self, block_size=block_size)

    def blocks(self, length: int) -> Blocks:
        """The blocks of a sequence of `length` tokens."""
        return Blocks.of(length, self.block_size)

    def known_alpha(self, alpha: Tensor) -> Tensor:
        """Survival probabilities as a network that sees the noise level is told them.

        Where nothing survives, sigma is infinite and no network can be told: there it takes alpha
        as 1 / (n + 1), the mean in training by count when all n tokens of a block are hit; for a
        whole sequence as 0.001, whatever its length, because padding must not matter.
        """
        return alpha.where(alpha > 0.0, 1.0 / (self.block_size + 1.0) if self.block_size else 1e-3)


def block_sizes(spec: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Every block size that plain data, as `build_family` takes it, names; the default first."""
    listed = spec["block_size"]
    return tuple(listed) if isinstance(listed, list | tuple) else (listed,)


def build_family(
    spec: Mapping[str, Any],
    vocabulary: Vocabulary,
    device: torch.device | None = None,
    exponents: nn.Module | None = None,
) -> Family:
    """Builds a family from plain data.

    Args:
        spec: `process`, `schedule` and `objective` (each with its `kind`), `block_size` (of a
            list the first), `timesteps` and `prompt_dropout`; the layout of `diffusion` in an
            export's `config.json`.
        vocabulary: which ids are clean tokens.
        device: where the vocabulary's tables live.
        exponents: the module that holds a learned schedule's; None: they stay where they start.

    Raises:
        ValueError: choices that exclude each other.
    """
    vocabulary = vocabulary.to(device) if device is not None else vocabulary
    schedule = build_schedule(**spec["schedule"])
    if isinstance(schedule, Learned):
        schedule = replace(schedule, exponents=exponents)
    process = build_process(spec["process"], vocabulary, schedule)
    return Family(
        process=process,
        schedule=schedule,
        objective=build_objective(process, **spec["objective"]),
        block_size=block_sizes(spec)[0],
        timesteps=spec.get("timesteps"),
        hides_prompts=spec.get("prompt_dropout", 0.0) > 0.0,
    )
