"""Measurements that a run makes of itself, where it shows them, and its profile."""

import importlib.machinery
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from refusals import refused
from torch import optim
from torch.profiler import profile
from training_runs import assert_same_curve

from textdiff.cli import main
from textdiff.config import Config
from textdiff.errors import ConfigError
from textdiff.train import measure, profiling
from textdiff.train.device_peaks import device_peak, peak_flops
from textdiff.train.distributed import make_accelerator
from textdiff.train.measure import Meter
from textdiff.train.profiling import PHASES, StepProfile
from textdiff.train.run_state import EMA, RunState
from textdiff.train.trainer import Trainer
from textdiff.train.validation import Validation
from textdiff.view.training import describe_use

SHORT = ["--train.steps=6", "--train.log-every=2", "--train.checkpoint-every=4"]
SHORT += ["--evaluate.every=6", "--evaluate.max-documents=1"]


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("Tesla V100-SXM2-32GB", None, 15.7),
        ("AMD Instinct MI300X", 1307.4, 163.4),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA H100", None, None),  # which of them?
        ("Some Accelerator 9000", None, None),
    ],
)
def test_peaks_are_of_the_devices_that_are_listed(name, half, single):
    for bf16, value in ((True, half), (False, single)):
        assert peak_flops(name, bf16) == (None if value is None else value * 1e12)


