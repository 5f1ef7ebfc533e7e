"""A family: one forward process, one schedule, one objective and one block size, put together.

The network is chosen separately and the decoding rule later; nothing here knows either.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from textdiff.diffusion.blocks import Blocks
from textdiff.diffusion.objectives import Objective, build_objective
from textdiff.diffusion.process import PROCESSES, ForwardProcess, Vocabulary
from textdiff.diffusion.schedule import NoiseSchedule, build_schedule


@dataclass(frozen=True)
class Family:
    """The four choices that training fixes.

    Attributes:
        process: how tokens are destroyed.
        schedule: how fast.
        objective: what the network predicts and what it costs.
        block_size: tokens per block; None: the whole sequence.
    """

    process: ForwardProcess
    schedule: NoiseSchedule
    objective: Objective
    block_size: int | None

    @property
    def host(self) -> "Family":
        """The same family with its tables on the host, where noise is made."""
        process = self.process.to(torch.device("cpu"))
        return replace(self, process=process)

    def blocks(self, length: int) -> Blocks:
        """The blocks of a sequence of `length` tokens."""
        return Blocks.of(length, self.block_size)


def build_family(
    spec: Mapping[str, Any], vocabulary: Vocabulary, device: torch.device | None = None
) -> Family:
    """Builds a family from plain data.

    Args:
        spec: `process`, `schedule` and `objective` (each with its `kind`), `block_size`; the layout
            of a config's `diffusion` section and of `diffusion` in an export's `config.json`.
        vocabulary: which ids are clean tokens.
        device: where the vocabulary's tables live.
    """
    vocabulary = vocabulary.to(device) if device is not None else vocabulary
    return Family(
        process=PROCESSES[spec["process"]](vocabulary),
        schedule=build_schedule(**spec["schedule"]),
        objective=build_objective(vocabulary, **spec["objective"]),
        block_size=spec["block_size"],
    )
