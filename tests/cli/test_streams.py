"""Screens that cannot show what verbs print: results are there all the same."""

import errno
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from children import finished

from textdiff.cli import main
from textdiff.view.progress import unfailing
from textdiff.view.streams import SafeStream, fitted, safe_streams

SMALL = ["--max-new-tokens", "8", "--steps", "4"]


# --- characters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("ascii", "≤ 3 ± 1…", "<= 3 +/- 1..."),
        ("cp1252", "≤ 3 ± 1…", "<= 3 ± 1…"),
        ("latin-1", "≤ 3 ± 1…", "<= 3 ± 1..."),
        ("utf-8", "≤ 3 ± 1…", "≤ 3 ± 1…"),
        ("utf-16", "≤ 3 ± 1…", "≤ 3 ± 1…"),
        (None, "≤", "≤"),
        ("ascii", "┏━┓│█▏", "+-+|##"),
        ("ascii", "é 中 😀", r"\xe9 \u4e2d \U0001f600"),
        ("utf-8", "a\udcffb", r"a\udcffb"),
        ("cp437", "█▏≤中", "█#≤\\u4e2d"),
        ("shift_jis", "中é\\", "中\\xe9\\"),
    ],
)
def test_characters_that_an_encoding_lacks_are_written_another_way(encoding, text, expected):
    assert fitted(text, encoding) == expected
    if encoding is not None:
        raw = io.BytesIO()
        stream = SafeStream(io.TextIOWrapper(raw, encoding=encoding, newline="\n"))
        stream.write(text)
        stream.flush()
        assert raw.getvalue().decode(encoding) == expected


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_terminal_that_cannot_encode_what_is_printed(
    exports, prose, monkeypatch, capsys, encoding
):
    words = ["perplexity", str(exports / "a"), str(prose / "text.txt")]
    capsys.readouterr()
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert "≤" in plain
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert main(words) == 0
    shown = raw.getvalue().decode(encoding)
    sign = "+/-" if encoding == "ascii" else "±"
    assert shown == plain.replace("≤", "<=").replace("±", sign)


@pytest.mark.slow
def test_a_locale_without_unicode(exports):
    """Prompts are UTF-8 there, too: Python hands their bytes through."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["generate", exports / "a", "café ≤", *SMALL, "--json"]
    done = finished([sys.executable, "-m", "textdiff", *words], env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["prompt"] == "café ≤"


@pytest.mark.parametrize("flag", ["", "--stop", "--ban", "--suffix", "--regex"])
def test_prompts_that_are_not_utf8_are_refused(exports, capsys, flag):
    words = ["generate", str(exports / "a"), *([flag] if flag else []), "x\udcff"]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert "not UTF-8" in shown


@pytest.mark.parametrize(
    "words",
    [
        ["perplexity", "x\udcff", "{text}"],
        ["train", "x\udcff"],
        ["tokenizer", "train", "x\udcff", "{text}", "--kind", "byte"],
        ["x\udcff"],
    ],
)
def test_names_that_are_not_utf8_end_with_a_sentence(prose, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main([word.format(text=prose / "text.txt") for word in words]) in (1, 2)
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert "x\\udcff" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_name_is_not_utf8_is_read(exports, prose, tmp_path, capsys):
    path = tmp_path / "x\udcff.txt"
    path.write_text((prose / "text.txt").read_text())
    capsys.readouterr()
    assert main(["perplexity", str(exports / "a"), str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["command"][0] == "textdiff"


def test_json_is_ascii_whatever_the_terminal(exports, capsys):
    capsys.readouterr()
    assert main(["generate", str(exports / "a"), "café ≤", *SMALL, "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert json.loads(shown)["prompt"] == "café ≤"


# --- streams that fail ---------------------------------------------------------------------------


class Broken(io.StringIO):
    """A standard stream that takes nothing."""

    def __init__(self, error: Exception, terminal: bool):
        super().__init__()
        self.error, self.terminal, self.pending = error, terminal, False

    def write(self, text: str) -> int:
        self.pending = True
        raise self.error

    def flush(self) -> None:
        if self.pending:
            raise self.error

    def isatty(self) -> bool:
        return self.terminal


FULL = OSError(errno.ENOSPC, "No space left on device")
ERRORS = {
    "encoding": UnicodeEncodeError("ascii", "≤", 0, 1, "ordinal not in range"),
    "pipe": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "terminal": OSError(errno.EIO, "Input/output error"),
    "full": FULL,
    "closed": ValueError("I/O operation on closed file"),
}

CONFIG = """
data: {{sources: [{{source: {folder}/corpus.txt}}], sequence_length: 32, cache_dir: cache}}
tokenizer: {{kind: byte}}
model: {{hidden_size: 16, num_layers: 1, num_heads: 2}}
train: {{steps: 4, global_batch_size: 4, micro_batch_size: 4, warmup_steps: 2, log_every: 1,
         checkpoint_every: 4, mixed_precision: fp32}}
