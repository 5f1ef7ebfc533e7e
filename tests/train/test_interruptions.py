"""What a run survives: other runs, full disks, damaged files, broken samples, kills in between."""

import errno
import gc
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from children import child, finished
from torch import nn

from textdiff.cli import main
from textdiff.config import Config
from textdiff.errors import CheckpointError
from textdiff.loss import DenoisingLoss
from textdiff.signals import StopRequest
from textdiff.storage import report_failed_writes, sweep, whole_folder
from textdiff.train.batches import TrainingBatches
from textdiff.train.checkpoint import checkpoints, damage
from textdiff.train.directory import run_lock
from textdiff.train.divergence import DivergenceGuard
from textdiff.train.measure import TIMED
from textdiff.train.reporter import MetricsFile
from textdiff.train.setup import check_resume
from textdiff.train.trainer import Trainer
from textdiff.train.validation import Validation

CONFIG = """
data: {{sources: [{{source: {folder}/corpus.txt}}], sequence_length: 32,
       cache_dir: {folder}/cache}}
tokenizer: {{kind: byte}}
model: {{hidden_size: 32, num_layers: 2, num_heads: 2}}
train: {{steps: 12, global_batch_size: 4, micro_batch_size: 2, warmup_steps: 2, log_every: 4,
         checkpoint_every: 4, mixed_precision: fp32}}
evaluate: {{every: 6}}
sample: {{num_samples: 0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interruptions")
    (folder / "corpus.txt").write_text("".join(f"Line {i} of {i * i}.\n" for i in range(300)))
    (folder / "c.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def train(folder: Path, run: Path, *flags: str) -> int:
    return main(["train", str(folder / "c.yaml"), f"--run.dir={run}", *flags])


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """A run that nothing disturbed."""
    assert train(folder, folder / "whole") == 0
    return folder / "whole"


@pytest.fixture
def half(folder, whole, tmp_path) -> Path:
    """A copy of that run, as it was at step 8."""
    run = tmp_path / "half"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-000012")
    return run


def outcome(run: Path) -> tuple[list[dict], bytes]:
    """The fields that must agree bit for bit, and the weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: line[key] for key in line if key not in TIMED} for line in lines]
    return lines, (run / "export" / "model.safetensors").read_bytes()


def said(capsys) -> str:
    """The one line on standard error."""
    shown = capsys.readouterr().err
    assert len(shown.strip().splitlines()) == 1, shown
    return shown


