"""The command line as a user meets it: results, sentences for mistakes, exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from children import child, finished
from torch._dynamo.exc import FailOnRecompileLimitHit

from textdiff.cli import main
from textdiff.commands.sampling import Sampling
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.settings import SamplingConfig, read_knobs
from textdiff.train.measure import TIMED

TINY = [
    "--data.sequence-length=32",
    "--tokenizer.vocab-size=384",
    "--model.hidden-size=32",
    "--model.num-layers=2",
    "--model.num-heads=2",
    "--train.steps=12",
    "--train.global-batch-size=8",
    "--train.micro-batch-size=8",
    "--train.warmup-steps=2",
    "--train.log-every=4",
    "--train.checkpoint-every=8",
    "--train.mixed-precision=fp32",
    "--evaluate.every=6",
    "--sample.max-new-tokens=24",
    "--sample.steps=8",
]
SENTENCES = "The cat sat on the mat. A dog ran over the hill, and nobody saw it again.\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name in "ab":
        (folder / f"{name}.txt").write_text(SENTENCES * 60 + name)
    return folder


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A run of a tiny model on a tiny corpus."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", *config(corpus, run)]) == 0
    return run


def config(corpus: Path, run: Path) -> list[str]:
    root = Path(__file__).resolve().parents[2]
    return [
        str(root / "configs" / "text-files-bpe.yaml"),
        f"--data.sources.0.source={corpus}",
        f"--data.cache-dir={run.parent / 'cache'}",
        f"--run.dir={run}",
        *TINY,
    ]


def error_of(capsys, *words: str) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    capsys.readouterr()
    code = main(list(words))
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert len(shown.strip().splitlines()) == 1, shown
    return code, shown


# --- what a run leaves ---------------------------------------------------------------------------


def test_run_directory(trained):
    assert {path.name for path in trained.iterdir()} >= {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "validation.jsonl",
        "samples",
        "checkpoints",
        "export",
        "tensorboard",
    }
    assert {path.name for path in (trained / "export").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "training.json",
        "README.md",
    }
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == [
        "step-000008",
        "step-000012",
    ]


def test_metrics_are_complete(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [4, 8, 12]
    for line in steps:
        assert {"learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= set(line)
        assert line["tokens"] == line["step"] * 8 * 32
    bounds = [line for line in lines if "bound_nats" in line]
    assert [line["step"] for line in bounds] == [6, 12]
    assert all({"bound_stderr", "bits_per_byte"} <= set(line) for line in bounds)


def test_perplexity_agrees_with_training(trained, capsys):
    capsys.readouterr()
    words = ["perplexity", str(trained / "export"), str(trained / "validation.jsonl"), "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "bound_nats" in line][-1]
    assert result["mean"] == pytest.approx(last["bound_nats"], abs=1e-6)
    assert result["stderr"] == pytest.approx(last["bound_stderr"], abs=1e-6)
    assert result["is_bound"]
    assert result["provenance"]["weights"] == "ema"
    assert (last["bound_tokens"], last["bound_estimator"]) == (result["tokens"], "masked_count")


def test_perplexity_precision(trained, capsys):
    capsys.readouterr()
    words = ["perplexity", str(trained), str(trained / "validation.jsonl"), "--json"]
    assert main([*words, "--precision", "2%"]) == 0
    result = json.loads(capsys.readouterr().out)
    _, high = result["perplexity_interval_95"]
    assert high / result["perplexity"] <= 1.02 + 1e-9
    assert result["replicates"] >= 8


def test_generate(trained, capsys):
    capsys.readouterr()
    words = ["generate", str(trained / "export"), "The cat", "--max-new-tokens", "10", "--json"]
    assert main([*words, "--num-samples", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["samples"]) == 3
    assert all(sample["text"].startswith("The cat") for sample in result["samples"])
    assert len({sample["text"] for sample in result["samples"]}) == 3
    assert main([*words, "--num-samples", "3", "--batch-size", "1"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["samples"] == result["samples"]


def test_knobs_reach_the_rule(trained):
    held = TextDiffusion.from_pretrained(trained, device="cpu")
    knobs = {"order": "entropy", "order_temperature": 0.5}
    flags = Sampling(rule="confidence", knobs=("order=entropy", "order-temperature=0.5"), seed=3)
    assert flags.options()["knobs"] == knobs
    told = held.generate("The", num_samples=2, **flags.options())
    assert told == held.generate("The", num_samples=2, rule="confidence", knobs=knobs, seed=3)
    assert told != held.generate("The", num_samples=2, rule="confidence", seed=3)
    *_, last = held.stream("The", num_samples=2, **flags.options())
    assert last.canvas.tolist() == told.sequences


def test_words_of_knobs_are_what_they_look_like():
    words = ["a=0.5", "b=3", "c=true", "d=None", "e=margin", "f=False"]
    assert read_knobs(words) == {"a": 0.5, "b": 3, "c": True, "d": None, "e": "margin", "f": False}


def test_knobs_of_the_default_rule_are_not_those_of_another():
    settings = SamplingConfig(rule="confidence", knobs={"order": "margin"})
    assert settings.merge(steps=3).knobs == {"order": "margin"}
    assert settings.merge(rule="confidence").knobs == {"order": "margin"}
    assert settings.merge(rule="ancestral").knobs == {}


def test_generate_to_a_pipe_is_plain_text(trained, monkeypatch, capsys):
    words = ["generate", str(trained / "export"), "The", "--max-new-tokens", "5", "--watch"]
    reading, writing = os.pipe()
    with open(reading) as pipe, open(writing, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert main(words) == 0
        stdout.close()
        shown = pipe.read()
    assert shown.startswith("The")
    assert "\x1b" not in shown
    assert capsys.readouterr().err == ""


def test_an_approximation_is_told_once(trained, capsys):
    words = ["generate", str(trained), "The cat", "--max-new-tokens", "5", "--num-samples", "2"]
    assert main([*words, "--cache", "approximate"]) == 0
    said = capsys.readouterr()
    assert said.out.count("The cat") == 2
    assert said.err.count("approximation") == len(said.err.splitlines()) == 1
    assert main([*words, "--cache", "off"]) == 0
    assert capsys.readouterr().err == ""


def test_resume_of_a_finished_run_says_so_and_changes_nothing(trained, corpus, capsys):
    before = (trained / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert main(["train", *config(corpus, trained)]) == 0
    assert "resumed from" in capsys.readouterr().out
    after = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert after[: len(before.splitlines())] == [json.loads(x) for x in before.splitlines()]


def test_resume_refuses_another_model(trained, corpus, capsys):
    words = [*config(corpus, trained), "--model.num-layers=3"]
    code, shown = error_of(capsys, "train", *words)
    assert code == 1
    assert "model.num_layers = 2" in shown
    assert "--resume never" in shown


def test_config_show_round_trips(root, capsys, tmp_path):
    for path in sorted((root / "configs").glob("*.yaml")):
        capsys.readouterr()
        assert main(["config", "show", str(path), "--train.steps", "7"]) == 0
        shown = capsys.readouterr().out
        copy = tmp_path / path.name
        copy.write_text(shown)
        assert main(["config", "show", str(copy)]) == 0
        assert capsys.readouterr().out == shown
        assert "steps: 7" in shown


@pytest.mark.parametrize("kind", ["export", "texts", "file", "link", "below a file", "another"])
def test_tokenizer_train_leaves_what_is_not_its_own(kind, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    if kind in ("export", "another"):
        assert main(["tokenizer", "train", str(out), str(corpus), "--kind", "byte"]) == 0
        content = json.loads((out / "tokenizer.json").read_text())
        if kind == "export":
            (out / "config.json").write_text("{}")
        else:
            (out / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": []}))
    elif kind == "texts":
        out.mkdir()
        (out / "a.txt").write_text("text")
    elif kind == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.write_text("text")
        out = out / "inside" if kind == "below a file" else out
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main(["tokenizer", "train", str(out), str(corpus), "--kind", "byte"]) == 2
    assert "folder" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_tokenizer_train_writes_over_its_own(corpus, tmp_path, capsys):
    for kind in ("char", "byte"):
        assert main(["tokenizer", "train", str(tmp_path), str(corpus), "--kind", kind]) == 0
    assert json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"][-1]["id"] == 258
    inside = str(tmp_path / "a" / "b")
    assert main(["tokenizer", "train", inside, str(corpus), "--kind", "byte"]) == 0


def test_tokenizer_train(corpus, tmp_path, capsys):
    from transformers import AutoTokenizer

    out = tmp_path / "tok"
    assert main(["tokenizer", "train", str(out), str(corpus), "--vocab-size", "300"]) == 0
    assert "bytes per token" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.mask_token_id is not None
    assert tokenizer.decode(tokenizer.encode(SENTENCES, add_special_tokens=False)) == SENTENCES


def test_help_is_quick_and_heavy_imports_wait():
    program = (
        "import sys; from textdiff.cli import main; main(['--help']); "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = finished([sys.executable, "-c", program])
    assert done.stdout.splitlines()[-1] == "[]"


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["trian"], 2, "did you mean `textdiff train`?"),
        (["train"], 2, "no config file"),
        (["train", "nowhere.yaml"], 2, "no such config file"),
        (["generate", "nowhere/export"], 1, "no such directory"),
        (["perplexity", "nowhere/export"], 2, "no text given"),
        (["perplexity", "m", "t", "--replicates", "3"], 2, "at least 8"),
        (["perplexity", "m", "t", "--precision", "lots"], 2, "0.5%"),
        (["tokenizer", "train", "out", "t", "--vocab-size", "5"], 2, "at least 260"),
    ],
)
def test_wrong_usage(words, code, said, capsys):
    found, shown = error_of(capsys, *words)
    assert found == code
    assert said in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "at least 1"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--window", "8"], "full-sequence"),
        (["--stride", "33"], "1..32"),
        (["--cache", "on"], "approximation"),
        (["--cache", "on"], "--cache approximate"),
        (["--num-samples", "0"], "at least 1"),
        (["--batch-size", "0"], "batch_size 0: give at least 1"),
        (["--temperature", "-1"], "at least 0"),
        (["--top-p", "0"], "more than 0"),
        (["--top-k", "0"], "at least 1"),
        (["--rule", "magic"], "unknown rule"),
        (["--rule", "confidence", "--knobs", "ordre=margin"], "did you mean 'order'?"),
        (
            ["--rule", "confidence", "--knobs", "order=sure"],
            "'probability', 'margin', 'entropy' or 'position'",
        ),
        (["--rule", "confidence", "--knobs", "margin"], "give NAME=VALUE"),
        (["--knobs", "eta=1", "eta=2"], "eta is given twice"),
        (["--temperature", "hot"], "FIRST:LAST"),
        (["--min-p", "2"], "at most 1"),
        (["--repetition-penalty", "0"], "more than 0"),
        (["--guidance", "-2"], "at least -1"),
        (["--regex", "(a"], "character 3: a group is not closed"),
        (["--regex", "a{900}"], "no text of up to"),
        (["--ban", ""], "ban[0] '': an empty string"),
        (["--stop", ""], "stop[0] '': an empty string"),
        (["--suffix", "x" * 40], "leave none to generate"),
        (["--suffix", " end", "--stop", "e"], "leave the stop strings out"),
        (["--device", "gpu7"], "device gpu7"),
        (["--watch", "--json"], "exclude"),
    ],
)
def test_wrong_generate_options(trained, words, said, capsys):
    code, shown = error_of(capsys, "generate", str(trained), "The", *words)
    assert code == 2
    assert said in shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The [MASK:0] sat", "character 5 of the template: give its length"),
        ("The [MASK:x] sat", "such as [MASK:5]"),
        ("The [MASK:99] sat", "a hole of 99 tokens is longer than the model's context of 32"),
        ("The [MASK:3] sat", None),
    ],
)
def test_templates_on_the_command_line(trained, tmp_path, text, said, capsys):
    path = tmp_path / "text.txt"
    path.write_text(text + "\n")
    for words in ([text], ["--template", str(path)]):
        if said is not None:
            code, shown = error_of(capsys, "generate", str(trained), *words)
            assert code == 2
            assert said in shown
            continue
        capsys.readouterr()
        assert main(["generate", str(trained), *words, "--json"]) == 0
        sample = json.loads(capsys.readouterr().out)["samples"][0]
        assert sample["text"] == f"The {sample['holes'][0]} sat"
        assert sample["completion"] == sample["holes"][0]


def test_template_files_that_cannot_be_used(trained, tmp_path, capsys):
    plain, latin = tmp_path / "plain.txt", tmp_path / "latin.txt"
    plain.write_text("no hole")
    latin.write_bytes(b"caf\xe9 [MASK]")
    for words, code, said in (
        ([str(plain)], 2, "plain.txt has no hole: write [MASK:n]"),
        ([str(latin)], 1, "latin.txt: not valid UTF-8 at byte 3"),
        ([str(tmp_path / "none.txt")], 1, "none.txt: no such file"),
        ([str(plain), "--suffix", "x"], 2, "leave PROMPT and --suffix out"),
    ):
        found, shown = error_of(capsys, "generate", str(trained), "--template", *words)
        assert found == code
        assert said in shown


def test_prompt_longer_than_the_context(trained, capsys):
    code, shown = error_of(capsys, "generate", str(trained), SENTENCES * 5)
    assert code == 2
    assert "context of 32 tokens" in shown


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n", "blank"),
        ("binary.txt", b"text\x00\x01more", "binary"),
        ("latin.txt", b"caf\xe9 au lait", "UTF-8"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2"),
        ("column.jsonl", b'{"body": "fine"}\n', "body"),
    ],
)
def test_unusable_texts(trained, tmp_path, name, content, said, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    code, shown = error_of(capsys, "perplexity", str(trained), str(path))
    assert code == 1
    assert name in shown
    assert said in shown


def test_unreachable_hub_and_short_corpus(corpus, tmp_path, capsys):
    words = config(corpus, tmp_path / "run")
    code, shown = error_of(capsys, "train", *words, "--data.sources.0.source=nobody/nothing")
    assert code == 1
    assert "nobody/nothing" in shown
    short = tmp_path / "short.txt"
    short.write_text("One line.")
    code, shown = error_of(capsys, "train", *words, f"--data.sources.0.source={short}")
    assert code == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--train.lerning-rate=1", "did you mean --train.learning-rate?"),
        ("--train.steps=x", "--train.steps: 'x' is not a whole number"),
        ("--resum=never", "did you mean --resume?"),
        ("--train.steps=0", "greater than or equal to 1"),
        ("--diffusion.block-size=5", "does not divide"),
        ("--diffusion.block-size=4096", "is longer than"),
        ("--train.micro-batch-size=3", "multiple"),
        ("--model.time-conditioning=true", "adaln"),
    ],
)
def test_config_mistakes_name_the_key(corpus, tmp_path, flag, said, capsys):
    code, shown = error_of(capsys, "train", *config(corpus, tmp_path / "run"), flag)
    assert code == 2
    assert said in shown


@pytest.mark.parametrize("verb", ["", "train", "plan", "data inspect", "config show"])
def test_help_fits_a_terminal(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) < 80
    assert all(line.count("[") == line.count("]") for line in shown.splitlines())


def test_typo_in_a_file_gets_a_suggestion(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("train: {lerning_rate: 1e-3}\n")
    code, shown = error_of(capsys, "config", "show", str(path))
    assert code == 2
    assert "did you mean 'learning_rate'?" in shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: [1, 2]", "`train` is a section of keys, such as {steps: …} (given: [1, 2])"),
        ("train:", "`train` is a section of keys, such as {steps: …} (given: nothing)"),
        ("tokenizer: char", "`tokenizer` is a section of keys, such as {kind: char}"),
        ("data: {sources: [a]}", "`data.sources.0` is a section of keys, such as {source: …}"),
        ("data: {sources: 3}", "`data.sources`: 3 is not a list"),
    ],
)
def test_a_value_in_a_sections_place(tmp_path, text, said, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text + "\n")
    code, shown = error_of(capsys, "config", "show", str(path))
    assert code == 2
    assert said in shown


def test_switching_a_kind_refuses_leftovers_by_name(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("tokenizer: {kind: bpe, vocab_size: 512}\n")
    code, shown = error_of(capsys, "config", "show", str(path), "--tokenizer.kind", "char")
    assert code == 2
    assert "tokenizer.vocab_size" in shown
    assert main(["config", "show", str(path), "--tokenizer", '{"kind": "char"}']) == 0
    assert "kind: char" in capsys.readouterr().out


def test_export_without_its_tokenizer_file(trained, tmp_path, capsys):
    shutil.copytree(trained / "export", tmp_path / "export")
    (tmp_path / "export" / "tokenizer.json").unlink()
    code, shown = error_of(capsys, "generate", str(tmp_path / "export"))
    assert code == 1
    assert "tokenizer.json; export the model again" in shown


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_damaged_export(trained, tmp_path, name, how, capsys):
    export = tmp_path / "export"
    shutil.copytree(trained / "export", export)
    if how == "missing":
        (export / name).unlink()
        if name == "tokenizer.json":
            (export / "tokenizer_config.json").unlink()
    else:
        content = (export / name).read_bytes()
        (export / name).write_bytes(content[: len(content) // 2])
    code, shown = error_of(capsys, "generate", str(export))
    assert code == 1
    assert str(export) in shown


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_git_lfs_pointers_are_named(trained, corpus, tmp_path, name, capsys):
    shutil.copytree(trained / "export", tmp_path / "run" / "export")
    (tmp_path / "run" / "export" / name).write_text(POINTER)
    text = str(trained / "validation.jsonl")
    for words in (
        ["generate", str(tmp_path / "run")],
        ["perplexity", str(tmp_path / "run" / "export"), text],
        ["evaluate", str(trained), "--texts", text, "--judge", str(tmp_path / "run" / "export")],
        ["train", *config(corpus, tmp_path / "new"), f"--train.init-from={tmp_path / 'run'}"],
    ):
        code, shown = error_of(capsys, *words)
        assert code == 1
        assert f"{name} is a git-lfs pointer" in shown
        assert f"`git lfs pull` in {tmp_path / 'run' / 'export'}" in shown
        assert "export the model again" not in shown
    tokenizer = f'{{"kind": "pretrained", "path": "{tmp_path / "run" / "export"}"}}'
    words = [*config(corpus, tmp_path / "new"), "--tokenizer", tokenizer]
    words = [word for word in words if not word.startswith("--tokenizer.")]
    code, shown = error_of(capsys, "train", *words)
    assert (code, f"{name} is a git-lfs pointer" in shown) == (1, True)


def test_tokenizer_without_a_mask(trained, tmp_path, capsys):
    export = tmp_path / "export"
    shutil.copytree(trained / "export", export)
    settings = json.loads((export / "tokenizer_config.json").read_text())
    settings.pop("mask_token")
    (export / "tokenizer_config.json").write_text(json.dumps(settings))
    code, shown = error_of(capsys, "generate", str(export))
    assert code == 1
    assert "mask token" in shown


def test_damaged_checkpoint_is_named_and_the_previous_one_used(trained, corpus, tmp_path, capsys):
    run = tmp_path / "tiny"
    shutil.copytree(trained, run)
    broken = run / "checkpoints" / "step-000012" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-4])
    capsys.readouterr()
    assert main(["train", *config(corpus, run)]) == 0
    shown = capsys.readouterr().out
    assert "step-000012 is damaged (model.safetensors has" in shown
    assert "step 8 of 12" in shown


# --- signals -------------------------------------------------------------------------------------


def run_textdiff(*words: str) -> subprocess.CompletedProcess:
    return finished([sys.executable, "-m", "textdiff", *words])


# The program, which sends itself a signal as its fifth step begins. The twelfth is too near for one
# from outside: on a busy machine the run might be over before it comes.
SIGNALLED = """
import os, sys
from textdiff.__main__ import run_program
from textdiff.train.trainer import Trainer

