"""The scripts do what they say, with sizes of a test and a cluster of two shell functions."""

import importlib.util
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from children import child, finished

from textdiff.config.reading import load
from textdiff.models import attention

BIN = str(Path(sys.executable).parent)

CONFIG = """
data: {{sources: [{{source: {corpus}}}], sequence_length: 32, cache_dir: {folder}/cache}}
tokenizer: {{kind: byte}}
model: {{hidden_size: 32, num_layers: 2, num_heads: 2}}
train: {{steps: {steps}, global_batch_size: 8, micro_batch_size: 4, warmup_steps: 2, log_every: 1,
         mixed_precision: fp32, checkpoint_every: 100000}}
evaluate: {{every: 100000}}
sample: {{num_samples: 0, steps: 4, max_new_tokens: 8}}
run: {{dir: {folder}/run}}
"""


def write_config(folder: Path, steps: int) -> Path:
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"Line {i} of {i * i} is here.\n" for i in range(300)))
    path = folder / "c.yaml"
    path.write_text(CONFIG.format(corpus=corpus, folder=folder, steps=steps))
    return path


def scripts(root) -> list[Path]:
    return [root / "scripts" / "pretrain_owt.sh", *(root / "scripts" / "slurm").glob("*.sbatch")]


def test_scripts_are_shell(root):
    assert len(scripts(root)) == 3
    for path in scripts(root):
        assert finished(["bash", "-n", path]).returncode == 0
        assert os.access(path, os.X_OK) or path.suffix == ".sbatch"


def test_what_scripts_name_exists(root):
    """Files and flags of textdiff in the scripts, their comments and their documentation."""
    for path in [*scripts(root), root / "docs" / "training.md"]:
        text = path.read_text()
        for name in re.findall(r"\b(?:configs|scripts)/[\w/-]+\.\w+", text):
            assert (root / name).is_file(), name
        flags = re.findall(r"(--(?:train|data|run)\.\S+) (\w+)", text)
        words = [word for pair in flags for word in pair]
        load(root / "configs" / "mdlm-owt-small.yaml", words)


@pytest.mark.parametrize("name", ["single-node", "multi-node"])
def test_slurm_is_told_to_warn_and_to_requeue(root, name):
    text = (root / "scripts" / "slurm" / f"{name}.sbatch").read_text()
    header = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, flags=re.M))
    kind, seconds = header["signal"].split("@")
    assert kind == "B:TERM"
    grace = int(re.search(r"PET_SHUTDOWN_TIMEOUT=(\d+)", text)[1])
    assert grace < int(seconds)
    assert "requeue" in header
    assert header["ntasks-per-node"] == "1"
    assert (int(header["nodes"]) > 1) == (name == "multi-node")
    words = shlex.split(text, comments=True)
    machines = {"--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port"}
    joined = " ".join(words)
    assert all((flag in joined) == (name == "multi-node") for flag in machines)


@pytest.mark.slow
def test_whole_story(root, tmp_path):
    """prepare, training in two processes, perplexity, text; the second time nothing is redone."""
    run = tmp_path / "run"
    words = [str(root / "scripts" / "pretrain_owt.sh"), *small(tmp_path)]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "RUN": str(run),
        "NUM_PROCESSES": "2",
        "PRECISION": "5%",
        "SAMPLES": "2",
    }
    for again in (False, True):
        done = finished(words, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [f"{part}/4" in done.stdout for part in range(1, 5)] == [True] * 4
        if again:
            assert "step 4 of 4" in done.stdout or "step 4" in done.stdout
    steps = [json.loads(x).get("loss") for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in steps if loss is not None]) == 4
    result = json.loads((run / "perplexity.json").read_text())
    assert 1 < result["perplexity"] < 1000
    assert (run / "samples.txt").read_text().strip()


def small(folder: Path) -> list[str]:
    """Flags that make the published model a toy."""
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"Line {i} of {i * i} is here.\n\n" for i in range(300)))
    return [
        *("--tokenizer", '{"kind": "byte"}', f"--data.sources.0.source={corpus}"),
        *(f"--data.cache-dir={folder / 'cache'}", "--data.sequence-length=32"),
        *("--data.num-proc=1", "--data.num-workers=0", "--data.validation=0.1"),
        *("--model.hidden-size=32", "--model.num-layers=2", "--model.num-heads=2"),
        *("--train.steps=4", "--train.global-batch-size=4", "--train.micro-batch-size=2"),
        *("--train.log-every=1", "--train.compile=false", "--train.mixed-precision=fp32"),
        *("--sample.num-samples=0", "--sample.steps=2", "--sample.max-new-tokens=8"),
    ]


