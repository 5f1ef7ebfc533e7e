"""Gain of an approximate cache of a full-sequence model, and how far it moves predictions.

    textdiff train configs/quickstart.yaml
    python evals/approximate_cache.py runs/quickstart runs/quickstart/validation.jsonl

A row as long as the context begins with the first tokens of a chunk of TEXT, which the model has
not seen. The model writes the rest, one token per network call (`first_hitting`). Measured are
tokens per CPU-second, one thread, the median. Then the distributions of every token that is still
masked halfway are compared on the canvases of exact sampling. The figure is the mean total
variation between the cached and the exact distribution. For scale, it is also given for the exact
distribution at the beginning, which is conditional on the prompt alone.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from speed import cpu_model
from torch import Tensor

from textdiff.data.encode import encode_documents
from textdiff.data.text_files import read_texts
from textdiff.export.records import model_record, training_record
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.cached import ApproximatePredictor
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.predictor import PlainPredictor, Predictor
from textdiff.sampling.request import Request
from textdiff.sampling.settings import SamplingConfig
from textdiff.sampling.step import Step

RULE = "first_hitting"


def walk(held: TextDiffusion, prompts: list[list[int]], seed: int, cache: str) -> list[Step]:
    """The steps that fill rows up to the context."""
    new = [held.model.context - len(prompt) for prompt in prompts]
    job = Job(prompts, new, seed=seed)
    config = SamplingConfig(rule=RULE, steps=1, cache=cache)
    return list(Engine(held.model, held.family, Request(job, config)).run())


def rates(held: TextDiffusion, prompt: list[int], repeats: int, seed: int) -> dict[str, object]:
    """Tokens per CPU-second without and with the cache, turn by turn."""
    new = held.model.context - len(prompt)
    seconds: dict[str, list[float]] = {"off": [], "approximate": []}
    for repeat in range(-1, repeats):  # the first is not counted
        for cache, spent in seconds.items():
            start = time.process_time()
            walk(held, [prompt], seed + max(0, repeat), cache)
            if repeat >= 0:
                spent.append(time.process_time() - start)
    exact, kept = (round(new / statistics.median(spent), 1) for spent in seconds.values())
    every = [[round(new / s, 1) for s in spent] for spent in seconds.values()]
    return {
        "exact": exact,
        "approximate": kept,
        "times": round(kept / exact, 2),
        "exact_all": every[0],
        "approximate_all": every[1],
    }


@torch.no_grad()
def variation(held: TextDiffusion, prompts: list[list[int]], seed: int) -> dict[str, float]:
    """Mean total variation at masked positions, with its standard error over rows."""
    mask, context = held.family.process.mask_token_id, held.model.context
    given = len(prompts[0])
    steps = walk(held, prompts, seed, "off")
    halfway = steps[(context - given) // 2 - 1].canvas  # every step reveals a token of every row
    masked = halfway == mask
    start = halfway.clone()
    start[:, given:] = mask
    widths = torch.full((len(prompts),), context)
    frozen = (start != mask).cpu()
    plain = PlainPredictor(held.model, held.family)
    kept = ApproximatePredictor(held.model, held.family, len(prompts), context)
    for predictor in (plain, kept):
        predictor.enter(start, 0 * widths, widths, frozen)
    positions = masked.flatten().nonzero().squeeze(1).cpu()
    t = torch.full((len(prompts),), 0.5, dtype=torch.float64)

    def distribution(predictor: Predictor, canvas: Tensor, t: Tensor) -> Tensor:
        return predictor(canvas, t, positions).log_x0.double().exp()

    before = distribution(kept, start, 2 * t)  # exact, and stores
    exact = distribution(plain, halfway, t)
    rows = positions // context
    found: dict[str, float] = {"positions": len(positions)}
    for name, other in (("cached", distribution(kept, halfway, t)), ("first_call", before)):
        distance = (exact - other).abs().sum(-1).cpu() / 2
        each = torch.stack([distance[rows == row].mean() for row in range(len(prompts))])
        found[name] = round(float(distance.mean()), 4)
        found[f"{name}_stderr"] = round(float(each.std() / len(each) ** 0.5), 4)
    return found


def main() -> None:
    """Measures, prints and writes `results/approximate_cache.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--given", type=float, nargs="+", default=[0.5, 0.875])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    folder = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=folder / "approximate_cache.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    held = TextDiffusion.from_pretrained(asked.model, device="cpu")
    context = held.model.context
    documents = encode_documents(held.tokenizer, read_texts([asked.text]))
    ids = [token for document in documents for token in document.tolist()]
    rows = []
    for share in asked.given:
        given = int(share * context)
        prompts = [ids[i * context : i * context + given] for i in range(asked.rows)]
        row = {
            "given": given,
            "new": context - given,
            "tokens_per_cpu_second": rates(held, prompts[0], asked.repeats, asked.seed),
            "total_variation": variation(held, prompts, asked.seed),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    assert held.folder is not None
    trained = training_record(held.folder)
    made = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "textdiff train configs/quickstart.yaml; OMP_NUM_THREADS=1 python "
        "evals/approximate_cache.py runs/quickstart runs/quickstart/validation.jsonl",
        "seed": asked.seed,
        "rows": asked.rows,
        "rule": RULE,
        "context": context,
        "model": {
            **model_record(held.folder),
            **{key: trained.get(key) for key in ("step", "tokens", "parameters", "seed")},
        },
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
    }
    asked.output.write_text(json.dumps({"rows": rows, "made": made}, indent=2) + "\n")


if __name__ == "__main__":
    main()