step, number = Trainer._step, int(sys.argv.pop(1))

def interrupted(trainer, *arguments):
    if trainer.progress.step == 4:
        os.kill(os.getpid(), number)
    return step(trainer, *arguments)

Trainer._step = interrupted
sys.exit(run_program())
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_resumed_run_is_the_uninterrupted_one(
    trained, corpus, tmp_path, number, code
):
    run = tmp_path / "tiny"
    words = [sys.executable, "-c", SIGNALLED, int(number), "train", *config(corpus, run)]
    done = finished(words)
    assert done.returncode == code, done.stderr
    assert "everything saved" in done.stdout
    assert "step  8/12" not in done.stdout
    assert main(["train", *config(corpus, run)]) == 0
    assert compared(run) == compared(trained)


@pytest.mark.slow
def test_sigkill_and_resume(trained, corpus, tmp_path):
    run = tmp_path / "tiny"
    words = [sys.executable, "-u", "-m", "textdiff", "train", *config(corpus, run)]
    with child(words, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            if line.startswith("step  8/12"):
                time.sleep(0.3)
                process.kill()
                break
    done = run_textdiff("train", *config(corpus, run))
    assert done.returncode == 0, done.stderr
    assert compared(run) == compared(trained)


def compared(run: Path) -> list[dict]:
    """The fields that a resumed run must reproduce bit for bit."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in TIMED} for line in lines]


@pytest.mark.parametrize("output", ["", " ", "-"])
def test_tokenizer_train_names_its_folder_first(output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    assert main(["tokenizer", "train", output, "a.txt", "--kind", "byte"]) == 2
    assert "OUTPUT" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_limits_of_torch_are_a_sentence_each(monkeypatch, capsys):
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"

    def fail(words):
        raise errors.pop()

    monkeypatch.setattr("textdiff.cli._dispatch", fail)
    errors = [RuntimeError("a bug"), torch.OutOfMemoryError(message), FailOnRecompileLimitHit("x")]
    for words in ("train.compile: false", "Tried to allocate 2.00 GiB; use fewer rows"):
        assert main(["train"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])
