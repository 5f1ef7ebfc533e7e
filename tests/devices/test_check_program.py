"""`scripts/check_gpu.py`: its stages are chosen, limited in time, and their failures contained."""

import importlib.util
import json
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def program(request):
    path = request.config.rootpath / "scripts" / "check_gpu.py"
    spec = importlib.util.spec_from_file_location("staged_check_gpu", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["staged_check_gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_the_result_is_written_after_each_stage(program, tmp_path, capsys, monkeypatch):
    output, before = tmp_path / "result.json", []

    def small(device, folder):
        yield program.figure("number", 2.5, "units")

    def broken(device, folder):
        before.extend(json.loads(output.read_text())["checks"])
        yield program.Check("first", 0.0, 1.0)
        raise RuntimeError("no such kernel")

    def late(device, folder):
        yield program.Check("never reached", 2.0, 1.0)

    monkeypatch.setattr(program, "STAGES", [small, broken, late])
    assert program.check_gpu(device="cpu", only="small,broken", output=output) == 1
    assert [check["name"] for check in before] == ["small: number"]
    checks = json.loads(output.read_text())["checks"]
    assert [check["passed"] for check in checks] == [True, True, False]
    assert checks[2]["note"] == "RuntimeError: no such kernel"
    assert "number = 2.5 units" in capsys.readouterr().out
    assert program.check_gpu(device="cpu", only="smal", output=output) == 1
    assert "choose from small, broken, late" in capsys.readouterr().err
    assert program.check_gpu(device="cpu", budget=-1.0, output=output) == 0
    assert all(check["skipped"] for check in json.loads(output.read_text())["checks"])


def test_an_interrupted_check_has_not_passed(program, tmp_path, capsys, monkeypatch):
    output = tmp_path / "new folder" / "result.json"

    def first(device, folder):
        yield program.Check("fine", 0.0, 1.0)
        raise KeyboardInterrupt

    def second(device, folder):
        pytest.fail("went on")

    monkeypatch.setattr(program, "STAGES", [first, second])
    assert program.check_gpu(device="cpu", output=output) == 130
    result = json.loads(output.read_text())
    assert [check["name"] for check in result["checks"]] == ["first: fine", "interrupted"]
    assert not result["passed"]
    for device in ("gpu", "cuda:77", "cpu:x"):
        capsys.readouterr()
        assert program.check_gpu(device=device, output=output) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_wrong_gradient_is_found(program, monkeypatch):
    step = program.Case.step

    def off(case, device, dtype):
        loss, gradient = step(case, device, dtype)
        return [loss, gradient * (1.01 if dtype == torch.float32 else 1.0)]

    monkeypatch.setattr(program, "OBJECTIVES", {"mdlm": {}})
    right = list(program.steps(torch.device("cpu"), None))
    assert all(check.passed for check in right)
    monkeypatch.setattr(program.Case, "step", off)
    wrong = [check.name for check in program.steps(torch.device("cpu"), None) if not check.passed]
    assert wrong == ["mdlm, blocks of None, gradient", "mdlm, blocks of 16, gradient"]
