"""A text is the same text by file, pipe, pattern and folder, and `-` is standard input."""

import io
import json
import sys

import pytest

from textdiff.cli import main
from textdiff.pipeline import TextDiffusion

CONTENTS = {
    "plain": b"the cat sat on the mat.\n",
    "byte order mark": b"\xef\xbb\xbfthe cat sat",
    "CRLF": b"the cat\r\nsat on\r\nthe mat\r\n",
    "CR": b"the cat\rsat\r",
    "no newline": b"the cat sat",
    "several newlines": b"\n\nthe cat\n\n\n",
    "letters of several bytes": "né 世\U0001f9ff\u2028\x0b".encode(),
    "spaces around": b"  the cat \t",
}
REFUSED = {
    "zero byte": b"the c\0t",
    "invalid UTF-8": b"the caf\xe9",
    "cut character": b"the caf\xc3",
    "mark and invalid UTF-8": b"\xef\xbb\xbfthe \xff",
    "UTF-16": "the cat".encode("utf-16"),
    "empty": b"",
    "mark alone": b"\xef\xbb\xbf",
    "white space": b" \r\n\t",
}


def pipe(monkeypatch, content: bytes) -> None:
    """Makes `content` what standard input holds."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def run(capsys, *words: object) -> str:
    """Standard output of a verb that works."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 0
    return capsys.readouterr().out


def error_of(capsys, *words: object) -> str:
    """The one line on standard error of a verb that refuses."""
    capsys.readouterr()
    assert main([*map(str, words)]) in (1, 2)
    shown = capsys.readouterr().err
    assert len(shown.strip().splitlines()) == 1, shown
    return shown


def places(folder) -> list[str]:
    return [str(folder / "a.txt"), "-", str(folder / "*.txt"), str(folder), str(folder / "**")]


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_one_text_is_one_number(exports, tmp_path, content, monkeypatch, capsys):
    (tmp_path / "a.txt").write_bytes(content)
    found = []
    for place in places(tmp_path):
        pipe(monkeypatch, content)
        words = ("perplexity", exports / "a", place, "--estimator", "chain_rule", "--json")
        found.append(json.loads(run(capsys, *words)))
    figures = [{k: v for k, v in each.items() if k != "provenance"} for each in found]
    assert figures[0]["bytes"] == len(content.removeprefix(b"\xef\xbb\xbf"))
    assert all(each == figures[0] for each in figures)


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_one_text_is_one_refusal(exports, tmp_path, content, monkeypatch, capsys):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    by_file = error_of(capsys, "perplexity", exports / "a", path)
    pipe(monkeypatch, content)
    by_pipe = error_of(capsys, "perplexity", exports / "a", "-")
    assert by_pipe == by_file.replace(str(path), "standard input")
    error_of(capsys, "perplexity", exports / "a", tmp_path)


def test_dash_works_for_every_argument_that_takes_a_text(
    exports, prose, tmp_path, monkeypatch, capsys
):
    text = (prose / "text.txt").read_bytes()

    def same(*words: object, content: bytes = text, file: object = prose / "text.txt") -> None:
        by_file = json.loads(run(capsys, *words, file, "--json"))
        pipe(monkeypatch, content)
        by_pipe = json.loads(run(capsys, *words, "-", "--json"))
        for record in (by_file, by_pipe, *by_file.get("models", []), *by_pipe.get("models", [])):
            record.pop("provenance", None)
            record.pop("command", None)
        assert by_pipe == by_file

    same("perplexity", exports / "a")
    same("compare", exports / "a", exports / "b")
    rows = prose / "rows.jsonl"
    for column in ("prompt", "spans"):
        words = ("perplexity", exports / "a", f"--{column}-column", column)
        same(*words, content=rows.read_bytes(), file=rows)
    flags = ("--num-samples", "8", "--max-new-tokens", "8", "--steps", "2", "--resamples", "100")
    same("evaluate", exports / "a", *flags, "--reference")
    measured = json.loads(run(capsys, "evaluate", exports / "a", *flags, "--output", "-"))
    assert measured["samples"]["texts"] == 8
    assert not list(tmp_path.iterdir())
    pipe(monkeypatch, text)
    shown = run(capsys, "tokenizer", "train", tmp_path / "pipe", "-", "--kind", "char")
    by_file = run(
        capsys, "tokenizer", "train", tmp_path / "file", prose / "text.txt", "--kind", "char"
    )
    assert shown.split(":", 1)[1] == by_file.split(":", 1)[1]


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "--suite", "frontier", "--grid", "grid.yaml", "--output", "-"),
        ("perplexity", "text.txt", "--per-document", "-"),
    ],
)
def test_output_that_cannot_be_a_stream(exports, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "name a file" in error_of(capsys, words[0], exports / "a", *words[1:])
    assert not list(tmp_path.iterdir())


def test_standard_input_is_read_once(exports, monkeypatch, capsys):
    pipe(monkeypatch, b"the cat")
    said = "standard input can be read once: give `-` once"
    assert said in error_of(capsys, "perplexity", exports / "a", "-", "-")
    words = ("evaluate", exports / "a", "--texts", "-", "--reference", "-")
    assert said in error_of(capsys, *words)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = "several processes cannot share standard input"
    assert said in error_of(capsys, "perplexity", exports / "a", "-")


def test_standard_input_that_is_closed(exports, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input" in error_of(capsys, "perplexity", exports / "a", "-")


def test_files_beside_standard_input(exports, prose, monkeypatch, capsys):
    pipe(monkeypatch, b"12345")
    words = ("perplexity", exports / "a", "-", prose / "text.txt", "--json")
    assert json.loads(run(capsys, *words))["bytes"] == 5 + 147


def test_first_document_needs_no_other(exports, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "12345", "prompt": "x"}\n\xff')
    (tmp_path / "b.txt").write_bytes(b"\0")
    for place in (tmp_path / "a.jsonl", tmp_path, tmp_path / "*"):
        words = ("perplexity", exports / "a", place, "--max-documents", "1", "--json")
        assert json.loads(run(capsys, *words))["bytes"] == 5
    words = ("perplexity", exports / "a", tmp_path / "a.jsonl", "--prompt-column", "prompt")
    assert "12345" not in run(capsys, *words, "--max-documents", "1")
    two = ("compare", exports / "a", exports / "b", tmp_path, "--max-documents", "1")
    run(capsys, *two)
    assert "b.txt" in error_of(capsys, "perplexity", exports / "a", tmp_path / "b.txt")
    missing = (
        "perplexity",
        exports / "a",
        tmp_path / "a.jsonl",
        "nope.txt",
        "--max-documents",
        "1",
    )
    assert "nope.txt: no such file" in error_of(capsys, *missing)


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"the [MASK:2] sat", b"\xef\xbb\xbfthe [MASK:2] sat\n", b"the [MASK:2] sat\r\n"],
)
def test_template_by_file_and_by_pipe(exports, tmp_path, content, monkeypatch, capsys):
    (tmp_path / "t").write_bytes(content)
    words = ("generate", exports / "a", "--steps", "1", "--json", "--template")
    pipe(monkeypatch, content)
    found = [json.loads(run(capsys, *words, place)) for place in (tmp_path / "t", "-")]
    assert found[0] == found[1]
    assert found[0]["prompt"] == "the [MASK:2] sat"


