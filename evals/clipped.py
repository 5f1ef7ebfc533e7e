"""Variance of training draws under ranges of mask rates, for block models of characters.

    TEXTDIFF_DATA=... python evals/clipped.py RUN_OF_BD3LM_4 RUN_OF_BD3LM_16

The runs are those of `evals/learning.py --rows bd3lm-4 bd3lm-16 --keep FOLDER`. For every range
(all rates, those published for blocks of 4, 16 and 128, and the one that the variance search finds
for this network) the same rows are drawn, 16 at a time as in training: the variance of a block's
loss, of a batch's loss, and of a batch's gradient (its trace over all parameters), with the bound's
own weights. A gradient's variance is also given relative to its squared mean, because optimisers
divide the scale out.
"""

import argparse
import json
import math
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from textdiff import TextDiffusion
from textdiff.config.reading import load
from textdiff.data.corpus import prepare_corpus
from textdiff.diffusion.noise import ALL_RATES, Rates
from textdiff.loss import Batch, DenoisingLoss, PositionTerms, corrupt
from textdiff.train.batches import TrainingBatches
from textdiff.train.ranges import search_range

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED: tuple[Rates, ...] = ((0.45, 0.95), (0.3, 0.8), (0.0, 0.5))
ROWS = 16  # of a training batch
FIRST_STEP = 1000  # where the runs ended


def training_batches(model: TextDiffusion, draw: str, corpus: Path, cache: str) -> TrainingBatches:
    """The rows that the run would have read next."""
    flags = [
        f"--data.sources.0.source={corpus}",
        f"--data.cache-dir={cache}",
        f"--diffusion.block-size={model.family.block_size}",
        f"--diffusion.noise.draw={draw}",
        "--diffusion.objective.loss-weight=elbo",
    ]
    config = load(ROOT / "configs/bd3lm-char.yaml", [*flags, "--diffusion.noise.range=[0.0,1.0]"])
    prepared = prepare_corpus(config.data, config.tokenizer, config.run.seed)
    if prepared.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        sys.exit("the run was trained on another text")
    return TrainingBatches(prepared.train, model.family.on_cpu, config)


def gradients(model: TextDiffusion, batches: TrainingBatches, rates: Rates, count: int) -> dict:
    """Variances over `count` training batches."""
    network = model.model
    loss, parameters = DenoisingLoss(network, model.family), list(network.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    squares, losses, blocks = [], [], []
    for step in range(FIRST_STEP, FIRST_STEP + count):
        batch = drawn(batches, step, rates)
        value, _ = loss(batch)
        value = value / batch.x0.numel()
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        gradient = torch.cat(
            [
                torch.zeros(p.numel()) if g is None else g.flatten()
                for p, g in zip(parameters, found, strict=True)
            ]
        ).double()
        total += gradient
        squares.append(float(gradient.square().sum()))
        losses.append(value.item())
        blocks.append(block_losses(model, batches, batch))
    norms = torch.tensor(squares, dtype=torch.float64)
    mean = float((total / count).square().sum())
    trace = (float(norms.mean()) - mean) * count / (count - 1)
    signal = mean - trace / count  # the squared norm of the mean, without its own noise
    flat = torch.cat(blocks)
    return {
        "block_loss_variance": float(flat.var()),
        "batch_loss_variance": float(torch.tensor(losses, dtype=torch.float64).var()),
        "gradient_variance": trace,
        "gradient_variance_stderr": float(norms.std()) / math.sqrt(count),
        "gradient_variance_relative": trace / signal,
        "loss": sum(losses) / count,
    }


def drawn(batches: TrainingBatches, step: int, rates: Rates) -> Batch:
    """The batch of a step, its noise in a range."""
    samples = step * ROWS + torch.arange(ROWS)
    x0, ids = batches.rows(samples)
    v = batches.levels(step, ROWS, batches.family.blocks(x0.shape[1]))
    noise = batches.noise(batches.family, samples, v, rates=rates)
    return corrupt(batches.family, x0, noise, ids)


@torch.no_grad()
def block_losses(model: TextDiffusion, batches: TrainingBatches, batch: Batch) -> Tensor:
    """[ROWS * blocks] nats per token of each block."""
    terms = PositionTerms(model.model, model.family, batch).all()
    nats = torch.zeros(batch.x0.numel(), dtype=torch.float64).index_add(0, batch.positions, terms)
    blocks = batches.family.blocks(batch.x0.shape[1])
    return blocks.split(nats.view_as(batch.x0), 0.0).mean(-1).flatten()


def measure(run: str, draw: str, corpus: Path, cache: str, count: int) -> dict:
    """One network and way of drawing."""
    model = TextDiffusion.from_pretrained(run, device="cpu")
    batches = training_batches(model, draw, corpus, cache)
    found = search_range(model.model, model.family, batches, FIRST_STEP)
    ranges = dict.fromkeys((ALL_RATES, found.range, *PUBLISHED))
    rows = [
        {"range": list(rates), "searched": rates == found.range}
        | gradients(model, batches, rates, count)
        for rates in ranges
    ]
    for row in rows:
        print(
            f"block {model.family.block_size:3} {draw:5} {row['range']}: gradient variance "
            f"{row['gradient_variance']:.4f} (relative {row['gradient_variance_relative']:.1f}), "
            f"block loss {row['block_loss_variance']:.4f}"
            + (" <- searched" if row["searched"] else "")
        )
    return {"block_size": model.family.block_size, "draw": draw, "batches": count, "ranges": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="runs of block models, trained by learning.py")
    parser.add_argument("--draws", nargs="+", choices=["count", "time"], default=["count", "time"])
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--cache", default=None, help="token cache")
    parser.add_argument("--output", type=Path, default=ROOT / "evals/results/clipped.json")
    arguments = parser.parse_args()
    folder = os.environ.get("TEXTDIFF_DATA")
    if not folder:
        sys.exit("set TEXTDIFF_DATA to a folder that holds tinyshakespeare/input.txt")
    corpus = Path(folder) / "tinyshakespeare" / "input.txt"
    cache = arguments.cache or "null"
    results = (
        json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else []
    )
    for run in arguments.runs:
        for draw in arguments.draws:
            found = measure(run, draw, corpus, cache, arguments.batches)
            key = (found["block_size"], draw)
            results = [r for r in results if (r["block_size"], r["draw"]) != key] + [found]
    results.sort(key=lambda r: (r["block_size"], r["draw"]))
    record = {
        "what": "variance of training draws under ranges of mask rates, tinyshakespeare characters",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "results": results,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
