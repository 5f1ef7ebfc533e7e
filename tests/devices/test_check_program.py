"""`scripts/check_gpu.py`: its stages are chosen, limited in time, and their failures contained."""

import json
import os
import re
import signal
import warnings
from types import SimpleNamespace

import check_gpu as program
import pytest
import torch
from gpu_checks import numerics
from gpu_checks.cases import Case
from gpu_checks.checks import Check, contained, figure
from gpu_checks.device import set_up
from gpu_checks.speed import slowest_kernels
from gpu_checks.waits import waits_of_calls
from torch.autograd import DeviceType


def test_the_page_lists_all_stages_in_their_order():
    listed = re.findall(r"^\| `(\w+)` \|", program.__doc__, re.MULTILINE)
    assert listed == [stage.__name__ for stage in program.STAGES]


def test_the_result_is_written_after_each_stage(tmp_path, capsys, monkeypatch):
    output, before = tmp_path / "result.json", {}

    def small(device, folder):
        yield figure("number", 2.5, "units")

    def broken(device, folder):
        before.update(json.loads(output.read_text()))
        yield Check("first", 0.0, 1.0)
        raise RuntimeError("no such kernel")

    def late(device, folder):
        yield Check("never reached", 2.0, 1.0)

    monkeypatch.setattr(program, "STAGES", [small, broken, late])
    assert program.check_gpu(device="cpu", only="small,broken", output=output) == 1
    assert [check["name"] for check in before["checks"]] == ["small: number"]
    assert not before["passed"]  # nor would it have if the program had been killed there
    checks = json.loads(output.read_text())["checks"]
    assert [check["passed"] for check in checks] == [True, True, False]
    assert checks[2]["note"] == "RuntimeError: no such kernel"
    assert "number = 2.5 units" in capsys.readouterr().out
    assert program.check_gpu(device="cpu", only="smal", output=output) == 1
    assert "choose from small, broken, late" in capsys.readouterr().err
    assert program.check_gpu(device="cpu", budget=-1.0, output=output) == 0
    result = json.loads(output.read_text())
    assert result["passed"]
    assert all(check["skipped"] for check in result["checks"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_check_has_not_passed(number, code, tmp_path, monkeypatch):
    output = tmp_path / "new folder" / "result.json"

    def first(device, folder):
        yield Check("fine", 0.0, 1.0)
        os.kill(os.getpid(), number)
        yield Check("went on", 2.0, 1.0)

    def second(device, folder):
        pytest.fail("went on")

    monkeypatch.setattr(program, "STAGES", [first, second])
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pytest has a handler of its own
    try:
        assert program.check_gpu(device="cpu", output=output) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    result = json.loads(output.read_text())
    assert [check["name"] for check in result["checks"]] == ["first: fine", "interrupted"]
    assert not result["passed"]


def test_a_refusal_is_a_sentence(tmp_path, capsys):
    for request in ({"device": "gpu"}, {"device": "cuda:77"}, {"device": "cpu:x"}):
        assert program.check_gpu(**request, output=tmp_path / "result.json") == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "a file").write_text("")
    for output in (tmp_path, tmp_path / "a file" / "result.json"):
        assert program.check_gpu(device="cpu", output=output) == 1
        assert "choose another --output" in capsys.readouterr().err


def test_a_gpu_is_set_up_for_deterministic_products_and_made_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "restored afterwards")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    set_up(torch.device("cuda:1"))
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], chosen) == (":4096:8", [1])


def test_a_wrong_gradient_is_found(monkeypatch):
    step = Case.step

    def off(case, device, dtype):
        loss, gradient = step(case, device, dtype)
        return [loss, gradient * (1.01 if dtype == torch.float32 else 1.0)]

    monkeypatch.setattr(numerics, "OBJECTIVES", {"mdlm": {}})
    right = list(numerics.steps(torch.device("cpu"), None))
    assert all(check.passed for check in right)
    monkeypatch.setattr(Case, "step", off)
    wrong = [check.name for check in numerics.steps(torch.device("cpu"), None) if not check.passed]
    assert wrong == ["mdlm, blocks of None, gradient", "mdlm, blocks of 16, gradient"]


def test_an_error_ends_its_own_case_alone_and_names_its_place(monkeypatch):
    def broken(case, device, dtype):
        return case.model(None)

    monkeypatch.setattr(numerics, "OBJECTIVES", {"mdlm": {}})
    monkeypatch.setattr(Case, "step", broken)
    checks = list(numerics.steps(torch.device("cpu"), None))
    assert [check.name for check in checks] == ["mdlm, blocks of None", "mdlm, blocks of 16"]
    assert all(re.search(r" \(\w+/\w+\.py:\d+\)$", check.note) for check in checks)


def test_waits_are_counted_by_the_line_that_waits(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Model:
        def generate(self, prompt, steps, **request):
            for _ in range(2 + steps * (request["rule"] == "waiting")):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            for _ in range(steps):
                warnings.warn("another warning", stacklevel=1)

    (check,) = contained("", waits_of_calls(Model(), "waiting", "x"))
    assert (check.found, check.passed) == (8.0, False)
    assert re.fullmatch(r"8 at devices/test_check_program.py:\d+", check.note)
    (check,) = contained("", waits_of_calls(Model(), "running", "x"))
    assert (check.found, check.note, check.passed) == (0.0, "", True)
    assert modes == ["warn", "default"] * 6


def test_the_time_of_a_kernel_counts_once():
    def event(key, kind, time, annotation=False):
        times = {"self_device_time_total": time, "self_cpu_time_total": 5e3}
        return SimpleNamespace(
            key=key, device_type=kind, is_user_annotation=annotation, count=2, **times
        )

    gpu, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [event("copy", gpu, 1e3), event("aten::mm", cpu, 3e3), event("gemm", gpu, 3e3)]
    events.append(event("Optimizer.step", gpu, 9e3, annotation=True))
    assert slowest_kernels(events, on_gpu=True) == [("gemm", 3.0, 2), ("copy", 1.0, 2)]
    assert slowest_kernels(events, on_gpu=False) == [("aten::mm", 5.0, 2)]
