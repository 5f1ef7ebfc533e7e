"""The whole command with tiny models: figures, sweeps that are interrupted, bad input."""

import builtins
import json

import pytest
from tiny_judges import export

from textdiff.cli import main
from textdiff.evaluate import frontier as sweep
from textdiff.evaluate.suites import SuiteOptions
from textdiff.pipeline import TextDiffusion

PROSE = "the cat sat on the mat. a dog ran over the hill.\n" * 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a text and a grid."""
    folder = tmp_path_factory.mktemp("place")
    export(folder / "model", "mdlm")
    (folder / "real.txt").write_text(PROSE)
    grid = {
        "baseline": {"rule": "first_hitting", "temperature": [0.5, 1.0, 2.0]},
        "points": [
            {"rule": "ancestral", "steps": [3, 6], "temperature": 1.0},
            {"rule": "tweedie", "steps": 3},
        ],
    }
    (folder / "grid.yaml").write_text(json.dumps(grid))
    return folder


def command(place, judges, *more):
    named = ["--judge", str(judges["gpt2"]), "--reference", str(place / "real.txt")]
    return ["evaluate", str(place / "model"), *named, "--num-samples", "8", *more]


def test_samples_beside_real_text(place, judges, capsys):
    assert main(command(place, judges, "--steps", "4", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    for side in ("samples", "reference"):
        assert found[side]["texts"] == 8
        for name in ("gen_ppl", "entropy"):
            figure = found[side]["figures"][name]
            assert figure["low"] < figure["value"] < figure["high"]
    assert found["sampling"]["rule"] == "ancestral"
    assert found["sampling"]["steps"] == 4
    assert found["tokens_per_call"] >= 3.0
    assert found["judge"]["model_sha256"]
    assert found["provenance"]["model_sha256"]
    main(
        command(place, judges, "--steps", "4", "--json", "--batch-size", "3", "--batch-tokens", "9")
    )
    again = json.loads(capsys.readouterr().out)
    assert again["samples"]["texts_sha256"] == found["samples"]["texts_sha256"]
    same = pytest.approx(found["samples"]["figures"]["gen_ppl"]["value"], rel=1e-5)
    assert again["samples"]["figures"]["gen_ppl"]["value"] == same


def test_a_cache_that_changes_texts_is_recorded(place):
    model = TextDiffusion.from_pretrained(place / "model", "cpu")
    for cache, recorded in ((None, None), (False, None), ("approximate", "approximate")):
        options = SuiteOptions(model, "model", options={"cache": cache}, num_samples=8)
        assert options.settings({}).get("cache") == recorded


def test_the_table_fits_and_never_shows_perplexity_alone(place, judges, capsys):
    assert main(command(place, judges)) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "(" in line and "judge" not in line]
    assert max(map(len, rows)) <= 80
    assert any(line.startswith("generative perplexity") for line in lines)
    assert any(line.startswith("unigram entropy, per text") for line in lines)


def test_texts_of_others(place, judges, tmp_path, capsys):
    file = tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(9)))
    assert main(command(place, judges, "--texts", str(file), "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"]["texts"] == 9
    assert found["samples"]["figures"]["tokens"]["value"] == len("text number 0")
    assert found["samples"]["figures"]["ended"]["value"] is None
    assert found["sampling"] is None


def test_a_sweep_goes_on_where_it_stopped(place, judges, tmp_path, monkeypatch, capsys):
    words = command(place, judges, "--suite", "frontier", "--grid", str(place / "grid.yaml"))
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    picture = tmp_path / "frontier.png"
    assert main([*words, "--output", str(whole), "--picture", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "left out: tweedie follows scores" in out
    measured, drawn = sweep._point, []

    def breaks(plan, setting, *rest):
        drawn.append(setting)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return measured(plan, setting, *rest)

    monkeypatch.setattr(sweep, "_point", breaks)
    assert main([*words, "--output", str(cut)]) == 130
    assert "finished points are kept" in capsys.readouterr().err
    assert json.loads(cut.read_text())["complete"] is False
    assert main([*words, "--output", str(cut)]) == 0
    assert len(drawn) == 6  # five points, one of them twice
    one, other = (json.loads(path.read_text()) for path in (whole, cut))
    assert one["points"] == other["points"]
    assert one["complete"]
    assert other["complete"]
    by_curve = {point["curve"]: point for point in one["points"]}
    assert by_curve["first_hitting"]["tokens_per_call"] == pytest.approx(1.0)
    assert by_curve["ancestral, 3 steps"]["tokens_per_call"] > 3.0
    assert by_curve["first_hitting"]["excess"] is None
    capsys.readouterr()
    assert main([*words, "--output", str(cut), "--seed", "1"]) == 2
    assert "holds another sweep: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suite", "generations"], "did you mean 'generation'"),
        (["--judge", "nowhere/at/all"], "judge nowhere/at/all: "),
        (["--texts", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--num-samples", "4"], "give at least 8"),
        (["--resamples", "3"], "give at least 100"),
        (["--num-samples", "900"], "900 are needed"),
        (["--suite", "frontier"], "--output"),
        (["--output", "nowhere/out.json"], "--output nowhere/out.json: name a file"),
        (["--grid", "grid.yaml"], "--grid is for sweeps"),
        (["--suite", "frontier", "--grid", "missing.yaml"], "--grid missing.yaml: no such file"),
        (["--stop", "x"], "--stop fixes how texts end"),
        (["--suffix", "x"], "--suffix fixes how texts end"),
        (["--rule", "tweedie"], "follows scores"),
        (["--limit", "3"], "--limit is for --tasks"),
        (["--tasks", "blimp"], "is for texts, and --tasks asks questions"),
        (["--tasks", "blimp", "--suite", "frontier"], "--suite frontier and --tasks"),
    ],
)
def test_bad_input_is_one_sentence(place, judges, capsys, more, message):
    assert main(command(place, judges, *more)) in (1, 2)
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("textdiff: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "flags"),
    [("mauve", ["--mauve"]), ("matplotlib", ["--suite", "frontier", "--picture", "x.png"])],
)
def test_a_missing_extra_says_how_to_get_it(place, judges, capsys, monkeypatch, package, flags):
    real = builtins.__import__

    def absent(name, *rest, **named):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert main(command(place, judges, *flags)) == 2
    assert 'pip install "textdiff[eval]"' in capsys.readouterr().err
