"""Terminals and readers that go away, and streams that were never there."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from children import child, finished, wait_until

from textdiff.cli import main
from textdiff.commands.session import Session
from textdiff.pipeline import TextDiffusion
from textdiff.signals import Interruption, StopRequest, interruptible
from textdiff.view.display import TextPrinter

CONFIG = """
data: {{sources: [{{source: {folder}/corpus.txt}}], sequence_length: 32, cache_dir: {folder}/cache}}
tokenizer: {{kind: byte}}
model: {{hidden_size: 32, num_layers: 2, num_heads: 2}}
train: {{steps: 60, global_batch_size: 4, micro_batch_size: 4, warmup_steps: 2, log_every: 2,
         checkpoint_every: 1000, mixed_precision: fp32}}
evaluate: {{every: 1000}}
sample: {{num_samples: 1, max_new_tokens: 8}}
"""
MODULE = [sys.executable, "-m", "textdiff"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hangup")
    (folder / "corpus.txt").write_text("".join(f"Line {i} of {i * i}.\n" for i in range(300)))
    (folder / "c.yaml").write_text(CONFIG.format(folder=folder))
    return folder / "c.yaml"


@pytest.fixture(autouse=True)
def default_hangup():
    """Tests that were started by `nohup` have it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def steps(run: Path) -> list[int]:
    """The steps that a run has logged."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


# --- signals -------------------------------------------------------------------------------------


def test_a_terminal_that_closes_may_say_so_twice():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == signal.SIGHUP
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_run_stops_although_nobody_reads_what_it_prints():
    """A full pipe, as a terminal that Ctrl-S has stopped: the write waits, and the run with it."""
    program = (
        "import sys\nfrom textdiff.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    while not stop.signal:\n        print('x' * 1000, flush=True)\n"
        "sys.exit(7)"
    )
    with child([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=None) as process:
        wait_until(process, lambda: waiting(process.stdout.fileno()) >= 60_000)
        time.sleep(0.2)  # now it waits for room
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 7


def waiting(pipe: int) -> int:
    """The bytes in a pipe."""
    count = fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))
    return int.from_bytes(count, sys.byteorder)


def test_a_run_that_ignores_hangups_goes_on():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    with interruptible(), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_hangup_interrupts_once():
    with interruptible():
        with pytest.raises(Interruption) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught.value.number == signal.SIGHUP
        os.kill(os.getpid(), signal.SIGHUP)  # while files are closed
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_handlers_of_the_caller_stay():
    heard = []
    signal.signal(signal.SIGHUP, lambda number, frame: heard.append(number))
    with interruptible():
        os.kill(os.getpid(), signal.SIGHUP)
    assert heard == [signal.SIGHUP]


def test_a_hangup_keeps_what_was_generated(exports, tmp_path, monkeypatch, capsys):
    """The film and the trace hold what there was, as after Ctrl-C."""
    step, seen = TextPrinter.step, []

    def hang_up(texts, change):
        step(texts, change)
        seen.append(change)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(TextPrinter, "step", hang_up)
    film, trace = tmp_path / "f.html", tmp_path / "t.jsonl"
    words = ["generate", str(exports / "d"), "the", "--max-new-tokens", "20"]
    assert main([*words, "--film", str(film), "--trace", str(trace)]) == 129
    assert "0 of 1 texts were finished" in capsys.readouterr().err
    assert "</html>" in film.read_text()
    assert all(map(json.loads, trace.read_text().splitlines()))
    assert trace.read_text()


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_hangup_ends_a_session(exports, monkeypatch, by_hand):
    def hang_up(session, line):
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(Session, "take", hang_up)
    stdin = io.StringIO("the\nthe\n")
    monkeypatch.setattr(stdin, "isatty", lambda: by_hand)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["play", str(exports / "a")]) == 129


@pytest.mark.slow
def test_a_terminal_that_closes_saves_the_run(config, tmp_path):
    """What a window's cross, or a lost connection, does to a run with its bar on the screen."""
    run = tmp_path / "run"
    words = ["train", str(config), f"--run.dir={run}", "--train.steps=100000"]
    pid, master = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*MODULE, *words], {**os.environ, "TERM": "xterm"})
    until = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(steps(run)) > 5):
        assert time.monotonic() < until
        if select.select([master], [], [], 0.1)[0]:
            os.read(master, 4096)
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    (saved,) = (run / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) >= steps(run)[-1]
    assert (run / "export" / "model.safetensors").exists()


# --- readers -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(config, tmp_path):
    """`textdiff train … | head -2`, with standard input and standard error closed."""
    words = ["bash", "-c", 'exec "$@" <&- 2>&-', "-", *MODULE, "train", config]
    with child([*words, f"--run.dir={tmp_path / 'run'}"], stderr=None) as process:
        for _ in range(2):
            assert process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0
    assert steps(tmp_path / "run") == list(range(2, 61, 2))
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(config, exports, prose, tmp_path, closed):
    lines = tmp_path / "lines.jsonl"
    for words in (
        ["perplexity", exports / "a", prose / "text.txt", "--per-document", lines],
        ["train", config, f"--run.dir={tmp_path / 'run'}", "--train.steps=4"],
    ):
        done = finished(["bash", "-c", f'exec "$@" {closed}', "-", *MODULE, *words])
        assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(lines.read_text())["tokens"] == 147
    assert steps(tmp_path / "run") == [2, 4]


def test_generation_ends_with_its_reader(exports, tmp_path, monkeypatch):
    """`generate --num-samples 1000 | head -1` has nothing to do for the other texts."""
    made = []
    finish = TextPrinter.finished

    def count(texts, row, result):
        made.append(row)
        finish(texts, row, result)

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(TextPrinter, "finished", count)
    monkeypatch.setattr(sys, "stdout", Gone())
    words = ["generate", str(exports / "a"), "--max-new-tokens", "4", "--num-samples", "5"]
    assert main([*words, "--batch-size", "1"]) == 1
    assert len(made) == 1
    made.clear()  # with a film there is something left to do
    assert main([*words, "--batch-size", "1", "--film", str(tmp_path / "f.html")]) == 0
    assert len(made) == 5


def test_texts_are_printed_where_the_film_cannot_be_written(exports, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "f.html")

    monkeypatch.setattr("textdiff.view.recorders.Film.close", full)
    words = ["generate", str(exports / "a"), "the", "--max-new-tokens", "4", "--json"]
    assert main([*words, "--film", str(tmp_path / "f.html")]) == 1
    shown = capsys.readouterr()
    model = TextDiffusion.from_pretrained(exports / "a")
    assert (
        json.loads(shown.out)["samples"][0]["text"]
        == model.generate("the", max_new_tokens=4).texts[0]
    )
    assert shown.err == "textdiff: error: f.html: No space left on device\n"
