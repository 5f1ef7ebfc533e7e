"""Lines of `--input` may have every option of a generation."""

import inspect
import json
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest

from textdiff.batch.lines import KEYS, OF_THE_JOB, LineDefaults
from textdiff.cli import main
from textdiff.commands.arguments import Loading
from textdiff.commands.generate import TextOptions, generate
from textdiff.commands.sampling import Sampling
from textdiff.pipeline import TextDiffusion

FLAGS = ["--max-new-tokens", "6", "--steps", "3", "--seed", "5"]


def run(export: Path, folder: Path, lines: list, *more: str) -> tuple[int, list[dict]]:
    folder = Path(tempfile.mkdtemp(dir=folder))
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    code = main(["generate", str(export), *files, *FLAGS, *more])
    return code, [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def command(export: Path, capsys, *words: str) -> list[str]:
    capsys.readouterr()
    assert main(["generate", str(export), *FLAGS, *words, "--json"]) == 0
    return [sample["text"] for sample in json.loads(capsys.readouterr().out)["samples"]]


def test_no_option_is_forgotten():
    """Everything that `generate` takes is a key of a line, or one of the whole job."""
    asked = set(Sampling.model_fields)
    asked |= {field.name for options in (TextOptions, Loading) for field in fields(options)}
    asked |= {name for name, p in inspect.signature(generate).parameters.items()
              if p.default is not inspect.Parameter.empty}  # fmt: skip
    assert asked - set(KEYS) - set(OF_THE_JOB) == {"json_output", "messages"}
    python = set(inspect.signature(TextDiffusion.prepare).parameters)
    python -= {"self", "prompts", "hooks", "constraint", "first_row", "options"}
    assert python <= set(KEYS)


# For each option a value that changes what the command prints.
CHANGES = {
    "max_new_tokens": (3, ["--max-new-tokens", "3"]),
    "steps": (1, ["--steps", "1"]),
    "max_denoising_steps": (1, ["--steps", "1"]),
    "rule": ("confidence", ["--rule", "confidence"]),
    "temperature": (0.01, ["--temperature", "0.01"]),
    "top_p": (0.05, ["--top-p", "0.05"]),
    "top_k": (1, ["--top-k", "1"]),
    "min_p": (0.9, ["--min-p", "0.9"]),
    "repetition_penalty": (9.0, ["--repetition-penalty", "9"]),
    "guidance": (5.0, ["--guidance", "5"]),
    "regex": ("[ab]+", ["--regex", "[ab]+"]),
    "ban": (["e", "t"], ["--ban", "e", "t"]),
    "force": ("zz", ["--force", "zz"]),
    "suffix": (" end", ["--suffix", " end"]),
    "seed": (77, ["--seed", "77"]),
    "num_samples": (3, ["--num-samples", "3"]),
    "cache": ("approximate", ["--cache", "approximate"]),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_line_is_the_command(exports, tmp_path, capsys, key):
    value, flags = CHANGES[key]
    seeded = {} if key == "seed" else {"seed": 5}
    code, found = run(exports / "a", tmp_path, [{"prompt": "the cat", **seeded, key: value}])
    assert code == 0
    assert found[0][key] == value
    prompt = [] if key == "template" else ["the cat"]
    assert [row["text"] for row in found] == command(exports / "a", capsys, *prompt, *flags)


def test_templates_in_lines(exports, tmp_path, capsys):
    path = tmp_path / "t.txt"
    path.write_text("a [MASK:3] b\n")
    lines = [
        {"template": "a [MASK:3] b", "seed": 5},
        {"template": str(path), "seed": 5, "prompt": None, "suffix": None},
        {"prompt": "a [MASK:3] b", "seed": 5, "template": None},
        {"template": "a [MASK:3] b", "prompt": "x"},
        {"template": "nowhere.txt"},
        {"template": "[MASK:0]"},
    ]
    code, found = run(exports / "a", tmp_path, lines)
    assert code == 1
    expected = command(exports / "a", capsys, "--template", str(path))
    assert [row["text"] for row in found if "text" in row] == expected * 3
    errors = {row["line"]: row["error"] for row in found if "error" in row}
    assert sorted(errors) == [4, 5, 6]
    assert "leave prompt and suffix out" in errors[4]
    assert "nowhere.txt" in errors[5]
    path.write_text("other [MASK:3]")
    (output,) = tmp_path.glob("*/out.jsonl")
    files = ["--input", str(output.with_name("in.jsonl")), "--output", str(output)]
    assert main(["generate", str(exports / "a"), *files, *FLAGS]) == 2  # not the job that was begun
    assert "templates_sha256" in capsys.readouterr().err


def test_null_is_as_if_the_key_were_not_there(exports, tmp_path):
    flags = ["--temperature", "0.5", "--regex", "[a-f]+", "--num-samples", "2", "--stop", "d"]
    _, plain = run(exports / "a", tmp_path, [{"prompt": "x"}], *flags)
    nulls = dict.fromkeys(set(KEYS) - {"prompt"})
    code, found = run(exports / "a", tmp_path, [{"prompt": "x", **nulls}], *flags)
    assert code == 0
    assert [row["text"] for row in found] == [row["text"] for row in plain]
    code, found = run(exports / "a", tmp_path, [{"prompt": None}])
    assert (code, found[0]["error"]) == (1, "no key 'prompt'")


def test_every_line_has_its_own_number_of_samples(exports, tmp_path):
    lines = [{"prompt": "q", "num_samples": n} for n in (None, 3, 1, 4)] + [{"prompt": "q"}]
    code, found = run(
        exports / "a", tmp_path, lines, "--num-samples", "2", "--max-new-tokens", "12"
    )
    assert code == 0
    rows = [(row["line"], row["sample"]) for row in found]
    assert rows == [(n, s) for n, count in enumerate([2, 3, 1, 4, 2], 1) for s in range(count)]
    assert len({row["text"] for row in found}) == 12  # no two share their random numbers
    _, alike = run(exports / "a", tmp_path, [{"prompt": "q"}] * 5, "--num-samples", "2",
                   "--max-new-tokens", "12")  # fmt: skip
    text = {(row["line"], row["sample"]): row["text"] for row in found}
    assert all(text.get((row["line"], row["sample"]), row["text"]) == row["text"] for row in alike)


def test_rows_of_a_job_have_numbers_of_their_own():
    job = LineDefaults(3, 0, {}, lambda *_: "")
    numbers = [job.first_row(line, s, False) for line in range(1, 200) for s in range(40)]
    assert len(set(numbers)) == len(numbers)
    assert [job.first_row(4, s, False) for s in range(3)] == [9, 10, 11]
    assert [job.first_row(4, s, True) for s in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"num_samples": 0}, "num_samples 0: give at least 1"),
        ({"num_samples": 10**12}, "give at most 1000000"),
        ({"num_samples": "2"}, "num_samples '2': give a whole number"),
        ({"num_samples": True}, "num_samples True: give"),
        ({"cache": "maybe"}, "cache 'maybe': give one of 'auto', 'on'"),
        ({"cache": True}, "approximation"),  # a full-sequence model has no exact one
        ({"template": 3}, "template 3: give a text"),
        ({"temperature": {}}, "temperature {}: give a number"),
        ({"knobs": []}, "knobs []"),
    ],
)
def test_lines_that_cannot_be_used(exports, tmp_path, capsys, line, said):
    code, found = run(exports / "a", tmp_path, [{"prompt": "q", **line}, {"prompt": "q"}])
    assert code == 1
    assert [row["line"] for row in found] == [1, 2]
    assert said in found[0]["error"]
    assert f"in.jsonl line 1: {found[0]['error']}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ('{"prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
        ('{"prompt": "a", "temperature": NaN}', "NaN is not a JSON number"),
        ('{"prompt": "a", "top_p": -Infinity}', "-Infinity is not a JSON number"),
        ('{"prompt": "a", "temperature": 1e999}', "not JSON"),
        ('{"prompt": "a", "id": 1e999}', "not JSON"),
    ],
)
def test_lines_that_are_not_strict_json(exports, tmp_path, words, said):
    (tmp_path / "in.jsonl").write_text(words + "\n")
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["generate", str(exports / "a"), *files, *FLAGS]) == 1
    assert said in json.loads((tmp_path / "out.jsonl").read_text())["error"]


def test_keys_that_look_like_options(exports, tmp_path, capsys):
    lines = [{"prompt": "q", "max-new-tokens": 1, "block_size": 4, "dtypes": 1, "mine": 2}]
    code, found = run(exports / "a", tmp_path, lines)
    assert code == 0
    assert lines[0].items() <= found[0].items()
    said = capsys.readouterr().err
    assert "'max-new-tokens' is passed through to the output; did you mean 'max_new_tokens'" in said
    assert "'block_size' is passed through to the output; it is an option of the job" in said
    assert said.count("note:") == 2
