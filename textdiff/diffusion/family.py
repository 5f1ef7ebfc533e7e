"""A family: one forward process, one schedule, one objective and one block size, put together.

It is independent of the network and of the decoding rule. Blocks factorise the likelihood, log p(x)
= sum_b log p(x^b | x^<b) (Eq. 1, arXiv:2503.09573): one block is plain diffusion over the whole
sequence, blocks of one token are autoregressive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from textdiff.diffusion import NO_STEPS, PROCESSES, SCHEDULES, TIME_INPUTS
from textdiff.diffusion.objectives import OBJECTIVES, Objective
from textdiff.diffusion.process import ForwardProcess, Vocabulary
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.errors import ConfigError, unknown


@dataclass(frozen=True)
class Blocks:
    """A sequence of `length` positions cut into blocks of `size`; the last may be shorter."""

    length: int
    size: int

    @classmethod
    def of(cls, length: int, block_size: int | None) -> "Blocks":
        """Return the blocks of a config's `block_size`; None: the whole sequence."""
        return cls(length, min(block_size or length, length))

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-self.length // self.size)

    def split(self, x: Tensor, fill: float | bool) -> Tensor:
        """Cut [B, L] into [B, blocks, size]; the missing end of the last block is `fill`."""
        missing = self.count * self.size - self.length
        padded = functional.pad(x, (0, missing), value=fill)
        return torch.unflatten(padded, -1, (self.count, self.size))

    def join(self, x: Tensor) -> Tensor:
        """Join [B, blocks, size] to [B, L], the inverse of `split`."""
        return x.flatten(-2)[..., : self.length]

    def spread(self, x: Tensor) -> Tensor:
        """Give every position of [B, L] its block's value of [B, blocks]."""
        return self.join(x.unsqueeze(-1).expand(*x.shape, self.size))

    def span(self, index: int) -> slice:
        """Return the positions of one block."""
        return slice(index * self.size, min((index + 1) * self.size, self.length))

    def index(self, device: torch.device | None = None) -> Tensor:
        """Return [L] int64, the block of each position."""
        return torch.arange(self.length, device=device) // self.size


@dataclass(frozen=True)
class Family:
    """The four choices that training fixes.

    Attributes:
        process: how tokens are corrupted.
        schedule: how fast.
        objective: what the network predicts, and its contribution to the bound.
        block_size: tokens per block; None: the whole sequence.
        timesteps: T where time is discrete; None: continuous time.
        hides_prompts: whether training showed masks in a prompt's place, whatever the noise.
        time_input: key of `TIME_INPUTS`: what networks with time conditioning read.
    """

    process: ForwardProcess
    schedule: NoiseSchedule
    objective: Objective
    block_size: int | None
    timesteps: int | None = None
    hides_prompts: bool = False
    time_input: str = "sigma"

    def __post_init__(self) -> None:
        """Refuse a name that no registry has."""
        if self.time_input not in TIME_INPUTS:
            raise unknown("time input", self.time_input, TIME_INPUTS)
        if self.time_input == "step" and self.timesteps is None:
            raise ConfigError(NO_STEPS, code="no_steps")

    @property
    def learned(self) -> nn.Module | None:
        """Module that training learns besides the network, and noise depends on; None: nothing."""
        return self.schedule.learned

    @property
    def causal_context(self) -> bool:
        """True where finished tokens see only those before them: training predicts them as well."""
        return self.objective.ar_weight > 0.0

    @property
    def on_cpu(self) -> "Family":
        """The family with its tables on the CPU, where noise is made."""
        return self._with_process(self.process.to(torch.device("cpu")))

    def among(self, allowed: Tensor) -> "Family":
        """Return the family whose clean tokens are among those allowed, [V] bool; mostly itself."""
        vocabulary = self.process.vocabulary
        if bool(allowed[vocabulary.ids].all()):
            return self
        return self._with_process(replace(self.process, vocabulary=vocabulary.among(allowed)))

    def _with_process(self, process: ForwardProcess) -> "Family":
        return replace(self, process=process, objective=self.objective.on(process))

    def with_block_size(self, block_size: int | None) -> "Family":
        """Return the family in other blocks."""
        return replace(self, block_size=block_size)

    def blocks(self, length: int) -> Blocks:
        """Return the blocks of a sequence of `length` tokens."""
        return Blocks.of(length, self.block_size)

    def known_alpha(self, alpha: Tensor) -> Tensor:
        """Return survival probabilities as a network with time conditioning reads them.

        Where nothing survives, sigma is infinite, which no network can read: alpha is 1 / (n + 1)
        there, the mean in training by count when all n tokens of a block are corrupted. For a whole
        sequence it is 0.001, whatever its length, because padding must not matter.
        """
        return alpha.where(alpha > 0.0, 1.0 / (self.block_size + 1.0) if self.block_size else 1e-3)

    def network_time(self, alpha: Tensor) -> Tensor:
        """Return what the network reads at survival probabilities from `known_alpha`, float32."""
        return TIME_INPUTS[self.time_input](self, alpha).float()


def block_sizes(spec: Mapping[str, Any]) -> tuple[int | None, ...]:
    """List the block sizes of plain data as `build_family` takes it; the default comes first."""
    listed = spec["block_size"]
    return tuple(listed) if isinstance(listed, list | tuple) else (listed,)


def sizes_in_words(sizes: Sequence[int | None]) -> str:
    """Return block sizes in words."""
    blocks = " and ".join(str(size) for size in sizes if size is not None)
    whole = "on whole sequences" if None in sizes else ""
    return " and ".join(filter(None, (whole, blocks and f"in blocks of {blocks}")))


def build_family(
    spec: Mapping[str, Any],
    vocabulary: Vocabulary,
    device: torch.device | None = None,
    exponents: nn.Module | None = None,
) -> Family:
    """Build a family from plain data.

    Args:
        spec: `process`, `schedule` and `objective` (each with its `kind`), `block_size` (of a
            list the first), `timesteps`, `prompt_dropout`, `time_input` (`sigma` if absent); the
            layout of `diffusion` in an export's `config.json`.
        vocabulary: which ids are clean tokens.
        device: where the vocabulary's tables are.
        exponents: the module that holds a learned schedule's; None: they stay where they start.

    Raises:
        ConfigError: unknown names, wrong options, or choices that exclude each other.
    """
    name = spec["process"]
    schedule = SCHEDULES.build(spec["schedule"]["kind"], spec["schedule"])
    objective = OBJECTIVES.build(spec["objective"]["kind"], spec["objective"])
    if name not in PROCESSES:
        raise unknown("process", name, PROCESSES)
    problem = objective.misfit(name) or schedule.misfit(name, objective)
    if problem:
        raise ConfigError(problem, code="excluded_choice")
    schedule = schedule.with_exponents(exponents)
    vocabulary = vocabulary.to(device) if device is not None else vocabulary
    process = PROCESSES[name].under(schedule, vocabulary)
    return Family(
        process=process,
        schedule=schedule,
        objective=objective.on(process),
        block_size=block_sizes(spec)[0],
        timesteps=spec.get("timesteps"),
        hides_prompts=spec.get("prompt_dropout", 0.0) > 0.0,
        time_input=spec.get("time_input", "sigma"),
    )
