"""Cost of a Llama network of transformers as a denoiser, against our own Transformer of its size.

    python evals/backbone_speed.py [--size small] [--repeats 5] [--block 16]

Both have SwiGLU, RMS norms and rotary positions, as many parameters and no dropout, so their useful
work is equal. Training steps of both take turns in one process, in blocks and on full sequences;
`dense` is the Llama network as transformers runs it, with a dense mask of both streams, SDPA and
logits everywhere. Then both write text in blocks from a cache. One thread, process-CPU time;
medians, and ratios of medians to our network's.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from generation import timed, walk
from speed import MASKED, SIZES, Size, build_step, cpu_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.models import Denoiser, Layout, TextDiffusionConfig, TextDiffusionModel
from textdiff.models.backbone import TransformersDenoiser
from textdiff.models.block import SwiGLU


def llama_config(size: Size) -> AutoConfig:
    """The configuration of a Llama network with our Transformer's sizes."""
    inner = SwiGLU(size.hidden).down.in_features
    config = AutoConfig.for_model(
        "llama",
        vocab_size=size.vocabulary + 1,
        hidden_size=size.hidden,
        intermediate_size=inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.length,
        pad_token_id=None,
    )
    config.mask_token_id = size.vocabulary
    return config


def dense_step(size: Size, block: int | None, seed: int) -> Callable[[int], None]:
    """A training step as transformers runs the network: dense mask, logits everywhere."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(llama_config(size), attn_implementation="sdpa")
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    x0 = torch.randint(0, size.vocabulary, (size.rows, size.length))
    layout = Layout("block_diffusion", block) if block else Layout()
    total = size.length * layout.streams
    mask = layout.mask(total, x0.device)
    mask = torch.ones(total, total, dtype=torch.bool) if mask is None else mask
    at = torch.arange(size.length).repeat(layout.streams)[None]

    def step(number: int) -> None:
        masked = torch.rand(x0.shape) < 0.5
        xt = x0.masked_fill(masked, size.vocabulary)
        ids = torch.cat([xt, x0], dim=1) if block else xt
        output = network(ids, attention_mask=mask[None, None], position_ids=at, use_cache=False)
        logits = output.logits[:, : size.length][masked]
        functional.cross_entropy(logits.float(), x0[masked]).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def training(size: Size, block: int | None, repeats: int, seed: int) -> dict[str, object]:
    """Medians of steps that take turns, and their ratios to our network's."""
    spec = MASKED | {"block_size": block}
    own = {"mlp": "swiglu", "norm": "rmsnorm", "dropout": 0.0}
    torch.manual_seed(seed)
    steps = {
        "own": build_step(size, "fp32", seed, spec, **own),
        "backbone": build_step(
            size, "fp32", seed, spec, denoiser=TransformersDenoiser(llama_config(size))
        ),
        "dense": dense_step(size, block, seed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1 + repeats):
        for name, step in steps.items():
            seconds[name].append(timed(lambda step=step, number=number: step(number)))
    medians = {name: statistics.median(spent[1:]) for name, spent in seconds.items()}
    ratios = {name: round(spent / medians["own"], 3) for name, spent in medians.items()}
    rounded = {name: round(spent, 3) for name, spent in medians.items()}
    return {"block": block, "seconds": rounded, "ratio_to_own": ratios}


def sampling(size: Size, block: int, rows: int, repeats: int) -> dict[str, object]:
    """Tokens per CPU-second of block sampling with a cache, by network."""
    torch.manual_seed(0)
    mask = size.vocabulary
    config = TextDiffusionConfig(
        vocab_size=mask + 1,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.length,
        mask_token_id=mask,
        mlp="swiglu",
        norm="rmsnorm",
    )
    networks: dict[str, Denoiser] = {
        "own": TextDiffusionModel(config).eval(),
        "backbone": TransformersDenoiser(llama_config(size)).eval(),
    }
    family = build_family(MASKED | {"block_size": block}, Vocabulary.of(mask + 1, mask))
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for repeat in range(1 + repeats):
        for name, network in networks.items():
            _, times = walk(network, family, rows, size.length, True, repeat)
            seconds[name].append(times[-1] - times[0])
    tokens = rows * size.length
    rates = {name: tokens / statistics.median(spent[1:]) for name, spent in seconds.items()}
    return {
        "block": block,
        "rows": rows,
        "tokens_per_cpu_second": {name: round(rate, 1) for name, rate in rates.items()},
        "time_ratio_to_own": round(rates["own"] / rates["backbone"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: results/backbone_speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = SIZES[arguments.size]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": arguments.seed,
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "load_average_at_start": os.getloadavg(),
        "size": arguments.size,
        "training": [
            training(size, block, arguments.repeats, arguments.seed)
            for block in (arguments.block, None)
        ],
        "sampling": [
            sampling(size, arguments.block, rows, max(1, arguments.repeats // 2)) for rows in (1, 4)
        ],
    }
    print(json.dumps(result, indent=2))
    output = arguments.output or Path(__file__).parent / "results/backbone_speed.json"
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
