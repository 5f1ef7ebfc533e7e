"""What tyro refuses, in one sentence that names the flag, the value and what was meant."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from textdiff.cli import main
from textdiff.commands.flags import deferred, explain, parse
from textdiff.errors import ConfigError


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


VERB_OPTIONS = {
    "generate m": ["--max-new-tokens", "--num-samples", "--json", "--watch", "--input", "--top-p"],
    "perplexity m t": ["--max-documents", "--precision", "--batch-tokens", "--per-document"],
    "compare m n t": ["--replicates", "--text-column"],
    "evaluate m": ["--judge", "--judge-dtype", "--picture"],
    "play m": ["--temperature", "--block-size"],
    "tokenizer train o t": ["--vocab-size"],
    "doctor": ["--json"],
    "estimate c.yaml": ["--memory", "--efficiency", "--vocabulary"],
    "train c.yaml": ["--resume"],
    "data inspect c.yaml": ["--json"],
}


@pytest.mark.parametrize("verb", VERB_OPTIONS)
def test_every_verb_suggests_its_own_options(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("")
    for option in VERB_OPTIONS[verb]:
        wrong = option[:-2] + option[-1]  # a letter is missing
        for typed in {wrong, wrong.replace("-", "_").replace("__", "--"), option[1:] + "s"}:
            for words in ([typed, "3"], [f"{typed}=3"], [typed, "3", "--othr", "4"]):
                assert main([*verb.split(), *words]) == 2
                said = capsys.readouterr().err
                assert f"unknown option {typed}; did you mean {option}?" in said


def test_numbers_are_finite_and_paths_have_no_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    @dataclass(frozen=True)
    class Group:
        film: Path | None = None
        top_p: float | None = None

    def verb(
        state: Path = Path("x"),
        eps: float = 1.0,
        pair: tuple[float, float] = (0.0, 1.0),
        group: Annotated[Group, tyro.conf.arg(name="")] = Group(),
    ) -> tuple[Path, Path | None]:
        """A verb."""
        return state, group.film

    ran = parse(deferred(verb), "textdiff verb", ["--state=~/a", "--film", "~/b"], ())
    assert ran() == (tmp_path / "a", tmp_path / "b")
    for words in (["--eps", "inf"], ["--top-p", "nan"], ["--pair", "1", "-inf"]):
        with pytest.raises(ConfigError, match=f"^{words[0]} (-?inf|nan): give a finite number"):
            parse(deferred(verb), "textdiff verb", words, ())
    with pytest.raises(ConfigError, match="--film ~nobody9/x: there is no such user"):
        parse(deferred(verb), "textdiff verb", ["--film", "~nobody9/x"], ())
