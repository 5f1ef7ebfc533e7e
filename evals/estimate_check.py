"""Peak memory of real training steps against what `textdiff plan` predicts.

    python evals/estimate_check.py [--only NAME ...]

Each configuration is a config of `textdiff train`, run in a fresh process on random tokens by the
trainer's own parts: the batches that its loader draws, the loss, AdamW or Muon, the averaged
weights, clipping. Measured is `ru_maxrss` after three optimizer steps, minus the process's base:
`ru_maxrss` of the same process after it did the same with a network of 8 channels and one layer, so
that every library is loaded and every kernel has its work space, while the network itself weighs
nothing. Predicted is what is alive at the peak, plus what glibc's allocator keeps (fitted to these
configurations and five others; run to run, measured peaks differ by up to 10 %).
"""

import argparse
import atexit
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 3
TINY = {
    "data": {"sequence_length": 256},
    "model": {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "dropout": 0.1},
    "train": {"global_batch_size": 16, "micro_batch_size": 16, "mixed_precision": "fp32"},
}
SMALL = {
    "data": {"sequence_length": 512},
    "model": {"hidden_size": 384, "num_layers": 8, "num_heads": 6, "dropout": 0.1},
    "train": {"global_batch_size": 8, "micro_batch_size": 8, "mixed_precision": "fp32"},
}
BF16 = {"train": {"mixed_precision": "bf16"}}
RECOMPUTED = {"model": {"gradient_checkpointing": True}}


def merged(*parts: dict) -> dict:
    found: dict = {}
    for part in parts:
        for section, values in part.items():
            found[section] = {**found.get(section, {}), **values}
    return found


def batches(total: int, micro: int) -> dict:
    return {"train": {"global_batch_size": total, "micro_batch_size": micro}}


# Name, vocabulary (one row per id, mask included), config.
CASES = {
    "tiny": (257, TINY),
    "tiny, bf16": (257, merged(TINY, BF16)),
    "tiny, block 16": (257, merged(TINY, {"diffusion": {"block_size": 16}})),
    "tiny, rows 32, recomputed": (257, merged(TINY, batches(32, 32), RECOMPUTED)),
    "tiny, V 50257": (50257, TINY),
    "tiny, V 50257, bf16, rows 4 of 16": (50257, merged(TINY, BF16, batches(16, 4))),
    "small": (8193, SMALL),
    "small, block 16": (8193, merged(SMALL, {"diffusion": {"block_size": 16}})),
    "small, bf16": (8193, merged(SMALL, BF16)),
    "small, rows 16, recomputed": (8193, merged(SMALL, batches(16, 16), RECOMPUTED)),
    "small, bf16, rows 16, recomputed": (
        8193,
        merged(SMALL, BF16, batches(16, 16), RECOMPUTED),
    ),
    "small, V 50257, bf16, recomputed": (50257, merged(SMALL, BF16, RECOMPUTED)),
    "small, swiglu, rmsnorm, qk_norm": (
        8193,
        merged(SMALL, {"model": {"mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True}}),
    ),
    "small, adaln, udlm": (
        8193,
        merged(
            SMALL,
            {
                "model": {"adaln": True, "time_conditioning": True},
                "diffusion": {"process": "uniform", "objective": {"kind": "udlm"}},
            },
        ),
    ),
    "small, muon, bf16": (8193, merged(SMALL, BF16, {"train": {"optimizer": "muon"}})),
}
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "max_position_embeddings": 256,
    "vocab_size": 8192,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384}
ARCHITECTURES = {
    "llama": SHAPE,
    "gpt2": {**SHAPE, "n_inner": 1024},
    "qwen3_moe": {**SHAPE, **EXPERTS},
    "modernbert": SHAPE,
}
SIXTEEN = {"data": TINY["data"], "train": TINY["train"]}
for _kind, _settings in ARCHITECTURES.items():
    _network = merged(SIXTEEN, {"model": {"architecture": {"model_type": _kind, **_settings}}})
    CASES[_kind] = (8193, _network)
    CASES[f"{_kind}, bf16"] = (8193, merged(_network, BF16))
    CASES[f"{_kind}, block 16"] = (8193, merged(_network, {"diffusion": {"block_size": 16}}))
SMALLEST = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "n_inner": 8,
    "vocab_size": 16,
}
BASE = merged(
    TINY,
    {"data": {"sequence_length": 16}, "model": {"hidden_size": 8, "num_layers": 1, "num_heads": 2}},
    batches(2, 1),
)


def smallest(raw: dict) -> dict:
    """The same run with next to no network."""
    shape = raw["model"].get("architecture")
    if shape is None:
        return merged(raw, BASE)
    rest = {section: values for section, values in BASE.items() if section != "model"}
    return merged(raw, rest, {"model": {"architecture": {**shape, **SMALLEST}}})


def config_of(raw: dict):
    """The config, with a folder for an architecture of transformers."""
    from textdiff.config import Config

    shape = raw["model"].get("architecture")
    if shape is not None:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder)
        (folder / "config.json").write_text(json.dumps(shape))
        rest = {key: value for key, value in raw["model"].items() if key != "architecture"}
        raw = {**raw, "model": {"kind": "transformers", "path": str(folder), **rest}}
    return Config.model_validate(raw)