# --- interruptions at awkward places -------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 6, 7, 12])
def test_a_signal_at_any_step_changes_no_bit(folder, whole, tmp_path, monkeypatch, at):
    """Off the log interval, where a bound is due, and at the very last step."""
    step = Trainer._step
    stops = []
    enter = StopRequest.__enter__

    def remember(stop):
        stops.append(stop)
        return enter(stop)

    def interrupted(trainer, *arguments):
        result = step(trainer, *arguments)
        if trainer.progress.step == at:
            stops[-1].signal = signal.SIGTERM
        return result

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "__enter__", remember)
        patch.setattr(Trainer, "_step", interrupted)
        assert train(folder, tmp_path / "run") == 143
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")][-1] == f"step-{at:06d}"
    assert train(folder, tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize("at", [6, 12])
def test_a_signal_during_a_bound_does_not_wait_for_it(folder, whole, tmp_path, monkeypatch, at):
    """The run saves at once; the next one begins with the bound and changes no bit."""
    bound, progressed, calls = Validation.bound, Validation._progressed, []

    def bounded(validation, block_size):
        calls.append([])
        return bound(validation, block_size)

    def interrupted(validation, done, total):
        calls[-1].append((done, total))
        if len(calls) == at // 6:
            os.kill(os.getpid(), signal.SIGTERM)
        progressed(validation, done, total)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "bound", bounded)
        patch.setattr(Validation, "_progressed", interrupted)
        assert train(folder, tmp_path / "run") == 143
    [(done, total)] = calls[-1]
    assert done < total
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")][-1] == f"step-{at:06d}"
    assert train(folder, tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def test_metrics_survive_a_kill_before_they_are_rewritten(folder, whole, half, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        assert train(folder, half) == 130
    assert train(folder, half) == 0
    assert outcome(half) == outcome(whole)


def test_what_kills_leave_is_put_in_order(folder, whole, half, capsys):
    root = half / "checkpoints"
    (root / ".partial-step-000012").mkdir()
    (root / ".partial-step-000012" / "model.safetensors").write_bytes(b"half")
    (root / "step-000008").rename(root / ".old-step-000008")  # between the two renames
    (half / "export").rename(half / ".old-export")
    assert train(folder, half) == 0
    assert "step 8 of 12" in capsys.readouterr().out
    assert [path.name for path in half.rglob(".*-*")] == []
    assert outcome(half) == outcome(whole)


@pytest.mark.parametrize("death", range(1, 8))
def test_a_folder_is_whole_whenever_its_writer_dies(tmp_path, monkeypatch, death):
    """Death before the n-th call that changes a name or deletes; then the next start."""
    target = tmp_path / "step-000001"
    with whole_folder(target, "") as folder:
        (folder / "x").write_text("old")
    calls = []

    def dying(function):
        def call(*arguments, **options):
            calls.append(function)
            if len(calls) == death:
                raise KeyboardInterrupt  # no clean-up follows it, as after SIGKILL
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(Path, "mkdir", dying(Path.mkdir))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        patch.setattr(os, "fsync", dying(os.fsync))
        try:
            with whole_folder(target, "") as folder:
                (folder / "x").write_text("new")
        except KeyboardInterrupt:
            pass
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert (target / "x").read_text() in ("old", "new")


@pytest.mark.parametrize("victims", [1, 2])
def test_a_killed_data_loader_worker_is_told_in_a_sentence(
    folder, whole, tmp_path, monkeypatch, capsys, victims
):
    step, ignored, before = Trainer._step, [], psutil.Process().children()

    def losing(trainer, *arguments):
        if trainer.progress.step == 5:
            children = [child for child in psutil.Process().children() if child not in before]
            assert len(children) >= 2
            for worker in children[:victims]:
                worker.kill()
        return step(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", losing)
        patch.setattr(sys, "unraisablehook", lambda failure: ignored.append(failure.exc_value))
        assert train(folder, tmp_path / "run", "--data.num-workers=2") == 1
        gc.collect()
    shown = said(capsys)
    assert "a data-loader worker ended unexpectedly" in shown
    assert "data.num_workers" in shown
    assert ignored == []
    assert train(folder, tmp_path / "run", "--data.num-workers=2") == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def test_what_a_worker_raises_itself_is_passed_on(folder, tmp_path, monkeypatch):
    before = psutil.Process().children()

    def fail(batches, index):
        raise FileNotFoundError("of a row")

    monkeypatch.setattr(TrainingBatches, "__getitem__", fail)
    with pytest.raises(FileNotFoundError, match="of a row"):
        train(folder, tmp_path / "run", "--data.num-workers=1", "--debug")
    assert set(psutil.Process().children()) <= set(before)  # the error does not keep them


def test_a_run_that_is_done_says_so(folder, half, capsys):
    assert train(folder, half, "--train.steps=6") == 0
    shown = capsys.readouterr().out
    assert "nothing is left to train: the run has made 8 steps, and train.steps is 6" in shown


# --- two runs in one directory -------------------------------------------------------------------


HOLD = """
import os, sys, time
from pathlib import Path
from textdiff.train.directory import run_lock

with run_lock(Path(sys.argv[1])):
    if sys.argv[2:] and os.fork() == 0:
        time.sleep(60)  # as a data-loader worker that outlives its run
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(directory: Path, *worker: str) -> Iterator[subprocess.Popen]:
    """Another process that trains in a directory, as far as the lock can tell."""
    with child([sys.executable, "-c", HOLD, directory, *worker]) as process:
        assert process.stdout.readline() == "held\n"
        yield process


def test_second_run_is_refused_and_a_dead_one_is_not_in_the_way(folder, tmp_path, capsys):
    run = tmp_path / "run"
    with holder(run, "worker") as first:
        assert train(folder, run) == 1
        shown = said(capsys)
        assert f"process {first.pid} on {socket.gethostname()} since 20" in shown
        assert "another run.dir" in shown
        assert not (run / "config.yaml").exists()
        first.kill()
        first.wait()
        with run_lock(run):
            pass


def test_a_lock_that_cannot_say_whose_it_is(tmp_path):
    with holder(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(CheckpointError) as error, run_lock(tmp_path):
            pass
        assert error.value.code == "locked"


def test_starting_over_keeps_the_directory_locked(folder, half, monkeypatch):
    held = []

    def look(trainer):
        held.append(finished([sys.executable, "-c", HOLD, half]).stderr.splitlines()[-1])
        return 0

    monkeypatch.setattr(Trainer, "run", look)
    monkeypatch.setattr("textdiff.commands.train._show_result", lambda *arguments: None)
    assert train(folder, half, "--resume=never") == 0
    assert [f"another process trains in {half}" in line for line in held] == [True]
    assert half.with_name("half.old-1").exists()


# --- places that cannot be written ---------------------------------------------------------------


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Stands for a full disk: every write may fail halfway."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("largest", ["model.safetensors", "optimizer.pt"])
def test_a_file_that_cannot_grow_ends_the_run_with_a_sentence(folder, half, capsys, largest):
    before = {p: p.read_bytes() for p in (half / "checkpoints").rglob("*") if p.is_file()}
    export = (half / "export" / "model.safetensors").read_bytes()
    with no_file_larger_than(len(before[half / "checkpoints" / "step-000008" / largest]) - 1000):
        assert train(folder, half) == 1
    shown = said(capsys)
    assert f"cannot write {half / 'checkpoints' / 'step-000012'}: " in shown
    assert "File too large" in shown
    assert "step-000008" in shown  # what is left
    assert "start the same command again" in shown
    assert {p: p.read_bytes() for p in (half / "checkpoints").rglob("*") if p.is_file()} == before
    assert (half / "export" / "model.safetensors").read_bytes() == export
    assert [path.name for path in half.rglob(".*-*")] == []


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "in {run}"),
        (PermissionError(errno.EACCES, "Permission denied", "x.jsonl"), "x.jsonl"),
    ],
)
def test_what_a_run_notes_beside_its_checkpoints_may_not_be_written(
    folder, whole, half, monkeypatch, capsys, error, where
):
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", lambda *arguments: (_ for _ in ()).throw(error))
        assert train(folder, half) == 1
    shown = said(capsys)
    assert f"cannot write {where.format(run=half)}: {error.strerror}; the newest" in shown
    assert "step-000008; make room" in shown
    assert train(folder, half) == 0
    assert outcome(half) == outcome(whole)


def test_a_thread_that_cannot_write_leaves_the_word_to_the_run(tmp_path, monkeypatch):
    """TensorBoard writes in a thread, and raises in the next call what happened there."""
    heard = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: heard.append(failure.exc_type))

    def fail(error):
        raise error

    with report_failed_writes(tmp_path, lambda: ""):
        for error in (OSError(errno.ENOSPC, "full"), ValueError("a bug")):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
    assert heard == [ValueError]


@pytest.mark.parametrize("function", ["save_file", "torch.save"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "no")]
)
def test_each_writer_may_fail(folder, whole, half, monkeypatch, capsys, function, error):
    def fail(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"textdiff.train.checkpoint.{function}", fail)
        assert train(folder, half) == 1
    shown = said(capsys)
    assert error.strerror in shown
    assert "the newest checkpoint is" in shown
    assert damage(half / "checkpoints" / "step-000008") is None
    assert train(folder, half) == 0
    assert outcome(half) == outcome(whole)


def test_an_error_that_is_none_of_writing_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), report_failed_writes(tmp_path, lambda: ""):
        (tmp_path / "missing").read_text()


def test_a_directory_that_cannot_be_made(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(folder, tmp_path / "file" / "run") == 1
    assert "cannot write in run.dir" in said(capsys)


# --- what may change on resumption ---------------------------------------------------------------

STATE = {"config": Config().model_dump(mode="json"), "corpus": {"train": {"tokens": 10}}}
CHANGES = {
    "logging": "--train.log-every=2",
    "evaluation": "--evaluate.replicates=9",
    "checkpoints": "--train.checkpoint-every=3",
    "samples": "--sample.steps=5",
    "horizon": "--train.steps=15",
    "schedule": "--train.lr-schedule=constant",
    "split": "--train.micro-batch-size=4",
    "workers": "--data.num-workers=1",
}


@pytest.mark.parametrize("flag", CHANGES.values(), ids=CHANGES.keys())
def test_what_does_not_define_the_run_may_change(folder, half, capsys, flag):
    assert train(folder, half, flag) == 0
    assert "step 8 of 1" in capsys.readouterr().out


def test_what_defines_the_run_may_not_and_all_of_it_is_named(folder, half, capsys):
    flags = ("--model.num-layers=3", "--data.validation=0.1", "--train.learning-rate=0.5")
    assert train(folder, half, *flags) == 1
    shown = said(capsys)
    for part in ("model.num_layers = 2", "data.validation = 0.05", "train.learning_rate = 0.001"):
        assert part in shown
    assert "--resume never" in shown


def test_a_corpus_with_other_text_is_refused(folder, half, tmp_path, capsys):
    text = (folder / "corpus.txt").read_text()
    (folder / "corpus.txt").write_text(text.replace("Line", "Lime"))
    try:
        assert train(folder, half) == 1
    finally:
        (folder / "corpus.txt").write_text(text)
    shown = said(capsys)
    assert "corpus is not what" in shown
    assert "sources.0.sha256" in shown


def test_another_corpus_is_refused_before_its_texts_are_cut(folder, half, monkeypatch, capsys):
    # Texts that the run's tokenizer does not know would be refused there, in misleading words.
    monkeypatch.setattr(Validation, "__init__", lambda *made_of: pytest.fail("too early"))
    text = (folder / "corpus.txt").read_text()
    (folder / "corpus.txt").write_text(text + "\nA last line.\n")
    try:
        assert train(folder, half) == 1
    finally:
        (folder / "corpus.txt").write_text(text)
    shown = said(capsys)
    assert "corpus is not what" in shown
    assert shown.count(" was ") == 4  # the run's own "was", and three differences
    assert "more; restore the texts" in shown


def test_configs_from_before_a_key_existed_and_after_it_went():
    config = Config()
    older = json.loads(json.dumps(STATE))
    del older["config"]["train"]["grad_clip"]
    check_resume(config, STATE["corpus"], older, Path("runs/x"))
    older["config"]["train"]["grad_clop"] = 1.0
    with pytest.raises(CheckpointError) as error:
        check_resume(config, STATE["corpus"], older, Path("runs/x"))
    assert error.value.code == "unknown_config"


def test_a_newer_checkpoint_is_refused_and_not_passed_over(folder, half, monkeypatch, capsys):
    def read(*arguments):
        pytest.fail("the corpus was read")

    monkeypatch.setattr("textdiff.commands.train._prepare", read)
    path = half / "checkpoints" / "step-000008" / "manifest.json"
    newer = {"format": 99, "textdiff": "9.0", "pieces": []}
    path.write_text(json.dumps(newer))
    for resume in ("auto", path.parent):
        assert train(folder, half, f"--resume={resume}") == 1
        shown = said(capsys)
        assert "textdiff 9.0 in format 99" in shown
        assert "update textdiff" in shown


@pytest.mark.parametrize("verb", ["generate", "perplexity", "export"])
def test_a_training_checkpoint_is_not_a_model(folder, whole, tmp_path, verb, capsys):
    more = {"generate": [], "perplexity": [folder / "corpus.txt"], "export": [tmp_path / "out"]}
    checkpoint = whole / "checkpoints" / "step-000012"
    assert main([verb, str(checkpoint), *map(str, more[verb])]) == 1
    shown = said(capsys)
    assert "is a training checkpoint" in shown
    assert f"give the run's export: {whole / 'export'}" in shown


# --- steps that are not finite -------------------------------------------------------------------


def poisoned(sample: int, batches: TrainingBatches, value: float):
    """A forward pass that breaks on one sample of the corpus."""
    forward = DenoisingLoss.forward
    row = torch.from_numpy(batches.sequences.rows([sample]).tokens)[0]

    def broken(module, batch):
        loss, nelbo = forward(module, batch)
        return (loss + value if (batch.x0 == row).all(1).any() else loss), nelbo

    return broken


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sample_that_breaks_training_is_named(
    folder, tmp_path, monkeypatch, capsys, value, optimizer
):
    run, made = tmp_path / "run", []
    start = Trainer._start

    def started(trainer):
        made.append(trainer)
        sample = 4 * 4 + 3  # slot 3 of the fifth step
        patch.setattr(DenoisingLoss, "forward", poisoned(sample, trainer.batches, value))
        start(trainer)

    flags = ("--train.log-every=7", f"--train.optimizer={optimizer}", "--evaluate.every=100")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_start", started)
        assert train(folder, run, *flags) == 1
    shown = said(capsys)
    for part in (
        "step 5 is not finite",
        "sample 19, mask rate 0.",
        "first parameter",
        "step-000004",
    ):
        assert part in shown
    record = json.loads((run / "divergence.json").read_text())
    assert [found["sample"] for found in record["samples"]] == [16, 17, 18, 19]
    assert [found["loss"] in ("nan", "inf") for found in record["samples"]] == [False] * 3 + [True]
    assert all(found["text"] for found in record["samples"])
    # Steps 5 to 7 left no trace: the weights are those of the checkpoint at step 4.
    from safetensors.torch import load_file

    kept = load_file(run / "checkpoints" / "step-000004" / "model.safetensors")
    for name, parameter in made[0].state.trained.named_parameters():
        assert torch.equal(parameter, kept[name]), name
    # Without the poison the run goes on as if it had never been there.
    assert train(folder, run, *flags) == 0
    assert train(folder, tmp_path / "clean", *flags) == 0
    assert outcome(run) == outcome(tmp_path / "clean")


@pytest.mark.parametrize(("size", "reason"), [(1e6, "more than a loss"), (torch.nan, "output is")])
def test_a_loss_that_is_infinite_says_why(folder, tmp_path, monkeypatch, capsys, size, reason):
    """Score entropy of outputs whose exponentials no float holds, and of a broken network."""
    start = Trainer._start

    def started(trainer):
        with torch.no_grad():
            trainer.state.exported.model.output_layer.linear.weight.normal_().mul_(size)
        start(trainer)

    monkeypatch.setattr(Trainer, "_start", started)
    objective = '--diffusion.objective={"kind": "sedd"}'
    assert train(folder, tmp_path / "run", objective, "--evaluate.every=100") == 1
    shown = " ".join(said(capsys).split())
    assert "step 1 is not finite" in shown
    assert reason in shown
    record = json.loads((tmp_path / "run" / "divergence.json").read_text())
    largest = [float(found["largest_output"]) for found in record["samples"]]
    assert all(value > 800.0 for value in largest) != bool(size != size)


def test_a_guarded_optimizer_steps_as_an_unguarded_one():
    torch.manual_seed(0)
    models = [nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
    guard = DivergenceGuard(optimizers[:1], torch.device("cpu"))
    for step in range(6):
        for model in models:
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
        assert guard.allows(nn.utils.clip_grad_norm_(models[0].parameters(), 1e9), step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(models[0].weight, models[1].weight)
    kept = models[0].weight.clone()
    for step in (6, 7):  # the second is fine, but comes after one that is not
        models[0].weight.grad = torch.full((3, 4), float("nan") if step == 6 else 1.0)
        guard.allows(models[0].weight.grad.norm(), step)
        optimizers[0].step()
    assert torch.equal(models[0].weight, kept)
    assert int(guard.step) == 6


def test_the_second_signal_aborts():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
