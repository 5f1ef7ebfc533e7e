"""The examples of the pages about generation are run as they stand, on a model without training."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from textdiff.cli import main
from textdiff.config.reading import load
from textdiff.pipeline import TextDiffusion

PAGES = ("sampling", "control", "watching")


def examples(root: Path, page: str, language: str) -> list[str]:
    text = (root / "docs" / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.+?)^```", text, flags=re.S | re.M)


@pytest.fixture
def folder(exports, tmp_path, monkeypatch) -> Path:
    """A folder to run in: the export that the examples name, and files that they read."""
    monkeypatch.chdir(tmp_path)
    model = TextDiffusion.from_pretrained(exports / "d", "cpu")
    model.defaults = model.defaults.merge(max_new_tokens=8, steps=4)
    model.save_pretrained(tmp_path / "runs" / "quickstart" / "export")
    Path("letter.txt").write_text("Dear [MASK:3],\n[MASK:2]\n")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, root, folder, capsys):
    commands = [
        shlex.split(line)
        for block in examples(root, page, "bash")
        for line in block.splitlines()
        if line.startswith("textdiff generate")
    ]
    assert commands
    if page == "watching":
        (lines,) = (block for block in examples(root, page, "json") if '"line"' in block)
        Path("prompts.jsonl").write_text(lines.splitlines()[0] + "\n")
    for words in commands:
        assert main(["runs/quickstart" if w == "MODEL" else w for w in words[1:]]) == 0, words
    assert capsys.readouterr().out
    if page == "watching":  # keys come back, and those of the page are there
        shown, found = lines.splitlines()[1], Path("out.jsonl").read_text().splitlines()
        assert len(found) == 2
        for line in found:
            assert re.findall(r'"(\w+)":', line) == re.findall(r'"(\w+)":', shown)


@pytest.mark.parametrize("page", ["control", "watching"])
def test_python_examples_run(page, root, folder, capsys):
    blocks = examples(root, page, "python")
    assert blocks
    digits = torch.tensor([48 <= token < 58 for token in range(259)])
    known = {
        "model": TextDiffusion.from_pretrained("runs/quickstart/export", "cpu"),
        "is_digit": digits,
    }
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), known)
    if page == "watching":  # a line for every call, and the text
        out = capsys.readouterr().out
        assert re.match(r"(\d+ tensor\(.*\)\n)+The iterator", out)


def test_the_classifier_shown_moves_texts_towards_its_class(root, folder):
    model = TextDiffusion.from_pretrained("runs/quickstart/export", "cpu")
    known = {"model": model}
    (block,) = (b for b in examples(root, "control", "python") if "def toward(" in b)
    exec(compile(block, "docs/control.md", "exec"), known)
    odds = known["odds"]
    assert odds[ord("m")] > odds[ord("f")]
    means = []
    for hook in (
        known["toward"](-odds, 10.0),
        known["toward"](odds, 0.0),
        known["toward"](odds, 10.0),
    ):
        options = {"hooks": [hook], "num_samples": 64, "batch_size": 64}
        done = model.generate("The", min_new_tokens=8, **options)
        ids = torch.tensor(done.sequences)[:, -8:]
        means.append(float(odds[ids].sum(1).mean()))
    assert means[0] + 0.5 < means[1] < means[2] - 0.5, means


def test_the_training_example_is_a_config_that_hides_prompts(root):
    (words,) = (
        shlex.split(block)
        for block in examples(root, "control", "bash")
        if block.startswith("textdiff train CONFIG")
    )
    config = load(root / "configs" / "quickstart.yaml", words[3:])
    assert (config.diffusion.noise.prompts, config.diffusion.noise.prompt_dropout) == (0.5, 0.1)


def test_the_frontier_shown_is_the_one_measured(root):
    result = json.loads((root / "evals" / "results" / "frontier.json").read_text())
    text = (root / "docs" / "sampling.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| `")]
    for point in result["points"]:
        figures, excess = point["figures"], point["excess"]
        said = [
            f"| `{point['sampling']['rule']}",
            f"| {point['sampling']['temperature']} | {point['tokens_per_call']:.2f} |",
            f"| {figures['gen_ppl']['value']:.0f} (",
            f"| {figures['entropy']['value']:.2f} (",
            "| baseline |" if point["baseline"] else "| -",
        ]
        if excess and excess["value"] is not None:
            said[-1] = f"| {excess['value']:.2f} ("
        assert any(all(part in line for part in said) for line in table), said


def test_the_puzzles_shown_are_those_measured(root):
    result = json.loads((root / "evals" / "results" / "puzzles.json").read_text())
    text = (root / "docs" / "sampling.md").read_text()
    for model in result.values():
        for row in model["rows"]:
            start = f"| `{row['flags'].rpartition(' --max-new')[0]}` |"
            shares = [100.0 * share for share in (row["solved"], *row["interval_95"])]
            cell = "| {:.0f} ({:.0f} to {:.0f}) |".format(*shares)
            lines = [line for line in text.splitlines() if line.startswith(start)]
            assert any(cell in line for line in lines), (start, cell)
