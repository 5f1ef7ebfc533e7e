"""Puzzles: small models learn Countdown or Sudoku, and several decoding rules write the answers.

    python evals/puzzles.py write sudoku [--train 100000] [--seed 0]
    textdiff train evals/puzzles.yaml
    python evals/puzzles.py score sudoku runs/sudoku/export --output puzzles.json

    python evals/puzzles.py write countdown
    textdiff train evals/puzzles.yaml --run.dir runs/countdown --data.sequence_length 62 \
        --data.sources '[{source: countdown_train.jsonl}]' --sample.max_new_tokens 23 \
        --train.steps 1200
    python evals/puzzles.py score countdown runs/countdown/export --output puzzles.json

The test problems are those of the tasks `sudoku` and `countdown_3` of `textdiff evaluate`, read
from `TEXTDIFF_DATA`; none of them is in the training file. Every 4x4 Sudoku has one of 288 full
grids: 32 of them are in no training row, and their test problems are counted separately. Countdown
is drawn with the nine targets of the test. Answers are right if the task's checker accepts them.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

TASKS = {"countdown": "countdown_3", "sudoku": "sudoku"}
ROOM = {"countdown": 23, "sudoku": 24}  # tokens of the longest answer, its end included
CLUES, HELD_GRIDS = range(4, 13), 32
ONE_EACH = 24  # steps that suffice for one token per call
LOW_ENTROPY = {"rule": "confidence", "knobs": {"order": "entropy"}}
LEFT_TO_RIGHT = {"rule": "confidence", "knobs": {"order": "position"}}
LOOSE_BOUND = {"rule": "entropy_bound", "knobs": {"entropy_bound": 1.0}}
SETTINGS: list[dict[str, Any]] = [
    {"rule": "first_hitting", "temperature": 0.0},  # random order, one token per call
    {"rule": "first_hitting", "temperature": 1.0},
    {"rule": "ancestral", "temperature": 0.0, "steps": 32},
    {"rule": "ancestral", "temperature": 1.0, "steps": 32},
    {"rule": "ancestral", "temperature": 0.0, "steps": 8},
    {"rule": "confidence", "temperature": 0.0, "steps": ONE_EACH},
    {"rule": "confidence", "temperature": 1.0, "steps": ONE_EACH},
    {"rule": "confidence", "temperature": 0.0, "steps": 8},
    {**LOW_ENTROPY, "temperature": 0.0, "steps": ONE_EACH},
    {**LEFT_TO_RIGHT, "temperature": 0.0, "steps": ONE_EACH},
    {"rule": "entropy_bound", "temperature": 0.0, "steps": ONE_EACH},
    {"rule": "entropy_bound", "temperature": 1.0, "steps": ONE_EACH},
    {**LOOSE_BOUND, "temperature": 0.0, "steps": ONE_EACH},
]


def data_folder() -> Path:
    """Return the folder of the test problems."""
    if "TEXTDIFF_DATA" not in os.environ:
        raise SystemExit("name the folder that holds dream-planning/ in TEXTDIFF_DATA")
    return Path(os.environ["TEXTDIFF_DATA"]) / "dream-planning"


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- Countdown ------------------------------------------------------------------------------------


def results(a: int, b: int) -> Iterator[tuple[str, int]]:
    """Yield the equations of two numbers whose result is whole and not negative."""
    high, low = max(a, b), min(a, b)
    for sign, left, right, value in (
        ("+", a, b, a + b),
        ("-", high, low, high - low),
        ("*", a, b, a * b),
        *([("/", high, low, high // low)] if low and high % low == 0 else []),
    ):
        yield f"{left}{sign}{right}={value}", value


def ways(numbers: Sequence[int], before: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    """Yield each way to use all numbers once, and its result."""
    if len(numbers) == 1:
        yield ",".join(before), numbers[0]
    for i, j in combinations(range(len(numbers)), 2):
        others = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for equation, value in results(numbers[i], numbers[j]):
            yield from ways([*others, value], (*before, equation))


def countdown_rows(count: int, draw: random.Random) -> Iterator[dict[str, str]]:
    """Yield training problems of Countdown with one of their solutions each."""
    tests = [row["input"].split(",") for row in rows_of(data_folder() / "cd3_test.jsonl")]
    seen = {(tuple(sorted(map(int, test[:-1]))), int(test[-1])) for test in tests}
    targets = sorted({target for _, target in seen})
    while count:
        numbers, target = [draw.randint(1, 99) for _ in range(3)], draw.choice(targets)
        solutions = [text for text, value in ways(numbers) if value == target]
        if solutions and (tuple(sorted(numbers)), target) not in seen:
            listed = ",".join(map(str, numbers))
            prompt = f"Numbers: {listed}\nTarget: {target}\nEquations:"
            yield {"prompt": prompt, "completion": f" {draw.choice(solutions)}"}
            count -= 1


# --- Sudoku ---------------------------------------------------------------------------------------


def grids() -> list[str]:
    """Return the 288 full grids of 4 x 4, as 16 digits."""
    lines = ["".join(line) for line in permutations("1234")]
    units = [[*range(i, 16, 4)] for i in range(4)]  # columns; then boxes
    units += [[i + j + k for j in (0, 1) for k in (0, 4)] for i in (0, 2, 8, 10)]
    full = ("".join(rows) for rows in product(lines, repeat=4))
    return [grid for grid in full if all(len({grid[i] for i in unit}) == 4 for unit in units)]


def held_grids(seed: int) -> set[str]:
    """Return the grids that no training row has."""
    return set(random.Random(seed).sample(grids(), HELD_GRIDS))


def in_lines(grid: str) -> str:
    """Return 16 digits as four lines."""
    return "\n".join(grid[i : i + 4] for i in range(0, 16, 4))


def sudoku_rows(count: int, draw: random.Random, held: set[str]) -> Iterator[dict[str, str]]:
    """Yield training problems of Sudoku that have one solution."""
    everything = grids()
    paths = [data_folder() / f"sudoku_4x4_{clues}.jsonl" for clues in CLUES]
    seen = {row["input"] for path in paths for row in rows_of(path)}
    known = [grid for grid in everything if grid not in held]
    for row in range(count):
        clues, puzzle = CLUES[row % len(CLUES)], ""
        while not puzzle or puzzle in seen:
            answer, shown = draw.choice(known), draw.sample(range(16), clues)
            if sum(all(grid[i] == answer[i] for i in shown) for grid in everything) == 1:
                puzzle = in_lines("".join(answer[i] if i in shown else "0" for i in range(16)))
        prompt = f"Sudoku:\n{puzzle}\nSolution:"
        yield {"prompt": prompt, "completion": f"\n{in_lines(answer)}"}


# --- commands -------------------------------------------------------------------------------------


def write(arguments: argparse.Namespace) -> None:
    """Write the training problems of a task."""
    draw, seed = random.Random(arguments.seed), arguments.seed
    rows = (
        countdown_rows(arguments.train, draw)
        if arguments.puzzle == "countdown"
        else sudoku_rows(arguments.train, draw, held_grids(seed))
    )
    path = Path(f"{arguments.puzzle}_train.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {arguments.train:,} problems")


def share(right: Sequence[float]) -> dict[str, Any]:
    """Return the share of right answers with Wilson's 95 % interval."""
    from textdiff.evaluate.exam.decisions import wilson

    solved = sum(right) / len(right)
    interval = [round(end, 4) for end in wilson(solved, len(right))]
    return {"problems": len(right), "solved": round(solved, 4), "interval_95": interval}


