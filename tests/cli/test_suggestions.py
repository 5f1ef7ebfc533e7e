"""What `train` suggests works as it stands, whatever the texts are."""

import shlex

import pytest
from children import finished

from textdiff.cli import main
from textdiff.commands.train import accepts, commands_to_try
from textdiff.pipeline import TextDiffusion

DOCUMENTS = {
    "English": "The cat sat on the mat. " * 9,
    "one word of 18 kB": "永和九年歲在癸丑暮春之初會于會稽山陰之蘭亭" * 300,
    "marks that belong to letters": "e\u0301" * 400,
    "a flag": "--help prints this text and ends",
    "flags": "--help -h --debug --watch",
    "a dash": "- first item\n- second item",
    "two dashes": "-- \n",
    "a hole": "[MASK: 7] is a field of [MASK:3] and [MASK]",
    "a hole that is escaped": r"\[MASK] and \\[MASK:2]",
    "a hole that does not end": "[MASK",
    "quotes": "it's \"so\" they'd say",
    "a shell": "$HOME `id` !! \\ ; rm -rf $(pwd) | & > x",
    "a pattern": "* ? [a] {b,c} ~ # %",
    "control characters": "\x1b[31mred\x07 \x08back\x7f \u202eturned",
    "lines": "one\ttwo\r\nthree\x0bfour",
    "white space": " \n\t ",
    "words of Python": "None true {} 0",
    "an address": "https://example.org/a/very/long/path/without/any/space?and=queries&more=1#end",
}


@pytest.fixture(params=sorted(DOCUMENTS))
def document(request) -> str:
    return DOCUMENTS[request.param]


def words_of(command: str) -> list[str]:
    """The words that a shell makes of a command line."""
    script = f"set -- {command}\nprintf '%s\\0' \"$@\""
    done = finished(["bash", "-c", script])
    assert done.returncode == 0
    return done.stdout.split("\0")[:-1]


def test_every_suggestion_works(exports, prose, document, capsys):
    held = TextDiffusion.from_pretrained(exports / "a")
    paths = str(exports / "a"), str(prose / "rows.jsonl")
    commands = commands_to_try(*paths, document, accepts(held))
    assert len(commands) == 3
    for command in commands:
        assert command.isprintable()
        assert len(command) < 300
        words = words_of(command)
        assert words == shlex.split(command)
        assert words[0] == "textdiff"
        small = ["--max-new-tokens", "2", "--steps", "1"] if words[1] == "generate" else []
        capsys.readouterr()
        assert main([*words[1:], *small]) == 0
        assert "usage" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("English", "The cat sat"),
        ("a hole", r"\[MASK: 7] is"),
        ("a flag", "prints this text"),
        ("a dash", "first item -"),
        ("lines", "one two three"),
    ],
)
def test_prompt_is_how_the_text_begins(name, prompt):
    first, *_ = commands_to_try("m", "v", DOCUMENTS[name], lambda prompt: True)
    assert shlex.split(first) == ["textdiff", "generate", "m", prompt, "--watch"]


def test_long_word_is_cut_between_whole_letters():
    def prompt_of(document: str, room: int) -> str:
        first, *_ = commands_to_try("m", "v", document, lambda p: len(p.encode()) <= room)
        return shlex.split(first)[3]

    assert (
        prompt_of(DOCUMENTS["one word of 18 kB"], 99) == "永和九年歲在癸丑暮春之初會于會稽山陰之蘭"
    )
    assert prompt_of(DOCUMENTS["one word of 18 kB"], 12) == "永和"
    assert prompt_of("exe\u0301" * 400, 99).endswith("\u0301")
    assert prompt_of("e\u0301" * 400, 5) == "e\u0301"


def test_text_that_the_model_does_not_know_is_left_out():
    def usable(prompt: str) -> bool:
        return set(prompt) <= set("abc ")

    first, *_ = commands_to_try("m", "v", "xyz abc", usable)
    assert shlex.split(first) == ["textdiff", "generate", "m", "--watch"]


def test_paths_are_not_flags():
    commands = commands_to_try("-my runs/export", "-my runs/validation.jsonl", "", lambda p: True)
    assert shlex.split(commands[2])[2:] == ["./-my runs/export", "./-my runs/validation.jsonl"]
