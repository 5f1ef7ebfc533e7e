"""Stories gone on with a given word, by adapters and by training all weights.

    TEXTDIFF_DATA=... python evals/instruct_stories.py [--steps 250] [--corpus DIR]

stories260K itself writes 4,000 beginnings of stories of 127 tokens (`sampled_corpus.py`). A
question is a word and the first two sentences; its answer are the other whole sentences. The word
is one of the answer's that 1 to 15 % of the answers have. The model is adapted to blocks of 4 first
(`adapt-stories.yaml`, on the same texts as they are; the held-out ones left out). From there every
row trains on questions and answers (`instruct-stories.yaml`).

Reported are the bound on held-out answers in nats per token, and the share of written answers that
have the word. Beside it stands the share that have the word of the next question: chance.
`adapted` is the model before it has seen a question.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORIES, ASKED, TOKENS = 4000, 200, 112
RARE, COMMON = 0.01, 0.15  # shares of the answers that a word may be in
ROWS: dict[str, dict[str, str]] = {
    "full": {},
    "lora": {"train.lora.rank": "8", "train.lora.alpha": "16", "train.learning-rate": "0.01"},
}


def words_of(story: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", story.lower()))


def sentences(story: str) -> list[str]:
    """Returns the whole sentences of a text."""
    return re.findall(r"[^.!?]+[.!?]+[\"']?", " ".join(story.split()))


def write_questions(stories: list[str], train: Path, held_out: Path) -> None:
    """Writes question/answer rows; the last `ASKED` stories are held out."""
    parts = [("".join(s[:2]), "".join(s[2:]).strip()) for s in map(sentences, stories)]
    counts = Counter(word for _, answer in parts for word in words_of(answer))
    usual = {w for w, n in counts.items() if RARE <= n / len(stories) <= COMMON}
    draw, rows = random.Random(0), []
    for beginning, answer in parts:
        choices = sorted((words_of(answer) - words_of(beginning)) & usual)
        word = draw.choice(choices) if choices else ""
        question = f"Go on with the word {word}. {beginning.strip()}\n"
        rows.append({"question": question, "answer": answer, "word": word})
    for path, part in ((train, rows[:-ASKED]), (held_out, rows[-ASKED:])):
        path.write_text("".join(json.dumps(row) + "\n" for row in part if row["word"]))


def prepare(model: Path, folder: Path) -> None:
    """Writes stories.jsonl, train.jsonl and held_out.jsonl, unless they are there."""
    if (folder / "held_out.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(ROOT / "evals/sampled_corpus.py"), str(model)]
    words += [str(folder / "all.jsonl"), "--texts", str(STORIES)]
    subprocess.run(words, check=True, stdout=sys.stderr)
    lines = (folder / "all.jsonl").read_text().splitlines(keepends=True)
    (folder / "stories.jsonl").write_text("".join(lines[:-ASKED]))
    stories = [json.loads(line)["text"] for line in lines]
    write_questions(stories, folder / "train.jsonl", folder / "held_out.jsonl")


def train(config: str, flags: dict[str, str]) -> float:
    """Trains once; returns the last validation bound in nats per token."""
    words = [sys.executable, "-m", "textdiff", "train", str(ROOT / "evals" / config)]
    words += [f"--{key}={value}" for key, value in flags.items()]
    subprocess.run(words, check=True, stdout=sys.stderr)
    lines = (Path(flags["run.dir"]) / "metrics.jsonl").read_text().splitlines()
    return [x["bound_nats"] for x in map(json.loads, lines) if "bound_nats" in x][-1]


def shares(export: Path, held_out: Path) -> dict[str, float]:
    """Returns the shares of generated stories that have their word, and that of the next."""
    from textdiff import TextDiffusion

    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    questions, words = ([row[key] for row in rows] for key in ("question", "word"))
    model = TextDiffusion.from_pretrained(export)
    texts = model.generate(questions, batch_size=32, max_new_tokens=TOKENS, steps=4).texts
    answers = [words_of(t[len(q.rstrip()) :]) for t, q in zip(texts, questions, strict=True)]
    others = words[1:] + words[:1]
    return {
        "asked": sum(w in a for w, a in zip(words, answers, strict=True)) / len(words),
        "chance": sum(w in a for w, a in zip(others, answers, strict=True)) / len(words),
        "words_per_story": sum(map(len, answers)) / len(answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--corpus", type=Path, help="folder that corpus and first model stay in")
    parser.add_argument("--output", type=Path, default=ROOT / "evals/results/instruct_stories.json")
    arguments = parser.parse_args()
    data = os.environ.get("TEXTDIFF_DATA")
    if not data:
        sys.exit("set TEXTDIFF_DATA to a folder that holds stories260K")
    model, steps = Path(data).resolve() / "stories260K", str(arguments.steps)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.corpus or Path(scratch)).resolve()
        prepare(model, folder)
        common = {"data.cache-dir": str(folder / "cache"), "train.steps": steps}
        common |= {"evaluate.every": steps, "train.checkpoint-every": steps}
        adapted = folder / "adapted"
        if not (adapted / "export").exists():
            flags = {"data.sources.0.source": str(folder / "stories.jsonl")}
            flags |= {"model.path": str(model), "tokenizer.path": str(model)}
            flags |= {"run.dir": str(adapted), "train.init-from": f"hf:{model}"}
            train("adapt-stories.yaml", {**common, **flags})
        export = str(adapted / "export")
        results = {"adapted": shares(Path(export), folder / "held_out.jsonl")}
        for row in arguments.rows:
            flags = {"data.sources.0.source": str(folder / "train.jsonl")}
            flags |= {"model.path": export, "tokenizer.path": export, "train.init-from": export}
            flags |= {"run.dir": f"{scratch}/{row}"}
            bound = train("instruct-stories.yaml", {**common, **flags, **ROWS[row]})
            measured = shares(Path(scratch) / row / "export", folder / "held_out.jsonl")
            results[row] = {"nats_per_token": bound, **measured}
    for row, values in results.items():
        print(f"{row:8}", "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    import torch
    from speed import cpu_model

    record = {
        "what": "bound on held-out answers in nats per token; shares of stories with their word",
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": 0,
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "steps": arguments.steps,
        "model": model.name,
        "rows": results,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