def test_tf32_and_cpus_have_no_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda", 0)
    assert device_peak(torch.device("cpu"), bf16=False) is None
    assert device_peak(device, bf16=False) == 66.9 * 1e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert device_peak(device, bf16=False) is None
    assert device_peak(device, bf16=True) == 989.4 * 1e12


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that stands still unless it is moved."""
    moved = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: moved.now)
    return moved


def test_speed_waits_and_use_by_their_definitions(clock):
    def slowly():
        for batch in "abc":
            clock.now += 0.5
            yield batch

    meter = Meter(torch.device("cpu"), flops_per_token=2e9, peak=1e12)
    meter.restart(100)
    for _ in meter.fetched(slowly()):
        clock.now += 1.5  # a step
    measured = meter.values(700)
    assert measured == {"tokens_per_second": 100.0, "data_wait": 0.25, "mfu": 0.2}
    meter.restart(700)
    clock.now += 2.0
    assert meter.values(800) == {"tokens_per_second": 50.0, "data_wait": 0.0, "mfu": 0.1}
    with meter.paused():
        clock.now += 5.0
    clock.now += 2.0
    assert meter.values(900) == {"tokens_per_second": 50.0, "data_wait": 0.0, "mfu": 0.1}
    assert describe_use({"mfu": 0.412, "memory": 31.4e9}) == "  41.2% MFU  31.4 GB"


def test_memory_is_the_allocators_peak_since_the_last_line(clock, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: calls.append(d))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 10 * len(calls))
    meter = Meter(device := torch.device("cuda", 1), 1.0, None)
    meter.restart(0)
    clock.now = 1.0
    assert meter.values(5) == {"tokens_per_second": 5.0, "data_wait": 0.0, "memory": 20}
    assert calls == [device, device]


def test_bounds_and_checkpoints_do_not_slow_the_steps(runs, clock, monkeypatch):
    """They fall between lines of the log, where nothing restarts the clock."""

    def lasting(call, seconds):
        def longer(*arguments):
            clock.now += seconds
            return call(*arguments)

        return longer

    monkeypatch.setattr(Trainer, "_step", lasting(Trainer._step, 2.0))
    monkeypatch.setattr(Validation, "measure", lasting(Validation.measure, 50.0))
    monkeypatch.setattr(RunState, "save", lasting(RunState.save, 70.0))
    flags = ("--train.log-every=3", "--train.checkpoint-every=2", "--evaluate.every=4")
    lines = runs.train("paused", *SHORT, *flags)
    assert [x["tokens_per_second"] for x in lines if "loss" in x] == [8 * 32 / 2.0] * 2


# --- trackers ------------------------------------------------------------------------------------


class Service:
    """A stand-in for the modules `wandb` and `trackio`: what they are called with."""

    def __init__(self, name: str):
        self.starts: list[dict] = []
        self.lines: list[dict] = []
        self.config: dict = {}
        self.finished = 0
        self.module = ModuleType(name)
        self.module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.module.init = self.init
        self.module.config = SimpleNamespace(update=self.update)

    def init(self, project, name=None, resume="never", **more):
        self.starts.append({"project": project, "name": name, "resume": resume, **more})
        return SimpleNamespace(config=self.module.config, log=self.log, finish=self.finish)

    def update(self, values, allow_val_change=False):
        self.config |= values

    def log(self, values, step=None):
        self.lines.append({"step": step, **values})

    def finish(self):
        self.finished += 1


@pytest.fixture
def services(monkeypatch) -> dict[str, Service]:
    made = {name: Service(name) for name in ("wandb", "trackio")}
    for name, service in made.items():
        monkeypatch.setitem(sys.modules, name, service.module)
    return made


def test_trackers_get_the_metrics_and_a_resumed_run_goes_on(runs, services):
    flags = [*SHORT, '--train.log-with=["wandb", "trackio", "tensorboard"]']
    lines = runs.train("tracked", *flags)
    folder = runs / "tracked"
    run = json.loads((folder / "trackers.json").read_text())["id"]
    names = {"wandb": "tracked", "trackio": f"tracked-{run}"}
    for name, service in services.items():
        (start,) = service.starts
        assert (start["project"], start["name"]) == ("textdiff", names[name])
        assert start["resume"] == "allow"
        assert service.config["train"]["steps"] == 6
        assert service.lines == lines
        assert service.finished == 1
    assert services["wandb"].starts[0]["id"] == run
    assert services["wandb"].starts[0]["dir"] == str(folder)
    assert list((folder / "tensorboard").glob("events.*"))
    runs.train("tracked", *flags, "--train.steps=8", "--train.lr-schedule=constant")
    assert services["wandb"].starts[1] == services["wandb"].starts[0]
    assert services["trackio"].starts[1] == services["trackio"].starts[0]
    assert services["wandb"].lines[-1]["step"] == 8
    runs.train("tracked", *flags, "--resume=never")
    assert services["wandb"].starts[2]["id"] != run


@pytest.mark.parametrize("folder", [True, False])
def test_a_missing_tracker_is_refused_before_anything_is_read(tmp_path, monkeypatch, folder):
    spec = importlib.machinery.ModuleSpec("trackio", None, is_package=True) if folder else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    raw = {"run": {"dir": str(tmp_path / "run")}, "train": {"log_with": ["trackio"]}}
    with refused(ConfigError, "missing_tracker", "pip install 'textdiff[trackio]'"):
        make_accelerator(Config.model_validate(raw))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_is_a_sentence(runs, services, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise RuntimeError("api_key not configured (no-tty). call wandb.login()")

    monkeypatch.setattr(services["wandb"].module, "init", refuse)
    flags = (f"--run.dir={runs / 'locked out'}", "--train.log-with=wandb", *SHORT)
    assert main(["train", str(runs / "c.yaml"), *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "wandb cannot start (api_key not configured" in line


# --- profile -------------------------------------------------------------------------------------


def moving(clock, seconds: float, function):
    """The same function, which takes some seconds."""

    def slow(*given):
        clock.now += seconds
        return function(*given)

    return slow


def test_a_profile_has_the_phases_of_its_steps_and_changes_nothing(
    runs, capsys, clock, monkeypatch
):
    monkeypatch.setattr(EMA, "update", moving(clock, 0.1, EMA.update))
    monkeypatch.setattr(optim.AdamW, "step", moving(clock, 0.02, optim.AdamW.step))
    monkeypatch.setattr(profile, "stop_trace", moving(clock, 5.0, profile.stop_trace))
    whole = runs.train("unprofiled", *SHORT, "--train.micro-batch-size=4")
    capsys.readouterr()
    profiled = runs.train("profiled", *SHORT, "--train.micro-batch-size=4", "--train.profile=2")
    assert_same_curve(profiled, whole, rel=0.0)
    said = " ".join(capsys.readouterr().out.split())
    trace = json.loads((runs / "profiled" / "profile" / "steps-4-5.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert [names.count(name) for name in PHASES] == [4, 4, 4, 4, 2]  # two micro-batches each
    times = {name: float(re.search(rf" {name} ([\d.]+)[,;]", said)[1]) for name in PHASES}
    step = float(re.search(r"steps 4 to 5 took ([\d.]+) ms each", said)[1])
    assert times == {"data": 0, "forward": 0, "backward": 0, "optimizer": 20.0, "averages": 100.0}
    assert step == sum(times.values())
    assert not (runs / "unprofiled" / "profile").exists()


def test_the_time_of_a_profiled_step_is_its_own(clock, tmp_path, monkeypatch):
    """The profiler takes longer to begin, and to put its events together."""

    class Slow(SimpleNamespace):
        steps = 0

        def start(self):
            clock.now += 30.0

        def step(self):
            self.steps += 1
            clock.now += 50.0 if self.steps in (3, 5) else 0.0
            if self.steps == 5:
                self.on_trace_ready(self)

        def export_chrome_trace(self, path):
            Path(path).write_text("{}")

        def stop(self):
            clock.now += 70.0

    monkeypatch.setattr(profiling, "profile", Slow)
    said = []
    with StepProfile(2, torch.device("cpu"), tmp_path / "profile", said.append) as profile:
        for step in range(1, 7):
            with profile.phase("forward"):
                clock.now += 1.0
            clock.now += 0.5
            profile.stepped(step)
            clock.now += 0.25
    assert "steps 4 to 5 took 1750.0 ms each under the profiler: data 0.0, forward 1000" in said[0]


def test_a_run_that_is_too_short_for_its_profile_says_so(runs, capsys):
    runs.train("brief", *SHORT, "--train.profile=50")
    assert "there were 6 in all; no trace was written" in " ".join(capsys.readouterr().out.split())
    assert not (runs / "brief" / "profile").exists()
