"""Steps whose loss or gradient is not finite: kept out of the weights, and explained.

Nothing waits for the device at every step. A flag on the device stays up from the first such step
on. Fused optimizers read it there and leave weights and moments alone, as they do under torch's
`GradScaler`. The loop reads the flag when it logs, validates or saves. The weights are then what
they were before that step, and its samples, pure functions of the seed, can be tried one by one.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from textdiff.errors import TextDiffError
from textdiff.loss import Batch, CleanBatch
from textdiff.train.batches import TrainingBatches
from textdiff.train.checkpoint import checkpoints
from textdiff.train.distributed import full_tensor


class DivergenceGuard:
    """Guard that keeps optimizers from steps whose gradient is not finite, and notes the first.

    Muon and optimizers of sharded parameters cannot read a flag on the device. The CPU holds them
    back, and waits for the norm at every step then.

    Args:
        optimizers: those of the run, as they come from `Accelerator.prepare` or plain.
        device: of the weights.

    Attributes:
        step: the first such step, counted from 0, or -1; float64 on the device.
        norm: the gradient norm of that step.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device):
        self.step = torch.full((), -1.0, dtype=torch.float64, device=device)
        self.norm = torch.zeros((), device=device)
        self._flag = torch.zeros((), device=device)
        self._waits = False
        for optimizer in optimizers:
            inner: Any = getattr(optimizer, "optimizer", optimizer)
            if _reads_a_flag(inner):
                inner.found_inf = self._flag
            else:
                self._waits = True

    def allows(self, norm: Tensor, step: int) -> bool:
        """Note the gradient norm of a step; whether the host may let the optimizers step."""
        bad = ~torch.isfinite(norm)
        first = bad & (self.step < 0)
        self.step.copy_(torch.where(first, float(step), self.step))
        self.norm.copy_(torch.where(first, norm, self.norm))
        self._flag.copy_(torch.maximum(self._flag, bad.float()))
        return not (self._waits and bool(self._flag))


def _reads_a_flag(optimizer: Optimizer) -> bool:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and not any(isinstance(p, DTensor) for p in parameters)


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """Return the loss, whose gradient is not finite on any process where the loss is not.

    Zero times infinity is NaN, which the exchange of gradients spreads.
    """
    return loss * (1.0 + 0.0 * loss.detach())


_MAY_BE_INFINITE = ("loss", "grad_norm", "largest_output")


