"""What tyro refuses, in one sentence that names the flag, the value and what was meant."""

import io
import sys
from typing import Annotated, Literal

import pytest
import tyro

from textdiff.errors import ConfigError
from textdiff.flags import deferred, explain, parse


def verb(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    steps: int | None = None,
    temperature: float = 1.0,
    kind: Literal["adamw", "muon"] = "adamw",
) -> int:
    """A verb.

    Args:
        model: export directory or hub id.
        steps: denoising steps; more of them make a better text.
        temperature: of every draw.
        kind: of optimizer.
    """
    return (steps or 0) + 1


def refusal(*words: str, prog: str = "textdiff verb") -> str:
    with pytest.raises(ConfigError) as error:
        parse(verb, prog, words, ())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["m", "--stepps", "3"], "unknown option --stepps; did you mean --steps?"),
        (["m", "--stepps=3"], "unknown option --stepps; did you mean --steps?"),
        (["m", "--bogus"], "unknown option --bogus; see textdiff verb --help"),
        (["m", "extra"], "unexpected argument 'extra'; see textdiff verb --help"),
        (
            ["m", "--steps", "x"],
            "--steps: 'x' is not None or a whole number; see textdiff verb --help",
        ),
        (
            ["m", "--temperature", "warm"],
            "--temperature: 'warm' is not a number; see textdiff verb --help",
        ),
        (["m", "--kind", "sgd"], "--kind: 'sgd' is not adamw or muon; see textdiff verb --help"),
        (["m", "--steps"], "--steps needs a value; see textdiff verb --help"),
        ([], "MODEL is missing: export directory or hub id; see textdiff verb --help"),
    ],
)
def test_one_sentence(words, sentence):
    assert refusal(*words) == sentence


def test_options_of_the_command_itself_are_suggested():
    prog = "textdiff verb FILE [--memory 80GB] [--json]"
    assert refusal("m", "--memmory", "8GB", prog=prog).endswith("did you mean --memory?")
    assert refusal("m", "--other", prog=prog).endswith("; see textdiff verb FILE --help")


def test_a_narrow_terminal_changes_no_word(monkeypatch):
    wide = refusal("m", "--steps", "x")
    monkeypatch.setenv("COLUMNS", "60")
    assert refusal("m", "--steps", "x") == wide


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminal_without_boxes_changes_no_word(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert refusal("m", "--stepps", "3") == "unknown option --stepps; did you mean --steps?"


def test_words_that_are_not_known_are_kept():
    assert explain("something new.\n") == "something new"
    assert explain("") == "the command line cannot be read"


def test_a_deferred_function_runs_after_its_flags_were_read(capsys):
    ran = parse(deferred(verb), "textdiff verb", ["m", "--steps", "2"], ())
    assert ran() == 3


def test_what_a_verb_says_while_it_runs_is_not_taken_for_a_refusal(capsys):
    def loud() -> int:
        print("at once", file=sys.stderr)
        raise SystemExit(7)

    call = parse(deferred(loud), "textdiff loud", [], ())
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 7
    assert capsys.readouterr().err == "at once\n"


def test_help_is_tyros(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(verb, "textdiff verb", ["--help"], ())
    assert stop.value.code == 0
    assert "--temperature FLOAT" in capsys.readouterr().out
