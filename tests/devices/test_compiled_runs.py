"""Training with compiled blocks, and by deterministic kernels, through the command."""

import json

import pytest
import torch
from torch._dynamo.utils import counters

from textdiff.cli import main
from textdiff.models import compilation
from textdiff.train.determinism import deterministic

CONFIG = """
data: {{sources: [{{source: {folder}/corpus.txt}}], sequence_length: 16, cache_dir: {folder}/cache}}
tokenizer: {{kind: byte}}
model: {{hidden_size: 16, num_layers: 2, num_heads: 2}}
diffusion: {{block_size: [4, null]}}
train: {{steps: 10, global_batch_size: 4, micro_batch_size: 4, warmup_steps: 2, log_every: 5,
         mixed_precision: fp32, checkpoint_every: 10, compile: true}}
evaluate: {{every: 4, max_documents: 2}}
sample: {{num_samples: 1, steps: 4, max_new_tokens: 8}}
"""


@pytest.mark.slow
def test_evaluation_between_compiled_steps_compiles_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "corpus.txt").write_text("".join(f"Line {i} is here.\n\n" for i in range(80)))
    (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path))
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_block(self, backend="eager")
    )
    torch._dynamo.reset()
    counters.clear()
    try:
        assert main(["train", str(tmp_path / "c.yaml"), f"--run.dir={tmp_path / 'run'}"]) == 0
        counts = compilation.compilation_counts()
    finally:
        torch._dynamo.reset()
        counters.clear()
    # One for whole sequences, two for blocks: the last one computes less of the clean stream.
    assert counts == {"graphs": 3, "breaks": 0}
    assert "torch.compile made 3 graphs, with 0 breaks" in capsys.readouterr().out
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("bound_nats" in line for line in lines) == 3


def test_a_limit_of_variants_is_an_error(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    compilation.refuse_fallbacks()
    assert torch._dynamo.config.recompile_limit == 64
    assert torch._dynamo.config.fail_on_recompile_limit_hit


def test_steps_are_deterministic_where_that_is_asked_for():
    for active in (False, True):
        with deterministic(active):
            assert torch.are_deterministic_algorithms_enabled() is active
        assert not torch.are_deterministic_algorithms_enabled()
