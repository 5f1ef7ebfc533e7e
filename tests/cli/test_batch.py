"""`textdiff generate --input`: ordered, resumable, and the same whatever happens on the way."""

import json
import re
import sys
from pathlib import Path

import pytest
from children import finished

from textdiff.batch import output as batch_output
from textdiff.cli import main

LINES = [
    {"prompt": "the cat", "id": "a"},
    {"prompt": "", "max_new_tokens": 5},
    {"prompt": "a dog ran", "seed": 7, "id": {"nested": [1]}},
    {"prompt": "the", "temperature": 0.5, "rule": "confidence", "knobs": {"order": "margin"}},
    {"prompt": "on the mat", "stop": ["t"]},
    {"prompt": "x", "max_new_tokens": 3},
    {"prompt": "the cat sat"},
]
FLAGS = ["--max-new-tokens", "8", "--steps", "4", "--batch-size", "2", "--num-samples", "2"]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def words(exports, name: str, prompts: Path, output: Path, *more: str) -> list[str]:
    files = ["--input", str(prompts), "--output", str(output)]
    return ["generate", str(exports / name), *files, *FLAGS, *more]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["a", "d"])
def test_every_line_gets_its_texts_in_order(exports, prompts, tmp_path, name, capsys):
    assert main(words(exports, name, prompts, tmp_path / "out.jsonl")) == 0
    found = records(tmp_path / "out.jsonl")
    assert [(x["line"], x["sample"]) for x in found] == [
        (n, s) for n in range(1, 8) for s in (0, 1)
    ]
    for record in found:
        given = LINES[record["line"] - 1]
        assert given.items() <= record.items()
        assert record["text"] == given["prompt"] + record["completion"]
        assert record["new_tokens"] <= given.get("max_new_tokens", 8)
    assert "t" not in "".join(x["completion"] for x in found if x["line"] == 5)
    assert "14 texts are in" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out.jsonl.job").iterdir()) == [".lock", "job.json"]


def test_a_line_with_a_seed_is_the_command_with_that_seed(exports, prompts, tmp_path, capsys):
    assert main(words(exports, "a", prompts, tmp_path / "out.jsonl")) == 0
    capsys.readouterr()
    assert main(["generate", str(exports / "a"), "a dog ran", *FLAGS, "--seed", "7", "--json"]) == 0
    alone = [sample["text"] for sample in json.loads(capsys.readouterr().out)["samples"]]
    assert [x["text"] for x in records(tmp_path / "out.jsonl") if x["line"] == 3] == alone


def test_rows_depend_on_their_own_line_alone(exports, prompts, tmp_path):
    """Other lines, and other batches, change nothing; float64 leaves no rounding to chance."""
    assert main(words(exports, "d", prompts, tmp_path / "all.jsonl", "--dtype", "float64")) == 0
    others = [*[{"prompt": "zz", "seed": n} for n in range(5)], LINES[5], {"prompt": "q"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in others))
    flags = ("--dtype", "float64", "--batch-size", "9")
    assert main(words(exports, "d", prompts, tmp_path / "one.jsonl", *flags)) == 0
    both = [
        [x for x in records(tmp_path / name) if x["line"] == 6]
        for name in ("all.jsonl", "one.jsonl")
    ]
    assert both[0] == both[1]


class Stop(batch_output._Keeper):
    """Interrupts a job after some rows."""

    left = 0

    def finished(self, row, result):
        if Stop.left == 0:
            raise KeyboardInterrupt
        Stop.left -= 1
        super().finished(row, result)


@pytest.mark.parametrize("name", ["a", "d"])
def test_an_interrupted_job_ends_as_an_uninterrupted_one(
    exports, prompts, tmp_path, monkeypatch, name, capsys
):
    assert main(words(exports, name, prompts, tmp_path / "whole.jsonl")) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(batch_output, "_Keeper", Stop)
    kept = 0
    for count in (0, 1, 3, 3, 5, 100):
        Stop.left = count
        code = main(words(exports, name, prompts, output))
        said = capsys.readouterr().err
        assert code == (130 if count < 100 else 0)
        assert whole.startswith(output.read_bytes())
        if count < 100:
            now = int(re.search(r"(\d+) of 14 rows are finished and kept; go on with", said)[1])
            assert now >= max(kept, count)
            assert len(output.read_bytes().splitlines()) <= now
            kept = now
    assert output.read_bytes() == whole
    assert main(words(exports, name, prompts, output)) == 0
    assert "14 of 14 rows are there already" in capsys.readouterr().err
    assert output.read_bytes() == whole


