"""`textdiff data prepare | inspect`, and bad data as a user meets it."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import child

from textdiff.cli import main

LINE = "The cat sat on the mat. A dog ran over the hill.\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    rows = [{"text": f"{i}: " + LINE * (1 + i % 7)} for i in range(120)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("\n".join(f"Dört {i} béyaz ★ kuş." for i in range(400)))
    return tmp_path


def words(verb: str, folder: Path, *more: str) -> list[str]:
    root = Path(__file__).resolve().parents[2]
    return [
        *("data", verb, str(root / "configs" / "text-files-bpe.yaml")),
        f"--data.sources.0.source={folder / 'a.jsonl'}",
        f"--data.cache-dir={folder / 'cache'}",
        *("--data.sequence-length=32", "--tokenizer.vocab-size=300", *more),
    ]


def mixed(folder: Path, *weights: object) -> str:
    pairs = zip(("a.jsonl", "b.txt"), weights, strict=True)
    return "--data.sources=" + json.dumps(
        [{"source": str(folder / name), "weight": weight} for name, weight in pairs]
    )


def said(capsys, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(list(arguments))
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    return code, error


def test_prepare_says_where_and_how_much_and_that_it_is_there(folder, capsys):
    assert main(words("prepare", folder)) == 0
    first = capsys.readouterr()
    assert re.search(r"^prepared: 120 documents, [\d,]+ bytes$", first.out, re.M)
    tokens = int(re.search(r"^([\d,]+) training tokens", first.out, re.M)[1].replace(",", ""))
    (place,) = re.findall(r"^(/\S+)  \([\d.]+ MB\)$", first.out, re.M)
    description = json.loads((Path(place) / "description.json").read_text())
    assert description["tokens"] == tokens
    for stage in ("reading", "training the tokenizer", "tokenising"):
        assert re.search(rf"^{stage}: .*done$", first.err, re.M)
    assert "\x1b" not in first.err
    assert main(words("prepare", folder)) == 0
    second = capsys.readouterr()
    assert second.out.startswith("already prepared")
    assert second.err == ""
    assert second.out.splitlines()[1:] == first.out.splitlines()[1:]


def test_inspect_counts_what_is_there(folder, capsys):
    assert main(words("inspect", folder, mixed(folder, 3, 1), "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [json.loads(line)["text"] for line in (folder / "a.jsonl").open()]
    first, second = found["sources"]
    assert first["documents"] == 120
    assert first["bytes"] == sum(len(text.encode()) for text in rows)
    assert second["bytes"] == (folder / "b.txt").stat().st_size
    assert [first["share"], second["share"]] == [0.75, 0.25]
    samples = found["steps"] * found["global_batch_size"]
    assert first["passes"] == pytest.approx(0.75 * samples / first["sequences_per_epoch"])
    text_tokens = second["train_tokens"] - 1
    assert second["bytes_per_token"] == pytest.approx(second["train_bytes"] / text_tokens)
    lengths = found["document_tokens"]
    assert sum(lengths["counts"]) == found["train"]["documents"]
    assert len(lengths["edges"]) == len(lengths["counts"]) + 1
    assert any("".join(texts).startswith("Dört 0 béyaz ★") for texts in found["examples"])
    assert all("\ufffd" not in text for texts in found["examples"] for text in texts)


@pytest.mark.parametrize("width", [80, 100])
def test_inspect_fits_the_terminal(folder, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(words("inspect", folder)) == 0
    shown = capsys.readouterr().out
    bars = [line for line in shown.splitlines() if "█" in line]
    assert len(bars) >= 3
    assert max(map(len, bars)) <= width
    assert max(line.count("█") for line in bars) > width / 2
    assert "│" in shown.splitlines()[-1]


def test_train_uses_what_prepare_made(folder, capsys, monkeypatch):
    small = ["--model.hidden-size=16", "--model.num-layers=1", "--model.num-heads=1"]
    small += ["--train.steps=2", "--train.global-batch-size=4", "--train.micro-batch-size=4"]
    small += ["--evaluate.max-documents=2", "--sample.num-samples=0", f"--run.dir={folder / 'run'}"]
    arguments = words("prepare", folder, mixed(folder, 1, 2), *small)
    assert main(arguments) == 0
    monkeypatch.setattr(
        "textdiff.data.text_files.read_file", lambda *a: pytest.fail("read the text again")
    )
    assert main(["train", *arguments[2:]]) == 0
    record = json.loads((folder / "run" / "env.json").read_text())["corpus"]
    assert [round(source["share"], 6) for source in record["sources"]] == [0.333333, 0.666667]


@pytest.mark.parametrize("weight", [0, -1])
def test_weight_that_is_none_is_one_sentence(folder, capsys, weight):
    code, error = said(capsys, *words("prepare", folder, mixed(folder, 1, weight)))
    assert code == 2
    assert "`data.sources.1.weight`: Input should be greater than 0" in error


def test_weight_for_some_sources_only(folder, capsys):
    code, error = said(capsys, *words("inspect", folder, mixed(folder, 1, None)))
    assert code == 2
    assert "sources.1 has no weight, others have" in error


def test_source_that_disappeared(folder, capsys):
    assert main(words("prepare", folder)) == 0
    (folder / "a.jsonl").unlink()
    code, error = said(capsys, *words("prepare", folder))
    assert code == 1
    assert "a.jsonl: no such file or folder; check the path" in error


@pytest.mark.slow
def test_killed_preparation_goes_on_to_the_same_bytes(folder, capsys):
    """SIGKILL as soon as a shard lies in the cache; several shards of 32 million characters."""
    path = folder / "large.txt"
    with path.open("w") as file:
        for i in range(1500):
            file.write(f"{i} " + LINE * 1000)
    arguments = words("prepare", folder, "--tokenizer", '{"kind": "byte"}')
    arguments = [word for word in arguments if "vocab-size" not in word]
    arguments += [f"--data.sources.0.source={path}"]

    def cache(name: str) -> list[str]:
        return [word.replace("/cache", f"/{name}") for word in arguments]

    command = [sys.executable, "-m", "textdiff", *cache("broken")]
    with child(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list((folder / "broken").rglob("tokens-00000.arrow")):
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.01)
        process.kill()
    assert list((folder / "broken" / "textdiff").glob(".partial-*"))
    assert main(cache("broken")) == 0
    assert main(cache("whole")) == 0

    def contents(name: str) -> dict[str, bytes]:
        root = folder / name / "textdiff"
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert contents("broken") == contents("whole")
