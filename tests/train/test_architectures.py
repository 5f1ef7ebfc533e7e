"""Two processes train every architecture as one does, with copied and with sharded weights."""

import json
import sys
from pathlib import Path

import pytest
from children import finished
from safetensors.torch import load_file
from tiny_backbones import MASKED, write_backbone
from training_runs import LAUNCH, assert_same_curve

from textdiff.cli import main

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OPTIONS = {
    "qwen3_moe": EXPERTS,
    "granite": {"attention_multiplier": 0.5, "logits_scaling": 3.0},
    "gemma3_text": {"sliding_window": 5},
    "mistral": {"sliding_window": 5},
    "modernbert": {"local_attention": 8},
}
KINDS = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "smollm3", "mistral", "olmo2", "phi3", "glm4"),
    *("nanochat", "gpt2", "gpt_neox", "granite", "gemma3_text", *MASKED),
)
CONFIG = """
data: {{sources: [{{source: {corpus}}}], sequence_length: 16, cache_dir: {folder}/cache}}
tokenizer: {{kind: pretrained, path: {model}}}
diffusion: {{block_size: 4}}
train: {{init_from: "hf:{model}", steps: 3, global_batch_size: 4, micro_batch_size: 4,
         warmup_steps: 1, log_every: 1, mixed_precision: fp32, checkpoint_every: 3}}
evaluate: {{every: 3, max_documents: 4}}
sample: {{num_samples: 0}}
"""


def prepared(folder: Path, kind: str) -> Path:
    """A folder with a model, a corpus and a config."""
    corpus, model = folder / "corpus.txt", folder / "model"
    folder.mkdir()
    corpus.write_text("".join(f"the cat sat, {i}.\n" for i in range(100)))
    write_backbone(model, kind, rows=4, **OPTIONS.get(kind, {}))  # some tokenizers add tokens
    (folder / "c.yaml").write_text(CONFIG.format(corpus=corpus, folder=folder, model=model))
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def furthest(one: Path, two: Path) -> float:
    """Return the largest difference of two exports' weights."""
    tensors, others = (load_file(run / "export" / "model.safetensors") for run in (one, two))
    assert list(tensors) == list(others)
    return max(float((t - others[name]).abs().max()) for name, t in tensors.items())


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_every_architecture_as_one_does(tmp_path, root, capsys):
    folders = [prepared(tmp_path / kind, kind) for kind in KINDS]
    for folder in folders:
        assert main(["train", str(folder / "c.yaml"), f"--run.dir={folder / 'single'}"]) == 0
    launch = [*LAUNCH, root / "configs" / "accelerate" / "fsdp2.yaml"]
    program = Path(__file__).with_name("architectures_run.py")
    done = finished([sys.executable, *launch, program, *folders], seconds=500)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = []
    for folder in folders:
        for way in ("copied", "sharded"):
            difference = furthest(folder / "single", folder / way)
            rows.append(f"{folder.name:12} {way:8} {difference:.1e}")
            sharded = json.loads((folder / way / "env.json").read_text())["sharded"]
            assert sharded == (way == "sharded")
            assert_same_curve(metrics(folder / way), metrics(folder / "single"))
            # Adam divides by gradients that are next to nothing, where order of addition decides.
            assert difference < 1e-4, rows[-1]
    with capsys.disabled():
        print("", *rows, sep="\n")
