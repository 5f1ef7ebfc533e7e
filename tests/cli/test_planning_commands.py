"""`textdiff plan` and `textdiff doctor`: what they print, refuse and survive."""

import json
import os

import pytest

from textdiff.cli import main
from textdiff.commands import doctor
from textdiff.commands.plan import quantity
from textdiff.errors import ConfigError


def planned(root, capsys, *flags: str) -> dict:
    capsys.readouterr()
    config = str(root / "configs" / "quickstart.yaml")
    assert main(["plan", config, "--json", "--device", "cuda", *flags]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "unit", "value"),
    [
        ("80GB", "B", 80e9),
        ("16GiB", "B", 16 * 2**30),
        ("1.5g", "B", 1.5e9),
        ("1000", "B", 1000),
        ("300TFLOPS", "FLOPS", 3e14),
        ("989 TFLOP/s", "FLOPS", 9.89e14),
    ],
)
def test_sizes_are_read_with_their_units(words, unit, value):
    assert quantity("--x", words, unit) == value


@pytest.mark.parametrize("words", ["", "GB", "-1GB", "0", "80 apples", "infGB", "nan", "5i"])
def test_other_sizes_are_refused(words):
    with pytest.raises(ConfigError) as error:
        quantity("--memory", words, "B")
    assert error.value.code == "unreadable_quantity"


def test_the_verb_has_replaced_estimate(capsys):
    assert main(["estimate", "configs/quickstart.yaml"]) == 2
    assert "did you mean `textdiff plan`?" in capsys.readouterr().err


def test_plan_is_plain_data_and_follows_flags(root, capsys):
    found = planned(root, capsys, "--memory=8GB", "--flops=1TFLOPS", "--efficiency=0.5")
    kept, recomputed = found["variants"]
    assert (kept["gradient_checkpointing"], recomputed["gradient_checkpointing"]) == (False, True)
    assert recomputed["bytes"]["peak"] < kept["bytes"]["peak"]
    assert recomputed["largest_micro_batch"] > kept["largest_micro_batch"] > 0
    assert found["tokens_per_second"] == pytest.approx(0.5e12 / found["flops_per_token"])
    taken = found["training_tokens"] / found["tokens_per_second"]
    assert found["training_seconds"] == pytest.approx(taken)
    wider = planned(root, capsys, "--vocabulary", "50258", "--model.num-layers=8")
    assert wider["vocabulary"] == 50258
    assert wider["parameters"] > found["parameters"]


def test_plan_shows_a_table_for_both_ways_to_share(root, capsys):
    config = str(root / "configs" / "quickstart.yaml")
    flags = ["--devices", "2", "--memory", "1MB", "--train.micro-batch-size", "16"]
    assert main(["plan", config, *flags]) == 0
    shown = capsys.readouterr().out
    assert "DDP" in shown
    assert "FSDP2" in shown
    assert shown.count("none") == 4  # nothing fits a megabyte


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--devices", "0"], "--devices 0: give a whole number"),
        (["--devices"], "--devices needs a value: for example 8"),
        (["--devices", "7"], "not a multiple of"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--efficiency", "40"], "at most 1"),
        (["--vocabulary", "2"], "at least 4 ids"),
    ],
)
def test_plan_refuses_in_one_sentence(root, capsys, flags, words):
    assert main(["plan", str(root / "configs" / "quickstart.yaml"), *flags]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert len(shown.strip().splitlines()) == 1


# --- doctor --------------------------------------------------------------------------------------


def findings(capsys) -> tuple[int, dict[str, dict]]:
    capsys.readouterr()
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {f"{f['section']}/{f['name']}": f for f in report["findings"]}


@pytest.fixture
def quick(monkeypatch):
    """No network, and the probes that tests do not look at left out."""
    kept = ("probe_versions", "probe_folders", "probe_extras")
    probes = tuple(entry for entry in doctor.PROBES if entry[0].__name__ in kept)
    monkeypatch.setattr(doctor, "PROBES", probes)


def test_doctor_tries_the_backends(capsys):
    code, found = findings(capsys)
    assert code == 0
    assert found["attention/sdpa"]["value"] == "trains and infers on cpu"
    assert "no backward pass" in found["attention/flex_attention"]["value"]
    assert "needs a CUDA device" in found["attention/flash_attention_2"]["value"]
    assert {f["state"] for f in found.values()} <= {"ok", "no", "warning"}
    assert {f.split("/")[0] for f in found} == {
        "versions",
        "machine",
        "devices",
        "attention",
        "compile",
        "distributed",
        "folders",
        "hub",
        "extras",
    }


def test_a_folder_that_cannot_be_written_is_essential(capsys, monkeypatch, tmp_path, quick):
    def refuse(dir=None):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    code, found = findings(capsys)
    assert code == 1
    assert found["folders/runs"]["state"] == "broken"
    assert "not writable (Permission denied)" in found["folders/runs"]["value"]
    assert "HF_DATASETS_CACHE" in found["folders/datasets cache"]["advice"]
    assert found["folders/HF_HOME"]["state"] == "warning"  # only the hub needs it


def test_little_room_is_a_warning(capsys, monkeypatch, quick):
    monkeypatch.setattr(doctor, "ROOM_GB", 1e9)
    code, found = findings(capsys)
    assert (code, found["folders/runs"]["state"]) == (0, "warning")


def test_a_missing_library_is_named_with_its_command(capsys, monkeypatch, quick):
    monkeypatch.setattr(doctor, "LIBRARIES", "torch no-such-library")
    code, found = findings(capsys)
    assert code == 1
    assert found["versions/no-such-library"]["advice"] == "pip install no-such-library"


@pytest.mark.parametrize(("essential", "code"), [(True, 1), (False, 0)])
def test_a_probe_that_fails_is_a_line_of_the_report(capsys, monkeypatch, essential, code):
    def probe_weather():
        raise RuntimeError("clouds\nand a second line")
        yield

    monkeypatch.setattr(doctor, "PROBES", ((probe_weather, essential),))
    found_code, found = findings(capsys)
    assert found_code == code
    assert found["weather/probe"]["value"] == "failed: clouds"


def test_the_report_keeps_secrets(capsys, monkeypatch, quick, tmp_path):
    home = tmp_path / "home-of-somebody"
    (home / "runs").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_show_this")
    assert doctor._home(home / "runs") == f"~{os.sep}runs"
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "hf_do_not_show_this" not in shown
    assert "home-of-somebody" not in shown
    assert "\x1b" not in shown  # plain where it is no terminal
    assert shown.rstrip().endswith("Training can run here.")