evaluate: {{every: 2}}
sample: {{num_samples: 1, max_new_tokens: 8}}
run: {{dir: run}}
"""

VERBS = {
    "train": "train {folder}/c.yaml",
    "perplexity": "perplexity {a} {text} --per-document docs.jsonl",
    "perplexity --json": "perplexity {a} {text} --json --per-document docs.jsonl",
    "compare": "compare {a} {b} {text}",
    "generate": "generate {a} the --max-new-tokens 8 --steps 4 --film f.html --trace t.jsonl",
    "generate --watch": "generate {a} the --max-new-tokens 8 --watch --trace t.jsonl",
    "generate --json": "generate {d} the --max-new-tokens 8 --json --film f.html",
    "generate --input": "generate {a} --max-new-tokens 8 --input {rows} --output out.jsonl",
    "evaluate": "evaluate {a} --num-samples 8 --max-new-tokens 8 --resamples 100 --output e.json",
    "data prepare": "data prepare {folder}/c.yaml",
    "data inspect": "data inspect {folder}/c.yaml",
    "tokenizer train": "tokenizer train tok {text} --kind char",
    "play": "play {a} --max-new-tokens 4",
    "plan": "plan {folder}/c.yaml",
    "config show": "config show {folder}/c.yaml",
}
FILES_ARE_THE_RESULT = {"train", "data prepare", "tokenizer train", "generate --input"}
SAID = "the cat\n/save s.jsonl\n/film f.html\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    (folder / "corpus.txt").write_text("".join(f"Line {i} of {i * i}.\n" for i in range(200)))
    (folder / "rows.jsonl").write_text('{"prompt": "the"}\n{"prompt": "a"}\n')
    (folder / "c.yaml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture
def do(exports, prose, folder, tmp_path, monkeypatch):
    """Runs a verb in a new folder; gives its exit code and what it wrote."""
    monkeypatch.setattr("textdiff.view.live.SECONDS", 0.0)

    def run(verb: str, name: str) -> tuple[int, dict[str, bytes]]:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(sys, "stdin", io.StringIO(SAID))
        places = {"folder": folder, "text": prose / "text.txt", "rows": folder / "rows.jsonl"}
        places |= {model: exports / model for model in "abd"}
        code = main(VERBS[verb].format(**places).split())
        return code, results()

    return run


def results() -> dict[str, bytes]:
    """What a verb wrote in the current folder, without times."""
    found = {}
    for path in sorted(Path().rglob("*")):
        if path.is_file() and path.suffix not in (".lock", ".0") and "env.json" not in str(path):
            content = path.read_bytes()
            if path.name == "metrics.jsonl":
                content = re.sub(rb'"(tokens_per_second|data_wait)": [^,}]*', b"", content)
            found[str(path)] = content
    for name in [name for name in found if "tensorboard" in name or name.endswith(".lock")]:
        del found[name]
    return found


@pytest.fixture(scope="module")
def undisturbed():
    """What each verb writes when nothing fails."""
    return {}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_screen_that_fails_costs_no_result(do, undisturbed, monkeypatch, verb, error):
    if verb not in undisturbed:
        code, undisturbed[verb] = do(verb, "undisturbed")
        assert code == 0
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Broken(ERRORS[error], terminal=True))
    code, found = do(verb, "broken")
    assert code == int(error == "full" and verb not in FILES_ARE_THE_RESULT)
    assert found == undisturbed[verb]


def test_a_full_disk_behind_standard_output_is_an_error(exports, prose, monkeypatch, capsys):
    """What should have been kept is lost, and whatever comes next must not rely on it."""
    monkeypatch.setattr(sys, "stdout", Broken(FULL, terminal=False))
    assert main(["perplexity", str(exports / "a"), str(prose / "text.txt")]) == 1
    assert capsys.readouterr().err == "textdiff: error: standard output: No space left on device\n"


@pytest.mark.parametrize("broken", ["update", "start", "stop", "add_task"])
def test_a_progress_bar_that_fails_costs_no_result(do, undisturbed, monkeypatch, capsys, broken):
    def fail(*arguments, **options):
        raise RuntimeError("a bug")

    if "train" not in undisturbed:
        undisturbed["train"] = do("train", "undisturbed")[1]
    monkeypatch.setattr(sys, "stdout", Broken(ERRORS["pipe"], terminal=True))
    monkeypatch.setattr(f"rich.progress.Progress.{broken}", fail)
    capsys.readouterr()
    code, found = do("train", "broken")
    assert (code, found) == (0, undisturbed["train"])
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_a_view_that_fails_is_off_and_says_so_once(capsys):
    class View:
        closed = 0
        parts = ("draft",)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.closed += 1

        def show(self):
            raise ValueError("one\ntwo")

    view = View()
    with unfailing(view) as guarded:
        for _ in range(3):
            assert guarded.show() is None
        assert guarded.parts == ("draft",)
    assert view.closed == 1
    assert capsys.readouterr().err == "note: the display failed and is off (ValueError: one two)\n"
    with pytest.raises(KeyboardInterrupt), unfailing(view):
        raise KeyboardInterrupt


def test_the_streams_are_given_back():
    before = sys.stdin, sys.stdout, sys.stderr
    with safe_streams():
        assert isinstance(sys.stdout, SafeStream)
    assert (sys.stdin, sys.stdout, sys.stderr) == before