def difference(right: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Return the paired difference of two shares with its normal 95 % interval."""
    away = [a - b for a, b in zip(right, baseline, strict=True)]
    mean = sum(away) / len(away)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in away) / (len(away) - 1))
    reach = 1.96 * deviation / math.sqrt(len(away))
    interval = [round(mean - reach, 4), round(mean + reach, 4)]
    return {"difference": round(mean, 4), "interval_95": interval}


def flags(setting: dict[str, Any], room: int) -> str:
    """Return a setting as flags of `textdiff evaluate`."""
    knobs = " ".join(f"{name}={value}" for name, value in setting.get("knobs", {}).items())
    plain = [f"--{name} {value}" for name, value in setting.items() if name != "knobs"]
    return " ".join([*plain, *([f"--knobs {knobs}"] if knobs else []), f"--max-new-tokens {room}"])


def score(arguments: argparse.Namespace) -> None:
    """Let every rule write the answers, and compare the shares of right ones."""
    import torch

    from textdiff import TextDiffusion

    torch.set_num_threads(1)
    model, puzzle = TextDiffusion.from_pretrained(arguments.model), arguments.puzzle
    settings = [SETTINGS[i] for i in arguments.settings or range(len(SETTINGS))]
    rows: list[dict[str, Any]] = []
    baseline: dict[float, list[float]] = {}  # by temperature
    for setting in settings:
        begin = time.process_time()
        record, right = answered(model, puzzle, setting, arguments)
        first = baseline.setdefault(setting["temperature"], right)
        rows.append({**record, "cpu_seconds": round(time.process_time() - begin, 1)})
        rows[-1]["over_random_order"] = difference(right, first)
        low, high = rows[-1]["interval_95"]
        print(
            f"{rows[-1]['flags']}: {record['solved']:.3f} ({low:.3f} to {high:.3f}), "
            f"{record['calls_per_answer']:.1f} calls",
            flush=True,
        )
    if arguments.output:
        keep(arguments, model, rows)


def answered(
    model: Any, puzzle: str, setting: dict[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[float]]:
    """Return the record of one setting, and for every problem 1.0 if its answer is right."""
    from textdiff.evaluate.exam.answer_bounds import Effort
    from textdiff.evaluate.exam.running import Exam

    exam = Exam(
        [TASKS[puzzle]],
        Effort(seed=arguments.seed),
        {**setting, "max_new_tokens": ROOM[puzzle]},
        limit=arguments.limit,
        fewshot=0,
        batch_size=128,
        data_folder=os.environ.get("TEXTDIFF_DATA"),
    )
    result = exam.run(model)
    assert result is not None
    samples = sorted(result.results["samples"][TASKS[puzzle]], key=lambda row: row["doc_id"])
    right = [row["acc"] for row in samples]
    record = {"flags": flags(setting, ROOM[puzzle]), **share(right)}
    record["calls_per_answer"] = round(result.counts()["calls_per_written"], 2)
    if puzzle == "sudoku":
        held = held_grids(arguments.data_seed)
        new = ["".join(row["doc"]["answer"].split()) in held for row in samples]
        record["unseen_grids"] = share([x for x, is_new in zip(right, new, strict=True) if is_new])
    return record, right


def keep(arguments: argparse.Namespace, model: Any, rows: list[dict[str, Any]]) -> None:
    """Add a model's rows to the file of results; rows of its label are replaced."""
    import torch
    from speed import cpu_model

    path: Path = arguments.output
    limit = f" --limit {arguments.limit}" if arguments.limit else ""
    numbers = " ".join(map(str, arguments.settings or ()))
    only = f" --settings {numbers}" if numbers else ""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    label = arguments.label or Path(arguments.model).parent.name
    record[label] = {
        "made": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "seed": arguments.seed,
        "train": arguments.trained,
        "parameters": sum(weights.numel() for weights in model.model.parameters()),
        "limit": arguments.limit,
        "score": f"python evals/puzzles.py score {arguments.puzzle} {arguments.model} "
        f"--seed {arguments.seed}{limit}{only}",
        "row": f"textdiff evaluate {arguments.model} --tasks {TASKS[arguments.puzzle]} "
        f"--fewshot 0 --seed {arguments.seed}{limit} FLAGS",
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(arguments: argparse.Namespace) -> None:
    """Print the shares of several models as rows of a table; the first has all settings."""
    record = json.loads(arguments.results.read_text(encoding="utf-8"))
    models = [{row["flags"]: row for row in record[name]["rows"]} for name in arguments.labels]
    for setting, first in models[0].items():
        rows = [model.get(setting) for model in models]
        print(
            f"| `{setting.rpartition(' --max-new')[0]}` | {first['calls_per_answer']:.1f} |", end=""
        )
        print("".join(f" {percent(row)} |" for row in rows))


def percent(row: dict[str, Any] | None) -> str:
    """Return the share of right answers with its interval in percent."""
    if row is None:
        return "-"
    solved, low, high = (100.0 * share for share in (row["solved"], *row["interval_95"]))
    return f"{solved:.0f} ({low:.0f} to {high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    writer = verbs.add_parser("write", help="write the training problems")
    writer.add_argument("puzzle", choices=TASKS)
    writer.add_argument("--train", type=int, default=100_000)
    writer.add_argument("--seed", type=int, default=0)
    writer.set_defaults(run=write)
    scorer = verbs.add_parser("score", help="measure a model under every rule")
    scorer.add_argument("puzzle", choices=TASKS)
    scorer.add_argument("model", help="export or run directory")
    scorer.add_argument("--seed", type=int, default=0)
    scorer.add_argument("--data-seed", type=int, default=0, help="that of `write`")
    scorer.add_argument("--limit", type=int, help="problems; all by default")
    scorer.add_argument("--settings", type=int, nargs="*", help="numbers of some settings")
    scorer.add_argument("--label", help="name in the file of results")
    scorer.add_argument("--trained", help="the command of training, and what it cost")
    scorer.add_argument("--output", type=Path)
    scorer.set_defaults(run=score)
    printer = verbs.add_parser("table", help="print shares of models side by side")
    printer.add_argument("results", type=Path)
    printer.add_argument("labels", nargs="+")
    printer.set_defaults(run=table)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
