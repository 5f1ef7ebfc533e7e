"""The README's commands and its Python example, run as written but smaller."""

import re
import shlex
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from textdiff.cli import main

FASTER = [
    "--data.sequence-length=64",
    "--tokenizer.vocab-size=512",
    "--model.hidden-size=32",
    "--model.num-layers=2",
    "--model.num-heads=2",
    "--train.steps=6",
    "--train.global-batch-size=8",
    "--train.micro-batch-size=8",
    "--train.log-every=2",
    "--evaluate.max-documents=2",
    "--sample.steps=4",
    "--sample.max-new-tokens=32",
]


def textdiff(words: list[str], cwd: Path) -> str:
    """What a command prints, in this process: starting another takes longer than most of them."""
    with chdir(cwd), redirect_stdout(StringIO()) as shown:
        assert main(words) == 0
    return shown.getvalue()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, documentation) -> tuple[Path, str]:
    """The first README command, in a folder of its own."""
    root = Path(__file__).resolve().parent.parent
    readme = (root / "README.md").read_text()
    command = re.search(r"^pip install -e \. && textdiff (train \S+)$", readme, re.MULTILINE)
    assert command, "the README no longer holds the quickstart command"
    folder = tmp_path_factory.mktemp("clone")
    (folder / "configs").symlink_to(root / "configs")
    words = shlex.split(command[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textdiff.data.python_docs.python_docs", lambda: documentation)
        return folder, textdiff([*words, f"--data.cache-dir={folder}/cache", *FASTER], folder)


def test_readme_holds_the_test_command(root):
    assert '\npip install -e ".[dev]" && pytest\n' in (root / "README.md").read_text()


def test_quickstart_prints_bound_and_commands_that_work(quickstart):
    folder, shown = quickstart
    assert re.search(r"validation: perplexity ≤ [\d.]+ ± [\d.]+, [\d.]+ ± [\d.]+ bits/byte", shown)
    commands = [line.strip() for line in shown.splitlines() if line.startswith("  textdiff ")]
    assert len(commands) == 3
    for command in commands:
        assert textdiff(shlex.split(command)[1:], folder).strip()


def test_quickstart_records_its_corpus(quickstart):
    import json
    import platform

    folder, _ = quickstart
    record = json.loads((folder / "runs/quickstart/env.json").read_text())
    source = record["corpus"]["sources"][0]
    assert source["source"] == "python-docs"
    assert source["python"] == platform.python_version()
    assert re.fullmatch(r"[0-9a-f]{64}", source["sha256"])
    assert source["characters"] > 1_500_000


def test_python_example(quickstart, root):
    folder, _ = quickstart
    readme = (root / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    with chdir(folder), redirect_stdout(StringIO()) as shown:
        exec(example, {"__name__": "__main__"})
    assert "perplexity <=" in shown.getvalue()
    assert shown.getvalue().startswith("The iterator")


def test_every_path_in_the_readme_exists(root):
    readme = (root / "README.md").read_text()
    for path in re.findall(r"`((?:configs|textdiff|tests|evals)/[\w./-]*)`", readme):
        assert (root / path).exists(), path
