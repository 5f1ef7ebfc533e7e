"""Worked sums: prompts and answers that a small model learns, and the share that it gets right.

    python evals/arithmetic.py write [--digits 2] [--train 3000] [--test 500] [--seed 0]
    textdiff train evals/arithmetic.yaml
    textdiff train evals/arithmetic.yaml --run.dir runs/arithmetic-blocks \
        --diffusion.block_size 8 --sample.steps 8 --train.steps 800
    python evals/arithmetic.py score runs/arithmetic/export [--output arithmetic.json]

A question is `47 + 85 =`, its answer ` 7 and 5 is 12, carry 1. 4 and 8 and 1 is 13. So 132`. No
sum of the test is in the training file, in neither order of its terms. A test answer is right if
the number after `So` is; `exact` counts answers that are right in every character.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

TRAIN, TEST = Path("arithmetic_train.jsonl"), Path("arithmetic_test.jsonl")


def worked(a: int, b: int) -> str:
    """Return the answer to `a + b =`, digit by digit from the right."""
    first, second = (str(n).rjust(len(str(max(a, b))), "0") for n in (a, b))
    steps, carry = [], 0
    for place in reversed(range(len(first))):
        total = int(first[place]) + int(second[place]) + carry
        terms = f"{first[place]} and {second[place]}" + (f" and {carry}" if carry else "")
        carry = total // 10
        steps.append(f"{terms} is {total}" + (", carry 1" if carry and place else ""))
    return " " + ". ".join([*steps, f"So {a + b}"])


def problems(digits: int, count: int, seed: int) -> list[dict[str, str]]:
    """Draw problems of which no two have the same terms."""
    low, high = 10 ** (digits - 1), 10**digits
    everything = (high - low) * (high - low + 1) // 2
    if count > everything:
        raise SystemExit(f"there are only {everything} sums of {digits} digits")
    draw, seen, rows = random.Random(seed), set(), []
    while len(rows) < count:
        a, b = draw.randrange(low, high), draw.randrange(low, high)
        if (terms := (min(a, b), max(a, b))) not in seen:
            seen.add(terms)
            rows += [{"question": f"{a} + {b} =", "answer": worked(a, b)}]
    return rows


def write(arguments: argparse.Namespace) -> None:
    """Write the two files; training has every sum in both orders of its terms."""
    rows = problems(arguments.digits, arguments.train + arguments.test, arguments.seed)
    test, train = rows[: arguments.test], rows[arguments.test :]
    for row in list(train):
        a, b = (int(term) for term in row["question"].removesuffix(" =").split(" + "))
        train += [{"question": f"{b} + {a} =", "answer": worked(b, a)}] if a != b else []
    for path, lines in ((TRAIN, train), (TEST, test)):
        path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        print(f"{path}: {len(lines):,} problems")


def score(arguments: argparse.Namespace) -> None:
    """Generate an answer to every problem of the test and count the right ones."""
    import torch

    from textdiff import TextDiffusion

    torch.set_num_threads(1)
    model = TextDiffusion.from_pretrained(arguments.model)
    rows = [json.loads(line) for line in TEST.read_text(encoding="utf-8").splitlines()]
    rows = rows[: arguments.problems]
    begin = time.process_time()
    drawn = model.generate(
        [row["question"] for row in rows], seed=arguments.seed, batch_size=arguments.batch_size
    )
    pairs = list(zip(rows, drawn.texts, strict=True))
    answers = [text.removeprefix(row["question"]) for row, text in pairs]
    wanted = [row["answer"] for row in rows]
    sums = [[text.partition("So ")[2] for text in texts] for texts in (answers, wanted)]
    record: dict[str, Any] = {
        "command": f"python evals/arithmetic.py score {arguments.model} --seed {arguments.seed}",
        "problems": len(rows),
        "right": sum(map(str.__eq__, *sums)) / len(rows),
        "exact": sum(map(str.__eq__, answers, wanted)) / len(rows),
        "cpu_seconds": round(time.process_time() - begin, 1),
        "network_calls": drawn.calls,
    }
    print(json.dumps(record, indent=1))
    wrong = [text for (row, text) in pairs if text != row["question"] + row["answer"]]
    print(*[f"wrong: {text}" for text in wrong[:5]], sep="\n")
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    writer = verbs.add_parser("write", help="write the problems")
    writer.add_argument("--digits", type=int, default=2)
    writer.add_argument("--train", type=int, default=3000)
    writer.add_argument("--test", type=int, default=500)
    writer.add_argument("--seed", type=int, default=0)
    writer.set_defaults(run=write)
    scorer = verbs.add_parser("score", help="measure a model")
    scorer.add_argument("model", help="export or run directory")
    scorer.add_argument("--problems", type=int, default=500)
    scorer.add_argument("--batch-size", type=int, default=64)
    scorer.add_argument("--seed", type=int, default=0)
    scorer.add_argument("--output", type=Path)
    scorer.set_defaults(run=score)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
