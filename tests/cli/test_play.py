"""`textdiff play`, and `textdiff generate` when it is watched or stopped."""

import io
import json
import sys

import pytest
from children import child
from terminals import environment, in_a_terminal

from textdiff.cli import main
from textdiff.commands.prompting import PromptSession
from textdiff.commands.sampling import Sampling
from textdiff.pipeline import TextDiffusion
from textdiff.view.display import TextPrinter
from textdiff.view.progress import make_console

FLAGS = ["--max-new-tokens", "8", "--steps", "4"]


@pytest.fixture
def play(exports, monkeypatch, capsys):
    """Pipes lines into a session; gives exit code, standard output and standard error."""

    def run(*lines: str, name: str = "a") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code = main(["play", str(exports / name), *FLAGS])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run


def texts_of(exports, capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(["generate", str(exports / "a"), *words]) == 0
    return capsys.readouterr().out


def test_a_line_is_a_prompt_and_gives_what_generate_gives(exports, play, capsys):
    flags = [*FLAGS, "--temperature", "0.5", "--seed", "3"]
    first, second = (texts_of(exports, capsys, "the cat", *f) for f in (FLAGS, flags))
    slash = texts_of(exports, capsys, "/x", *FLAGS)
    code, out, err = play("//x", "the cat", "/set temperature 0.5", "/seed 3", "/again")
    assert (code, err) == (0, "")
    assert out == slash + first + "seed 3\n" + second


def test_errors_are_sentences_and_the_session_goes_on(play):
    code, out, err = play(
        "/nope",
        "/sho",
        "/set temprature 1",
        "/set top-k many",
        "/set temperature -1",
        "/set steps",
        "/rule magic",
        "/rule confidence order=nothing",
        "/again",
        "/film",
        "/film no/where.html",
        "/save x.jsonl",
        "/samples 0",
        "/set stop 'open",
        "x" * 40,
        "the",
    )
    lines = err.splitlines()
    assert len(lines) == 14
    assert all(line.startswith("textdiff: error: ") for line in lines)
    for line, said in zip(
        lines,
        [
            "unknown command /nope; there are",
            "did you mean 'show'",
            "did you mean 'temperature'",
            "valid integer",
            "at least 0",
            "there are: ancestral",
            "order",
            "no prompt yet",
            "needs the name of one file",
            "a folder that exists",
            "no text yet",
            "at least 1",
            "no closing quotation",
            "context of 24 tokens",
        ],
        strict=True,
    ):
        assert said in line
    assert code == 1
    assert out.startswith("the")


def test_settings_are_shown_and_refused_ones_change_nothing(play):
    _, out, _ = play(
        "/set top-k 5", "/set top-k 0", "/rule confidence order=margin", "/show", "/rule"
    )
    assert "top-k  5" in out
    assert "rule  confidence" in out
    assert "knobs  order=margin" in out
    assert "temperature  1.0 (the model's)" in out
    assert "confidence *" in out


def test_films_traces_and_texts_are_of_the_last_prompt(play, tmp_path):
    film, trace, saved = (tmp_path / name for name in ("f.html", "t.jsonl", "s.jsonl"))
    _, out, _ = play(
        "/samples 2", "the", f"/film {film}", f"/trace {trace}", f"/save {saved}", "/quit", "never"
    )
    assert "never" not in out
    found = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [x["text"] for x in found] == out.split("\nwritten to")[0].split("\n\n---\n\n")
    assert {x["prompt"] for x in found} == {"the"}
    assert {json.loads(line)["row"] for line in trace.read_text().splitlines()} == {0, 1}
    assert '"index":1' in film.read_text()


def test_settings_of_now_do_not_pass_for_those_of_the_last_texts(play, tmp_path):
    trace, saved = tmp_path / "t.jsonl", tmp_path / "s.jsonl"
    change = ("/set seed 7", "/set temperature 0.1", "/samples 3")
    _, out, _ = play("the", *change, f"/trace {trace}", f"/save {saved}", name="c")
    (record,) = [json.loads(line) for line in saved.read_text().splitlines()]
    assert record["text"] == out.split("\nwritten to")[0]
    assert record["seed"] == 0
    assert "temperature" not in record
    tokens = {x["position"]: x["text"] for x in map(json.loads, trace.read_text().splitlines())}
    assert "the" + "".join(tokens[at] for at in sorted(tokens)) == record["text"]


def test_words_are_completed(exports):
    held = TextDiffusion.from_pretrained(exports / "a")
    session = PromptSession(held, "a", Sampling(), make_console())

    def completions(line: str) -> list[str]:
        found, number = [], 0
        while (word := session.completion(line, number)) is not None:
            found.append(word.strip())
            number += 1
        return found

    assert completions("/s") == ["/set", "/show", "/seed", "/samples", "/save"]
    assert completions("/set temp") == ["temperature"]
    assert completions("/rule con") == ["confidence"]
    assert completions("/rule tw") == []  # does not fit the model
    assert completions("the ca") == []


# --- stopping -------------------------------------------------------------------------------------


@pytest.fixture
def stopped(monkeypatch):
    """Ctrl-C at some network call."""

    def at(call: int) -> None:
        plain, seen = TextPrinter.step, []

        def step(self, step):
            plain(self, step)
            seen.append(step)
            if len(seen) == call:
                raise KeyboardInterrupt

        monkeypatch.setattr(TextPrinter, "step", step)

    return at


def test_ctrl_c_keeps_what_is_finished(exports, stopped, capsys, tmp_path):
    """Of three texts one by one the first is there, and the blocks of the second that are done."""
    words = ["generate", str(exports / "d"), "", "--max-new-tokens", "12", "--steps", "1"]
    words += ["--num-samples", "3", "--batch-size", "1"]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    whole = [sample["text"] for sample in json.loads(capsys.readouterr().out)["samples"]]
    stopped(6)
    recorders = ["--film", str(tmp_path / "f.html"), "--trace", str(tmp_path / "t.jsonl")]
    assert main([*words, *recorders]) == 130
    shown = capsys.readouterr()
    first, second = shown.out.rstrip("\n").split("\n\n---\n\n")
    assert first == whole[0]
    assert second.rstrip("\ufffd")
    assert whole[1].startswith(second.rstrip("\ufffd"))
    assert len(second) < len(whole[1])
    assert "1 of 3 texts were finished" in shown.err
    assert '"finished":false' in (tmp_path / "f.html").read_text()
    rows = [json.loads(line)["row"] for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert set(rows) == {0, 1}


def test_ctrl_c_in_json_is_json(exports, stopped, capsys):
    words = ["generate", str(exports / "a"), *FLAGS, "--num-samples", "3", "--batch-size", "1"]
    stopped(6)
    capsys.readouterr()
    assert main([*words, "--json"]) == 130
    found = json.loads(capsys.readouterr().out)
    assert found["interrupted"] is True
    assert len(found["samples"]) == 1


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error_to_speak_of(exports):
    words = [sys.executable, "-m", "textdiff", "generate", str(exports / "a"), *FLAGS]
    words += ["--num-samples", "400"]
    with child(words, env=environment()) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 1
    assert said == ""


@pytest.mark.slow
def test_a_terminal_sees_the_text_being_denoised(exports):
    words = ["generate", str(exports / "a"), "the", *FLAGS, "--watch"]
    shown = in_a_terminal(words, [], TERM="xterm-256color")
    assert "call 1" in shown
    assert "tokens/call" in shown
    plain = in_a_terminal(words, [], TERM="xterm-256color", NO_COLOR="1")
    assert "call 1" in plain
    assert "\x1b[32m" not in plain
    dumb = in_a_terminal(words, [], TERM="dumb")
    assert "\x1b" not in dumb
    assert "call 1" not in dumb
    assert dumb.startswith("the")


@pytest.mark.slow
def test_a_session_in_a_terminal_survives_ctrl_c(exports):
    words = ["play", str(exports / "d"), "--max-new-tokens", "100000", "--steps", "4"]
    typed = [
        ("textdiff> ", "the\n"),
        (r"call \d\d", "^C"),  # a fast model skips numbers: not every call is drawn
        ("stopped", "/set max-new-tokens 4\n"),
        ("max-new-tokens 4\r\n", "/again\n"),
        ("call 1 ", "/quit\n"),
    ]
    shown = in_a_terminal(words, typed, TERM="xterm-256color")
    assert "Type a prompt, or /help." in shown
    assert "Traceback" not in shown
    assert "stopped" in shown
    assert shown.rstrip().endswith("/quit")