# SLURM, as far as the templates use it: tasks are children that get the signals of srun.
SRUN = """#!/usr/bin/env bash
case "$*" in *"hostname --ip-address"*) echo 127.0.0.1; exit;; esac
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" & tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task" || code=1
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$SLURM_SUBMIT_DIR/requeued"; fi
"""


def cluster(folder: Path, root: Path, nodes: int) -> dict[str, str]:
    """The environment of a SLURM job, with commands of its name on the path."""
    tools = folder / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (folder / "configs").symlink_to(root / "configs")
    return {
        **os.environ,
        "PATH": f"{tools}:{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_NNODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(2 // nodes),
    }


@pytest.mark.parametrize(
    ("name", "file", "mesh"),
    [
        ("single-node", "", ""),
        ("single-node", "configs/accelerate/fsdp2.yaml", ""),
        ("multi-node", "", ""),
        (
            "multi-node",
            "configs/accelerate/hsdp.yaml",
            "--parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size 1 ",
        ),
    ],
)
def test_a_job_is_launched_by_the_file_that_is_named(root, tmp_path, name, file, mesh):
    env = cluster(tmp_path, root, 1 if name == "single-node" else 2)
    launcher = tmp_path / "bin" / "accelerate"
    launcher.write_text('#!/usr/bin/env bash\necho "$@" >> "$SLURM_SUBMIT_DIR/launched"\n')
    launcher.chmod(0o755)
    script = str(root / "scripts" / "slurm" / f"{name}.sbatch")
    more = {"CONFIG_FILE": file} if file else {}
    assert finished(["bash", script, "a config"], env=env | more).returncode == 0
    for line in (tmp_path / "launched").read_text().splitlines():
        assert line.startswith(f"launch --config_file {file or 'configs/accelerate/ddp.yaml'} ")
        assert ("--parallelism_config" in line) == bool(mesh)
        assert mesh in line
        assert line.endswith("-m textdiff train a config")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("name", "nodes"), [("single-node", 1), ("multi-node", 2)])
def test_a_job_whose_time_is_up_saves_and_comes_back(root, tmp_path, name, nodes):
    config = str(write_config(tmp_path, 100_000))
    env = cluster(tmp_path, root, nodes)
    words = ["bash", str(root / "scripts" / "slurm" / f"{name}.sbatch"), config]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (
        (tmp_path / "log").open("w") as log,
        child(words, env=env, stdout=log, stderr=log) as job,
    ):
        while not (metrics.exists() and metrics.stat().st_size):
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        code = job.wait()
    log = (tmp_path / "log").read_text()
    assert code == 143, log
    assert (tmp_path / "requeued").read_text() == f"requeue {env['SLURM_JOB_ID']}\n"
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == step > 0

    more = [*words, f"--train.steps={step + 2}"]
    done = finished(more, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "env.json").read_text())["processes"] == 2
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [x["step"] for x in steps if "loss" in x] == list(range(1, step + 3))
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1


def gpu_numbers(root):
    path = root / "tests" / "manual" / "gpu_numbers.py"
    spec = importlib.util.spec_from_file_location("gpu_numbers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_gpu_is_said(root, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_numbers(root).gpu_numbers() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no GPU" in line


@pytest.mark.slow
def test_the_part_that_a_cpu_can_check(root, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert gpu_numbers(root).gpu_numbers(device="cpu", output=output) == 0
    result = json.loads(output.read_text())
    checks = {check["name"]: check for check in result["checks"]}
    for name in ("full", "causal, documents", "block_diffusion", "block_diffusion, documents"):
        assert 0 <= checks[f"sdpa, {name}, float32, backward"]["found"] < 1e-5
        assert checks[f"sdpa, {name}, bfloat16, forward"]["found"] > 1e-4
        assert checks[f"flex_attention, {name}, float32, forward"]["passed"]
    assert checks["flex_attention, backward"]["skipped"]
    assert checks["texts that differ, device : CPU, float64"]["found"] == 0
    assert not (root / "evals" / "results" / "gpu_numbers.json").exists()


@pytest.mark.slow
def test_a_wrong_kernel_is_found(root, monkeypatch):
    module = gpu_numbers(root)
    right = attention.BACKENDS["sdpa"]
    monkeypatch.setitem(attention.BACKENDS, "sdpa", lambda *a, **k: 1.01 * right(*a, **k))
    checks = list(module.attention_checks(torch.device("cpu")))
    wrong = {tuple(check.name.split(", ")[:2]) for check in checks if not check.passed}
    others = {pair for pair in wrong if pair[0] != "sdpa"}
    assert {layout for backend, layout in wrong - others} >= {"full", "causal", "block_diffusion"}
    assert others == {
        ("flex_attention", "full")
    }  # a dense layout has nothing to skip: it is SDPA's
    assert not module.Check("nan", math.nan, 1.0).passed
