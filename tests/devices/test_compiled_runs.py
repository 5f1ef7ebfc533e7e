"""Training with compiled blocks, and by deterministic kernels, through the command."""

import json
from dataclasses import replace

import pytest
import torch
from test_training_step import SPECS, batch_of, network, spec_of
from torch._dynamo.utils import counters
from training_runs import Runs

from textdiff.cli import main
from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.loss import PositionTerms, objective_terms
from textdiff.models import devices
from textdiff.train.determinism import deterministic
from textdiff.train.trainer import Trainer

META = torch.device("meta")
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
        counts = devices.compilation_counts()
    finally:
        torch._dynamo.reset()
        counters.clear()
    # One for whole sequences, two for blocks: the last one computes less of the clean stream.
    assert counts == {"graphs": 3, "breaks": 0}
    assert "torch.compile made 3 graphs, with 0 breaks" in capsys.readouterr().out
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("bound_nats" in line for line in lines) == 3


class Named(torch.nn.Module):
    """A block that is compiled anew for each name."""

    def forward(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x + 1 if name else x


def test_the_limit_of_variants_is_high_and_to_reach_it_is_an_error(monkeypatch):
    """torch itself runs the ninth variant as it is, and says so in a log."""
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_block(self, backend="eager")
    )
    assert devices.VARIANTS == 64
    monkeypatch.setattr(devices, "VARIANTS", 10)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        devices.compile_blocks([block := Named()])
        for number in range(10):
            block(torch.ones(()), str(number))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            block(torch.ones(()), "one more")
    torch._dynamo.reset()


def test_steps_are_deterministic_where_that_is_asked_for():
    for active in (False, True):
        with deterministic(active):
            assert torch.are_deterministic_algorithms_enabled() is active
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_takes_its_steps_by_such_kernels(tmp_path, request, monkeypatch, asked):
    step, seen = Trainer._step, []

    def watched(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(*arguments)

    monkeypatch.setattr(Trainer, "_step", watched)
    flags = ("--train.steps=2", "--evaluate.max-documents=1", "--evaluate.every=2")
    Runs(tmp_path, request.config.rootpath).train(
        "run", f"--train.deterministic={str(asked).lower()}", *flags
    )
    assert seen == [asked, asked]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SPECS) - {"learned"}))  # whose noise a device makes
def test_the_objective_of_a_chunk_is_one_graph(name):
    model = network(name)
    family = build_family(spec_of(name), Vocabulary.of(45, 44, [43]))
    terms, chunk = PositionTerms(model, family, batch_of(family), training=True), slice(0, 5)
    logits = terms.head(*(x[chunk].detach() for x in terms.inputs)).detach()
    objective, inputs = terms.objective, terms._at(chunk)
    if "sedd" in name:  # on a CPU it looks at numbers
        process = replace(family.process, vocabulary=family.process.vocabulary.to(META))
        objective, (x0, xt, noise) = objective.on(process), inputs
        inputs = x0.to(META), xt.to(META), noise.map(lambda x: x.to(META))
        logits = logits.to(META)
    torch._dynamo.reset()
    whole, results = torch.compile(objective_terms, backend="eager", fullgraph=True), []
    for function in (objective_terms, whole):
        leaf = logits.clone().requires_grad_()
        losses, nelbo = function(objective, leaf, *inputs)
        results.append((losses, nelbo, *torch.autograd.grad(losses.sum(), leaf)))
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        assert one.is_meta or torch.equal(one, other)