@pytest.mark.parametrize("content", [b"caf\xe9 [MASK]", b"\0[MASK]"])
def test_template_is_refused_alike(exports, tmp_path, content, monkeypatch, capsys):
    (tmp_path / "t").write_bytes(content)
    pipe(monkeypatch, content)
    words = ("generate", exports / "a", "--template")
    by_file, by_pipe = (error_of(capsys, *words, place) for place in (tmp_path / "t", "-"))
    assert by_pipe == by_file.replace(str(tmp_path / "t"), "standard input")


LINES = (
    b'\xef\xbb\xbf{"prompt": "the cat"}\r\n\n{"prompt": 5}\n'
    b'{"prompt": "a", "id": 1}\n{"prompt": ""}\n'
)
FLAGS = ("--max-new-tokens", "3", "--steps", "1", "--batch-size", "2", "--num-samples", "2")


@pytest.mark.parametrize("name", ["a", "d"])
def test_prompts_and_results_by_pipe(exports, tmp_path, name, monkeypatch, capsysbinary):
    (tmp_path / "in.jsonl").write_bytes(LINES)
    words = ["generate", str(exports / name), *FLAGS]
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main([*words, *files]) == 1
    expected = (tmp_path / "out.jsonl").read_bytes()
    assert len(expected.splitlines()) == 7
    assert capsysbinary.readouterr().out == b""
    pipe(monkeypatch, LINES)
    assert main([*words, "--input", "-", "--output", "-"]) == 1
    shown = capsysbinary.readouterr()
    assert shown.out == expected
    assert b"standard input line 3: prompt 5" in shown.err
    assert b"6 texts are in standard output" in shown.err
    assert not list(tmp_path.glob("-*"))


def test_job_by_pipe_goes_on_with_the_same_content(exports, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    words = ["generate", str(exports / "a"), *FLAGS, "--output", str(output), "--input"]
    pipe(monkeypatch, LINES)
    main([*words, "-"])
    whole = output.read_bytes()
    capsys.readouterr()
    (tmp_path / "in.jsonl").write_bytes(LINES)
    main([*words, str(tmp_path / "in.jsonl")])
    assert "7 of 7 rows are there already" in capsys.readouterr().err
    assert output.read_bytes() == whole
    pipe(monkeypatch, b'{"prompt": "another"}\n')
    assert main([*words, "-"]) == 2
    assert "was begun with input_sha256" in capsys.readouterr().err
    assert output.read_bytes() == whole


def test_interrupted_stream_keeps_nothing(exports, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextDiffusion, "run", interrupted)
    pipe(monkeypatch, LINES)
    assert main(["generate", str(exports / "a"), "--input", "-", "--output", "-"]) == 130
    assert "0 of 4 rows were written; nothing is kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "x", "id": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"prompt": ["x"]}', "prompt ['x']"),
        (b'{"prompt": 5}', "prompt 5"),
        (b"{}", "no key 'prompt'"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_line_without_a_usable_prompt_is_one_sentence(exports, line, said, monkeypatch, capsys):
    pipe(monkeypatch, line + b"\n" + b'{"prompt": "fine"}')
    words = ["generate", str(exports / "a"), *FLAGS, "--input", "-", "--output", "-"]
    assert main(words) == 1
    shown = capsys.readouterr()
    records = [json.loads(words) for words in shown.out.splitlines()]
    assert [record["line"] for record in records] == [1, 2, 2]
    assert said in records[0]["error"]
    assert "set_int_max_str_digits" not in shown.out + shown.err


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_no_line_at_all(exports, content, monkeypatch, capsys):
    pipe(monkeypatch, content)
    words = ("generate", exports / "a", "--input", "-", "--output", "-")
    assert "standard input has no line" in error_of(capsys, *words)
