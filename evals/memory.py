"""Memory of the head and the loss of a training step at a vocabulary of 50,257.

    python evals/memory.py

Hidden 256, 4 layers, 8 rows of 1024 tokens. Every figure is a difference of two peaks (`ru_maxrss`)
of fresh processes: a training step, minus the same step with head and loss replaced by a sum over
the hidden states. What the head's own parameters hold can be counted in two ways; both are given:

| difference | the replaced step | so it counts |
|---|---|---|
| `head_and_loss` | keeps the head with its gradient and its optimizer state | logits, loss, work |
| `with_head_state` | has no head at all | that, and 16 bytes per parameter of the head |

The bar is 0.4 x 3.29 GB; 3.29 GB are the logits and their gradient in float32, whole. GB are 10^9
bytes.
Beside it: blocks recomputed in the backward pass (`gradient_checkpointing`), and other objectives.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

HIDDEN, LAYERS, HEADS, LENGTH, ROWS, VOCABULARY = 256, 4, 4, 1024, 8, 50257
LOGITS = 4 * ROWS * LENGTH * VOCABULARY  # bytes of [B, L, V] in float32
BAR = 0.4 * 2 * LOGITS
STEPS = 2
PARTS = ("whole", "replaced", "no head")
OTHERS = ("sedd, absorbing", "sedd, uniform", "udlm", "gidd", "d3pm, absorbing", "d3pm, uniform")


def objectives() -> dict:
    """Diffusion and network of each objective, by the rows of `objective_cost.py`."""
    from objective_cost import MASKED, ROWS, SEES_NOISE, UNIFORM

    steps = {"objective": {"kind": "d3pm"}, "timesteps": 1000}
    return {
        "mdlm": ROWS["mdlm, plain network"],
        **{name: ROWS[name] for name in OTHERS if name in ROWS},
        "d3pm, absorbing": ({**MASKED, **steps}, SEES_NOISE),
        "d3pm, uniform": ({**UNIFORM, **steps}, SEES_NOISE),
    }


def measure(objective: str, precision: str, checkpointing: bool, part: str) -> dict[str, float]:
    """Peak bytes and the last step's CPU-seconds, in this process."""
    import time

    import speed
    import torch

    torch.set_num_threads(1)
    diffusion, network = objectives()[objective]
    kind = {"whole": speed.DenoisingLoss, "replaced": Replaced(True), "no head": Replaced(False)}
    step = speed.build_step(
        speed.Size(HIDDEN, LAYERS, HEADS, LENGTH, ROWS, VOCABULARY - 1),
        precision,
        0,
        diffusion,
        loss=lambda *parts: prepared(kind[part](*parts), checkpointing),
        **network,
    )
    for number in range(STEPS):
        start = time.process_time()
        step(number)
        seconds = time.process_time() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": peak, "step_cpu_seconds": seconds}


def prepared(module, checkpointing: bool):
    if checkpointing:
        module.denoiser.gradient_checkpointing_enable()
    return module


def Replaced(keeps_head: bool):
    """The loss whose head and objective are a sum over hidden states."""
    import torch

    from textdiff.loss import DenoisingLoss
    from textdiff.models import training_layout

    class SumOfHidden(DenoisingLoss):
        def __init__(self, denoiser, family):
            super().__init__(denoiser, family)
            if not keeps_head:
                del denoiser.output_layer, self.head_sum

        def forward(self, batch):
            layout = training_layout(self.family.block_size)
            hidden, condition = self.denoiser.hidden(batch.xt, None, batch.sigma, layout)
            loss = hidden.sum(dtype=torch.float64)
            if condition is not None:
                loss = loss + condition.sum(dtype=torch.float64)
            if keeps_head:  # the optimizer then makes its state as well
                for parameter in self.denoiser.output_layer.parameters():
                    parameter.grad = torch.zeros_like(parameter)
            return loss, loss.detach()

    return SumOfHidden


def in_fresh_process(*job) -> dict[str, float]:
    """`measure`, where nothing was allocated before; this process never imports torch."""
    command = [sys.executable, __file__, "--measure", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"measuring {job} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def parts(objective: str, precision: str, checkpointing: bool) -> dict[str, dict[str, float]]:
    """All three measurements of one network."""
    return {part: in_fresh_process(objective, precision, checkpointing, part) for part in PARTS}


def row(objective: str, precision: str, checkpointing: bool, found: dict) -> dict:
    """What follows from measurements, shown and as plain data."""
    peaks = {part: values["peak_bytes"] for part, values in found.items()}
    seconds = {part: values["step_cpu_seconds"] for part, values in found.items()}
    record = {
        "objective": objective,
        "precision": precision,
        "gradient_checkpointing": checkpointing,
        "head_and_loss_gb": (peaks["whole"] - peaks["replaced"]) / 1e9,
        "with_head_state_gb": (peaks["whole"] - peaks["no head"]) / 1e9,
        "peak_gb": {part: peak / 1e9 for part, peak in peaks.items()},
        "step_cpu_seconds": seconds,
    }
    record["share_of_bar"] = record["with_head_state_gb"] / (BAR / 1e9)
    record["logit_tensors"] = record["with_head_state_gb"] / (LOGITS / 1e9)
    print(
        f"{objective:16}{precision:6}{'recomputed' if checkpointing else '':12}"
        f"{record['head_and_loss_gb']:8.3f} GB{record['with_head_state_gb']:8.3f} GB with state"
        f"{record['peak_gb']['whole']:8.3f} GB whole{seconds['whole']:7.2f} s",
        flush=True,
    )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/memory.json"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*json.loads(arguments.measure))))
        return
    rows = [
        row("mdlm", precision, checkpointing, parts("mdlm", precision, checkpointing))
        for precision in ("fp32", "bf16")
        for checkpointing in (False, True)
    ]
    shared = parts(OTHERS[0], "fp32", False)  # the same network without its objective
    for name in OTHERS:
        if name != OTHERS[0]:
            shared = {**shared, "whole": in_fresh_process(name, "fp32", False, "whole")}
        rows.append(row(name, "fp32", False, shared))
    from speed import origin

    result = {
        "command": "python evals/memory.py",
        **origin(),
        "size": {
            "hidden": HIDDEN,
            "layers": LAYERS,
            "heads": HEADS,
            "length": LENGTH,
            "rows": ROWS,
            "vocabulary": VOCABULARY,
        },
        "logits_float32_gb": LOGITS / 1e9,
        "bar_gb": BAR / 1e9,
        "note": "one thread, dropout 0.1; differences of ru_maxrss of fresh processes, "
        f"{STEPS} steps each",
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
