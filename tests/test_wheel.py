"""The built wheel, installed (not editable) in a clean environment, trains and generates."""

import sys
from pathlib import Path

import pytest
from children import finished


def run(words: list, cwd: Path) -> str:
    done = finished(words, cwd=cwd, seconds=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_wheel_in_a_clean_environment(root, tmp_path):
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, root], tmp_path)
    (wheel,) = tmp_path.glob("textdiff-*.whl")
    run([sys.executable, "-m", "venv", tmp_path / "venv"], tmp_path)
    binaries = tmp_path / "venv" / "bin"
    run([binaries / "python", "-m", "pip", "install", "-q", wheel], tmp_path)
    where = run([binaries / "python", "-c", "import textdiff; print(textdiff.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    assert "usage: textdiff" in run([binaries / "textdiff", "--help"], tmp_path)
    (tmp_path / "c.yaml").write_text(
        "data: {sequence_length: 32}\ntokenizer: {kind: byte}\n"
        "model: {hidden_size: 32, num_layers: 2, num_heads: 2}\n"
        "train: {steps: 20, mixed_precision: fp32}\n"
        "evaluate: {max_documents: 1}\nsample: {steps: 4, max_new_tokens: 16}\n"
    )
    shown = run([binaries / "textdiff", "train", "c.yaml", "--run.dir", "run"], tmp_path)
    assert "perplexity ≤" in shown
    shown = run([binaries / "textdiff", "generate", "run/export", "To ", "--steps", "4"], tmp_path)
    assert shown.startswith("To ")
