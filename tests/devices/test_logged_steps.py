"""Metrics and profiles of a run: the CPU reads nothing of the device that it did not before."""

from contextlib import nullcontext
from itertools import pairwise

from pretend import READ
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import Runs

from textdiff.train.measure import Meter
from textdiff.view.training import PlainView

FLAGS = ["--train.steps=6", "--train.log-every=6", "--train.micro-batch-size=4"]
FLAGS += ["--evaluate.every=6", "--evaluate.max-documents=1"]


class Reads(TorchDispatchMode):
    """Counts operations whose results the CPU has to read."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in READ
        return func(*args, **(kwargs or {}))


class Silent:
    """A meter that measures nothing."""

    flops_per_token = 0.0
    fetched, restart = staticmethod(iter), staticmethod(lambda tokens: None)
    paused = staticmethod(nullcontext)

    def values(self, tokens):
        return {"tokens_per_second": 1.0}


def test_measuring_and_profiling_read_nothing(tmp_path, request, monkeypatch):
    runs, mode, counts = Runs(tmp_path, request.config.rootpath), Reads(), []
    monkeypatch.setattr(PlainView, "stepped", lambda self, step: counts.append(mode.count))
    with mode:
        runs.train("measured", *FLAGS, "--train.profile=2")
        monkeypatch.setattr(Meter, "of", lambda *_: Silent())
        runs.train("silent", *FLAGS)
    by_step = [b - a for a, b in pairwise(counts)]
    assert by_step[:5] == by_step[6:]
    assert max(by_step[:5]) > 0  # data are made in this process, which reads its own numbers