@dataclass(frozen=True)
class SampleFinding:
    """Sample of a step, tried alone.

    Attributes:
        sample: index of the sample in the endless stream of training sequences.
        slot: its row in the global batch.
        mask_rate: share of its tokens that noise corrupted; None where the noise is learned.
        loss: nats per token.
        largest_output: the network's largest output in magnitude, at the tokens that it predicts.
        grad_norm: of its loss alone.
        parameter: the first parameter whose gradient is not finite.
        text: the beginning of the sample.
    """

    sample: int
    slot: int
    mask_rate: float | None
    loss: float
    largest_output: float
    grad_norm: float
    parameter: str | None
    text: str

    @property
    def finite(self) -> bool:
        """True where this sample alone has a finite loss and gradient."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def try_samples(
    module: nn.Module,
    batches: TrainingBatches,
    step: int,
    device: torch.device,
    decode: Callable[[list[int]], str],
) -> list[SampleFinding]:
    """Try this process's samples of a step one by one, with the weights as they are.

    Args:
        module: what was trained, outside of any wrapper that exchanges gradients.
        batches: the run's.
        step: counted from 0.
        device: of the weights.
        decode: ids to text.
    """
    findings = []
    size = batches.config.train.global_batch_size
    for slot in torch.cat([batches.slots(step, n) for n in range(batches.accumulation)]):
        batch = batches.batch(step, slot[None])
        with _LargestOutput(module) as largest:
            loss, _ = module(batch.to(device))
        loss = loss / batch.x0.numel()
        module.zero_grad()
        torch.autograd.backward(propagate_nonfinite(loss))
        norm, parameter = _gradient(module)
        finding = SampleFinding(
            sample=step * size + int(slot),
            slot=int(slot),
            mask_rate=_mask_rate(batch),
            loss=float(loss.detach()),
            largest_output=largest.value,
            grad_norm=norm,
            parameter=parameter,
            text=decode(batch.x0[0].tolist())[:200],
        )
        findings.append(finding)
    module.zero_grad()
    return findings


class _LargestOutput:
    """Largest magnitude of a network's outputs while entered; NaN where one is NaN."""

    def __init__(self, module: Any):
        self.head, self.value = module.denoiser.output_layer, 0.0
        self.clean = module.family.process.vocabulary.clean

    def __enter__(self) -> Self:
        self.handle = self.head.register_forward_hook(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _look(self, module: nn.Module, inputs: object, logits: Tensor) -> None:
        most = float(logits.detach().masked_fill(~self.clean, 0.0).abs().amax())
        self.value = most if math.isnan(most) else max(self.value, most)


def _mask_rate(batch: Batch | CleanBatch) -> float | None:
    if isinstance(batch, CleanBatch):
        return None
    return float((batch.xt != batch.x0).double().mean())


def _gradient(module: nn.Module) -> tuple[float, str | None]:
    """Return the gradient's norm, and the first parameter whose gradient is not finite."""
    norms = {
        name.removeprefix("denoiser."): float(full_tensor(p.grad).norm())
        for name, p in module.named_parameters()
        if p.grad is not None
    }
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    return math.sqrt(sum(norm * norm for norm in norms.values())), next(iter(broken), None)


def describe_samples(findings: Sequence[SampleFinding]) -> str:
    """Summarise the samples of a step, as part of a sentence."""
    broken = [finding for finding in findings if not finding.finite]
    if not broken:
        worst = max(findings, key=lambda finding: finding.grad_norm)
        return (
            f"no sample alone shows it; the largest gradient, norm {worst.grad_norm:.3g}, is that "
            f"of sample {worst.sample}"
        )
    first = broken[0]
    rate = "" if first.mask_rate is None else f", mask rate {first.mask_rate:.2f}"
    others = [str(finding.sample) for finding in broken[1:6]]
    more = f" (as in {len(broken) - 1} more: {', '.join(others)}" if others else ""
    more += ", …)" if len(broken) > 6 else ")" if others else ""
    return (
        f"sample {first.sample}{rate} has loss {first.loss:.4g}{_reason(first)}, and "
        f"{first.parameter} is the first parameter without a finite gradient{more}"
    )


def _reason(finding: SampleFinding) -> str:
    """Return why the loss of a sample is not finite, in brackets."""
    largest = finding.largest_output
    if not math.isfinite(largest):
        return " (the network's output is not finite)"
    if math.isinf(finding.loss):
        return f" (the network's outputs reach {largest:.4g}, more than a loss in float holds)"
    return f" (the network's outputs reach {largest:.4g})"


def diagnose(
    module: nn.Module,
    batches: TrainingBatches,
    step: int,
    norm: float,
    accelerator: Accelerator,
    decode: Callable[[list[int]], str],
) -> TextDiffError:
    """Return the error about a step that was not finite, and write its details to a file.

    Args:
        module: what was trained, outside of any wrapper that exchanges gradients.
        batches: the run's.
        step: counted from 0; the error counts from 1, as everything that a run writes.
        norm: the gradient norm of the step.
        accelerator: the processes, each of which tries its own samples.
        decode: ids to text.
    """
    findings = try_samples(module, batches, step, accelerator.device, decode)
    findings = sorted(gather_object(findings), key=lambda finding: finding.slot)
    directory = Path(batches.config.run.dir)
    path = directory / "divergence.json"
    if accelerator.is_main_process:
        samples = [
            {**vars(f), **{name: repr(getattr(f, name)) for name in _MAY_BE_INFINITE}}
            for f in findings
        ]
        record = {"step": step + 1, "grad_norm": repr(norm), "samples": samples}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
    saved = checkpoints(directory / "checkpoints")
    export = f" (train.init_from: {directory / 'export'} continues from it)" if saved else ""
    return TextDiffError(
        f"step {step + 1} is not finite (gradient norm {norm:.4g}): {describe_samples(findings)}; "
        f"nothing of it was kept, all its samples are in {path}; last checkpoint: "
        f"{saved[-1] if saved else 'none'}; start a new run.dir with a lower train.learning_rate "
        f"or train.grad_clip{export}, or look at those samples",
        code="divergence",
    )