class RandomTokens:
    """Rows of random tokens, as `PackedSequences` gives them."""

    def __init__(self, vocabulary: int, length: int):
        self.vocabulary, self.length = vocabulary, length

    def rows(self, indices):
        import numpy as np

        from textdiff.data.sequences import PackedRows

        shape = (len(indices), self.length)
        tokens = np.random.default_rng(indices[0]).integers(0, self.vocabulary - 1, shape)
        return PackedRows(tokens, np.zeros(shape, np.int32))


def train(vocabulary: int, raw: dict) -> None:
    """Three optimizer steps, as the trainer does them on one device."""
    import torch

    from textdiff.export.loading import family_of
    from textdiff.train.batches import TrainingBatches
    from textdiff.train.learned_loss import training_loss
    from textdiff.train.optim import build_optimizers
    from textdiff.train.run_state import EMA
    from textdiff.train.setup import architecture

    config = config_of(raw)
    torch.manual_seed(0)
    model = config.model.build(architecture(config, vocabulary, mask_token_id=vocabulary - 1))
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    family = family_of(model.config, torch.device("cpu"), model.exponents)
    data = TrainingBatches(
        RandomTokens(vocabulary, config.data.sequence_length), family.on_cpu, config
    )
    optimizers = build_optimizers(model, config.train)
    ema = EMA(model, config.train.ema_decay)
    module = training_loss(model, family).train()
    loader = data.loader(0, STEPS)
    for _ in range(STEPS):
        for _ in range(data.accumulation):
            batch = next(loader)
            half = config.train.mixed_precision == "bf16"
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                total, _ = module(batch)
            (total / batch.x0.numel() / data.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(model)


def measure(vocabulary: int, raw: dict) -> dict[str, float]:
    """Bytes above the base, in this process."""
    import torch

    torch.set_num_threads(1)
    train(17, smallest(raw))
    base = peak()
    train(vocabulary, raw)
    return {"measured_bytes": peak() - base, "base_bytes": base}


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_fresh_process(vocabulary: int, raw: dict) -> dict[str, float]:
    """`measure`, where nothing was allocated before; this process never imports torch."""
    command = [sys.executable, __file__, "--measure", json.dumps([vocabulary, raw])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"measuring {raw} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, found: dict[str, float]) -> dict:
    """Predicted and measured bytes of one configuration."""
    import torch

    from textdiff.planning.memory import peak_memory
    from textdiff.planning.sizes import run_sizes

    torch.set_num_threads(1)  # as where it was measured
    vocabulary, raw = CASES[name]
    config = config_of(raw)
    predicted = peak_memory(run_sizes(config, vocabulary, config.train.mixed_precision == "bf16"))
    record = {
        "name": name,
        "vocabulary": vocabulary,
        "config": raw,
        **found,
        "predicted_bytes": predicted["resident"],
        "predicted_over_measured": predicted["resident"] / found["measured_bytes"],
        "alive_bytes": predicted["peak"],
        "parts": predicted,
    }
    print(
        f"{name:36}{predicted['peak'] / 1e6:8.0f} alive{predicted['resident'] / 1e6:8.0f} predicted"
        f"{found['measured_bytes'] / 1e6:8.0f} MB measured{record['predicted_over_measured']:7.3f}",
        flush=True,
    )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/estimate.json"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*json.loads(arguments.measure))))
        return
    # All is measured before torch is imported here: ru_maxrss of a child starts at its parent's.
    found = {}
    for name in arguments.only:
        found[name] = in_fresh_process(*CASES[name])
        print(f"{name:36}{found[name]['measured_bytes'] / 1e6:8.0f} MB measured", flush=True)
    write(arguments.output, [row(name, found[name]) for name in arguments.only])


def write(path: Path, rows: list[dict]) -> None:
    """The rows so far, with where they come from."""
    from speed import origin

    result = {
        "command": shlex.join(
            ["python", "evals/estimate_check.py", "--only", *(r["name"] for r in rows)]
        ),
        **origin(),
        "steps": STEPS,
        "largest_error": max(abs(r["predicted_over_measured"] - 1.0) for r in rows),
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
