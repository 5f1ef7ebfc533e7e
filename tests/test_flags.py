"""Refusals of command lines: one sentence that names the flag, the value and what was meant."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from textdiff.cli import main
from textdiff.commands.flags import parse_verb
from textdiff.errors import ConfigError
from textdiff.section import Section


def verb(
    model: str,
    /,
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


def refusal(*words: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        parse_verb(verb, "textdiff verb", words)
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["m", "--stepps", "3"], "unknown option --stepps; did you mean --steps?"),
        (["m", "--stepps=3"], "unknown option --stepps; did you mean --steps?"),
        (["m", "--bogus"], "unknown option --bogus; see textdiff verb --help"),
        (["m", "extra"], "unexpected argument 'extra'; see textdiff verb --help"),
        (
            ["m", "--steps", "x"],
            "--steps: 'x' is not a whole number or None; see textdiff verb --help",
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
    assert str(refusal(*words)) == sentence


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["m", "--stepps", "3"], "unknown_option"),
        (["m", "extra"], "unexpected_argument"),
        (["m", "--steps"], "missing_value"),
        (["m", "--steps", "x"], "int_parsing"),
        (["m", "--temperature", "warm"], "float_parsing"),
        (["m", "--temperature", "inf"], "finite_number"),
        (["m", "--kind", "sgd"], "literal_error"),
        ([], "missing_argument"),
    ],
)
def test_refusals_have_codes(words, code):
    assert refusal(*words).code == code


def test_a_narrow_terminal_changes_no_word(monkeypatch):
    wide = refusal("m", "--steps", "x")
    monkeypatch.setenv("COLUMNS", "60")
    assert str(refusal("m", "--steps", "x")) == str(wide)


def test_arguments_and_options_come_in_any_order():
    for words in (["--steps", "2", "m"], ["m", "--steps=2"], ["m", "--steps", "2", "--kind=muon"]):
        assert parse_verb(verb, "textdiff verb", words)() == 3


def test_values_may_begin_with_a_minus():
    def verb(pair: tuple[float, float] = (0.0, 1.0), suffix: str = "") -> tuple[object, str]:
        """A verb."""
        return pair, suffix

    read = parse_verb(verb, "textdiff verb", ["--pair", "-1", "-.5", "--suffix=-x"])
    assert read() == ((-1.0, -0.5), "-x")


def test_a_section_is_a_group_of_options():
    class Group(Section):
        top_p: float = Field(1.0, gt=0.0, le=1.0, description="share of the probability")
        stop: tuple[str, ...] = ()

    def verb(model: str, /, *, group: Group) -> Group:
        """A verb."""
        return group

    read = parse_verb(verb, "textdiff verb", ["m", "--top-p", "0.5"])
    assert read().model_dump(exclude_unset=True) == {"top_p": 0.5}
    for words, code in ((["--top_p", "2"], "less_than_equal"), (["--top-p", "x"], "float_parsing")):
        with pytest.raises(ConfigError, match=r"^--top-p") as error:
            parse_verb(verb, "textdiff verb", ["m", *words])
        assert error.value.code == code


def test_what_a_verb_says_while_it_runs_is_not_taken_for_a_refusal(capsys):
    def loud() -> int:
        print("at once", file=sys.stderr)
        raise SystemExit(7)

    call = parse_verb(loud, "textdiff loud", [])
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 7
    assert capsys.readouterr().err == "at once\n"


def test_help_has_a_line_for_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_verb(verb, "textdiff verb", ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--temperature FLOAT" in shown
    assert "--kind adamw|muon    of optimizer. (default: adamw)" in shown
    assert "MODEL                export directory or hub id." in shown


VERB_OPTIONS = {
    "generate m": ["--max-new-tokens", "--num-samples", "--json", "--watch", "--input", "--top-p"],
    "perplexity m t": ["--max-documents", "--precision", "--batch-tokens", "--per-document"],
    "compare m n t": ["--replicates", "--text-column"],
    "evaluate m": ["--judge", "--judge-dtype", "--picture"],
    "play m": ["--temperature", "--block-size"],
    "tokenizer train o t": ["--vocab-size"],
    "doctor": ["--json"],
    "plan c.yaml": ["--memory", "--efficiency", "--vocabulary"],
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
        group: Group = Group(),
    ) -> tuple[Path, Path | None]:
        """A verb."""
        return state, group.film

    ran = parse_verb(verb, "textdiff verb", ["--state=~/a", "--film", "~/b"])
    assert ran() == (tmp_path / "a", tmp_path / "b")
    for words in (["--eps", "inf"], ["--top-p", "nan"], ["--pair", "1", "inf"]):
        with pytest.raises(ConfigError, match=f"^{words[0]} (inf|nan)") as error:
            parse_verb(verb, "textdiff verb", words)
        assert error.value.code == "finite_number"
    with pytest.raises(ConfigError) as error:
        parse_verb(verb, "textdiff verb", ["--film", "~nobody9/x"])
    assert error.value.code == "unknown_user"
