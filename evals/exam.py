"""Exams: accuracies on BLiMP and LAMBADA, how sure they are, and what they cost.

    python evals/exam.py demo --limit blimp=5 lambada=60 --output exam.json
    python evals/exam.py $TEXTDIFF_DATA/stories260K --limit blimp=20 lambada=200 --hf
    python evals/exam.py runs/novels/export --limit blimp_causative=10 lambada=10

`--hf` answers the same questions with the harness's own class for transformers as well, and gives
the largest difference of a log-likelihood. Rows of other models stay in the output file.
"""

import argparse
import json
import os
import platform
import sys
import time
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("DISABLE_MULTIPROC", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def asked(task: str, limit: int, arguments: argparse.Namespace) -> Any:
    """Return the exam of a task."""
    from textdiff.evaluate.exam.answer_bounds import Effort
    from textdiff.evaluate.exam.running import Exam

    effort = Effort(mc=arguments.mc, seed=arguments.seed)
    return Exam([task], effort, limit=limit, data_folder=os.environ["TEXTDIFF_DATA"])


def answered(held: Any, task: str, limit: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one task, and the harness's results."""
    begin = time.process_time()
    with redirect_stdout(sys.stderr):  # the harness prints beside its result
        result = asked(task, limit, arguments).run(held)
    figures = {"task": task, "questions_per_task": limit}
    figures |= {
        name.removesuffix(",none"): value
        for name, value in result.results["results"][task].items()
        if isinstance(value, float) and "stderr" not in name
    }
    if task in (certainties := result.certainties()):
        figures |= certainties[task].to_dict()
    figures |= result.counts() | {"cpu_seconds": round(time.process_time() - begin, 1)}
    return figures | {"results": result.results}


def by_transformers(
    folder: str, task: str, limit: int, arguments: argparse.Namespace, ours: dict[str, Any]
) -> dict[str, Any]:
    """Return how far the harness's class for transformers is from the same answers."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from textdiff.evaluate.exam.running import load_tasks

    begin, exam = time.process_time(), asked(task, limit, arguments)
    manager = exam.task_manager()
    model = HFLM(folder, device="cpu", dtype="float32", batch_size=16)
    theirs = simple_evaluate(
        model,
        tasks=load_tasks(manager, exam.tasks),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
    )
    pairs = [
        (a[0], b[0])
        for name, samples in ours["samples"].items()
        for one, other in zip(samples, theirs["samples"][name], strict=True)
        for a, b in zip(one["resps"], other["resps"], strict=True)
    ]
    key = "acc,none"
    return {
        "hf_log_likelihoods": len(pairs),
        "hf_largest_difference": max(abs(a[0] - b[0]) for a, b in pairs),
        "hf_same_greedy_decisions": sum(a[1] == b[1] for a, b in pairs),
        "hf_acc": theirs["results"][task][key],
        "acc": ours["results"][task][key],
        "hf_cpu_seconds": round(time.process_time() - begin, 1),
    }


def cpu_name() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def sit(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a model on all tasks."""
    import torch

    from textdiff import TextDiffusion
    from textdiff.evaluate.exam.running import require_lm_eval

    require_lm_eval()
    torch.set_num_threads(1)
    held = TextDiffusion.from_pretrained(arguments.model)
    tasks = []
    for each in arguments.limit:
        task, _, limit = each.partition("=")
        figures = answered(held, task, int(limit), arguments)
        results = figures.pop("results")
        if arguments.hf:
            figures |= by_transformers(arguments.model, task, int(limit), arguments, results)
        print(json.dumps(figures), flush=True)
        tasks.append(figures)
    return {
        "model": arguments.label or Path(arguments.model).name,
        "command": " ".join(["python", "evals/exam.py", *sys.argv[1:]]),
        "made": date.today().isoformat(),
        "seed": arguments.seed,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": 1,
        "block_size": held.family.block_size,
        "parameters": sum(p.numel() for p in held.model.parameters()),
        "tasks": tasks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="demo, or an export or checkpoint")
    parser.add_argument("--limit", nargs="+", required=True, help="TASK=QUESTIONS")
    parser.add_argument("--mc", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hf", action="store_true", help="compare with transformers")
    parser.add_argument("--label", help="name of the model in the output")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    row = sit(arguments)
    if arguments.output:
        old = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
        rows = [each for each in old if each["model"] != row["model"]] + [row]
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