def test_a_cache_that_changes_texts_is_part_of_the_job(exports, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    command = words(exports, "a", prompts, output)
    assert main([*command, "--cache", "approximate"]) == 0
    assert capsys.readouterr().err.count("approximation") == 1
    assert main([*command, "--cache", "approximate"]) == 0
    assert main(command) == 2
    assert "cache" in capsys.readouterr().err
    other = words(exports, "a", prompts, tmp_path / "other.jsonl")
    assert main([*other, "--cache", "off"]) == 0
    assert main(other) == 0  # these two are the same job


def test_lines_that_were_torn_by_a_kill_are_written_again(exports, prompts, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(batch_output, "_Keeper", Stop)
    Stop.left = 100
    assert main(words(exports, "a", prompts, tmp_path / "whole.jsonl")) == 0
    Stop.left = 7
    assert main(words(exports, "a", prompts, output)) == 130
    for path in (output, tmp_path / "out.jsonl.job" / "rows-0.jsonl"):
        with path.open("ab") as file:
            file.write(b'[9, "{\\"line')
    Stop.left = 100
    assert main(words(exports, "a", prompts, output)) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_lines_that_cannot_be_used_are_reported_and_the_rest_goes_on(exports, tmp_path, capsys):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_bytes(
        b'{"prompt": "the"}\n\n{"prompt": \n[1]\n{"id": 1}\n{"prompt": "a", "steps": "many"}\n'
        b'{"prompt": "a", "rule": "confidense"}\n{"prompt": "a", "top_p": 3}\n{"prompt": 4}\n'
        b'{"prompt": "caf\xe9"}\n{"prompt": "a", "text": "b"}\n{"prompt": "' + b"x" * 30 + b'"}\n'
        b'{"prompt": "a", "tempreature": 1}\n'
    )
    assert main(words(exports, "a", prompts, output)) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    errors = {x["line"]: x["error"] for x in records(output) if "error" in x}
    assert sorted(errors) == list(range(3, 13))
    for line, part in {
        3: "not JSON",
        4: "not a JSON object but list",
        5: "no key 'prompt'",
        6: "steps 'many'",
        7: "did you mean 'confidence'",
        8: "top_p 3",
        9: "prompt 4",
        10: "not UTF-8",
        11: "rename it",
        12: "fills the model's context",
    }.items():
        assert part in errors[line]
        assert f"line {line}: {errors[line]}" in said
    assert [x["line"] for x in records(output) if "text" in x] == [1, 1, 13, 13]
    assert "'tempreature' is passed through to the output; did you mean 'temperature'?" in said
    assert "10 lines of" in said


def test_lines_that_no_machine_could_do_stop_no_others(exports, tmp_path, capsys):
    """Each is one sentence, on the first run and when the job goes on."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = {
        2: (r'{"prompt": "a", "id": "\ud800"}', "surrogate"),
        3: (r'{"prompt": "a", "regex": "\ud800"}', "surrogate"),
        4: ("[" * 200_000, "too deeply nested"),
        5: ('{"prompt": "a[MASK:1000000000000000000]"}', "1 to 10000000"),
        6: ('{"prompt": "a[MASK:' + "9" * 5000 + ']"}', "1 to 10000000"),
        7: ('{"prompt": "a", "max_new_tokens": 1000000000000000}', "at most 10000000"),
        8: ('{"prompt": "a", "steps": 1000000000000}', "at most 1000000"),
        9: ('{"prompt": "a", "steps": 0}', "steps 0: give at least 1"),
    }
    first, last = '\ufeff{"prompt": "the"}', '{"prompt": "the"}'  # a byte-order mark is no text
    prompts.write_text("\n".join([first, *(line for line, _ in lines.values()), last]))
    for _ in range(2):
        assert main(words(exports, "a", prompts, output, "--num-samples", "2")) == 1
        said = capsys.readouterr().err
        assert "4 texts are in" in said
        errors = {x["line"]: x["error"] for x in records(output) if "error" in x}
        assert sorted(errors) == list(lines)
        for line, (_, part) in lines.items():
            assert part in errors[line]
            assert len(errors[line]) < 300
        assert [x["line"] for x in records(output) if "text" in x] == [1, 1, 10, 10]


def test_an_output_goes_on_only_as_it_was_begun(exports, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(words(exports, "a", prompts, output)) == 0
    before = output.read_bytes()
    for other, said in (
        (words(exports, "a", prompts, output, "--steps", "5"), "steps 4, now it is 5"),
        (words(exports, "b", prompts, output), "model_sha256"),
        (words(exports, "a", prompts, output, "--seed", "1"), "seed 0, now it is 1"),
    ):
        capsys.readouterr()
        assert main(other) == 2
        assert said in capsys.readouterr().err
    prompts.write_text('{"prompt": "the"}\n')
    assert main(words(exports, "a", prompts, output)) == 2
    assert "input_sha256" in capsys.readouterr().err
    (tmp_path / "mine.jsonl").write_text("{}\n")
    assert main(words(exports, "a", prompts, tmp_path / "mine.jsonl")) == 2
    assert "no job is known that wrote it" in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--input", "p.jsonl"], "give both"),
        (["--input", "nowhere.jsonl", "--output", "o.jsonl"], "no such file"),
        (["--input", "p.jsonl", "--output", "no/o.jsonl"], "a folder that exists"),
        (["a prompt", "--input", "p.jsonl", "--output", "o.jsonl"], "exclude each other"),
        (["--input", "p.jsonl", "--output", "o.jsonl", "--watch"], "excludes --watch"),
        (["--input", "p.jsonl", "--output", "o.jsonl", "--batch-size", "0"], "at least 1"),
        (["--input", "empty.jsonl", "--output", "o.jsonl"], "has no line"),
        (["--film", "no/film.html"], "a folder that exists"),
        (["--trace", "."], "a folder that exists"),
    ],
)
def test_wrong_files_are_said_in_one_sentence(exports, tmp_path, monkeypatch, more, said, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "the"}\n')
    Path("empty.jsonl").write_text("\n\n")
    assert main(["generate", str(exports / "a"), *more]) in (1, 2)
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown.strip().splitlines()) == 1
    assert not Path("o.jsonl").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_write_what_one_does(exports, prompts, tmp_path):
    assert main(words(exports, "a", prompts, tmp_path / "one.jsonl")) == 0
    root = Path(__file__).resolve().parents[2]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(root / "configs" / "accelerate" / "cpu.yaml"), "-m", "textdiff"]
    done = finished([*launch, *words(exports, "a", prompts, tmp_path / "two.jsonl")])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert done.stderr.count("14 texts are in") == 1
