"""The operations that MFU and plans count against those that a training step executes."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_backbones import write_backbone
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from textdiff.config import Config
from textdiff.export.adapters import add_adapters
from textdiff.export.loading import family_of
from textdiff.models import Layout, block
from textdiff.planning.sizes import run_sizes
from textdiff.train import operations
from textdiff.train.batches import TrainingBatches
from textdiff.train.learned_loss import training_loss
from textdiff.train.operations import flops_per_token, token_uses
from textdiff.train.setup import architecture

ROWS, LENGTH, VOCABULARY = 64, 32, 262
LEVELS = {"adaln": True, "time_conditioning": True}
UNIFORM = {"process": "uniform", "objective": {"kind": "udlm"}}
NEXT = {"kind": "mdlm", "ar_weight": 0.5}
STEPS = {"timesteps": 4, "objective": {"kind": "d3pm"}, "noise": {"draw": "time"}}
LORA = {"rank": 2, "alpha": 4}
CASES = {
    "full": {},
    "blocks": {"diffusion": {"block_size": 8}},
    "two sizes": {"diffusion": {"block_size": [4, None]}},
    "next tokens": {"diffusion": {"block_size": 8, "objective": NEXT}},
    "left to right": {"diffusion": {"block_size": 1, "objective": {"kind": "ar"}}},
    "levels": {"model": LEVELS, "diffusion": {"block_size": 8}},
    "uniform": {"model": LEVELS, "diffusion": UNIFORM},
    "by time": {"diffusion": {"schedule": {"kind": "cosine"}, "noise": {"draw": "time"}}},
    "steps": {"diffusion": STEPS},
    "prompts": {"diffusion": {"noise": {"prompts": 0.5, "range": [0.2, 0.6]}}},
    "both masks": {"diffusion": {"noise": {"complementary": True}}},
    "learned": {"diffusion": {"schedule": {"kind": "learned"}, "noise": {"draw": "time"}}},
    "twice": {"model": {"self_conditioning": True}, "diffusion": {"block_size": 8}},
    "recomputed": {"model": {"gradient_checkpointing": True}},
    "adapters": {"model": {"num_layers": 6}, "train": {"lora": LORA, "init_from": "x"}},
    "llama": {"model": "llama"},
    "modernbert": {"model": "modernbert"},
}  # fmt: skip


aten = torch.ops.aten
FORMULAS = flop_registry | {aten.addmm_: flop_registry[aten.addmm]}


class Executed(TorchDispatchMode):
    """Operations by torch's formulas; its own mode cannot look into a gradient inside a forward."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, formula = func(*args, **(kwargs or {})), FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.counts[str(func)] += formula(*args, **(kwargs or {}), out_val=result)
        return result


def config_of(tmp_path, case: dict) -> Config:
    model = case.get("model", {})
    if isinstance(model, str):
        model = {"kind": "transformers", "path": str(write_backbone(tmp_path / model, model))}
    else:
        model = {"hidden_size": 48, "num_layers": 4, "num_heads": 3, **model}
    train = {"global_batch_size": ROWS, "micro_batch_size": ROWS, **case.get("train", {})}
    data = {"data": {"sequence_length": LENGTH}, "tokenizer": {"kind": "byte"}}
    return Config.model_validate(data | case | {"model": model, "train": train})


def executed(config: Config) -> tuple[float, float, torch.nn.Module]:
    """Operations of products and of attention per data token, averaged over steps; the network."""
    configuration = architecture(config, VOCABULARY, mask_token_id=VOCABULARY - 1)
    model = config.model.build(configuration)
    if config.train.lora is not None:
        add_adapters(model, config.train.lora)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    family = family_of(model.config, torch.device("cpu"), model.exponents)
    tokens = torch.randint(0, 256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = SimpleNamespace(tokens=tokens.numpy(), documents=None)
    batches = TrainingBatches(SimpleNamespace(rows=lambda _: rows), family.on_cpu, config)
    module, counter = training_loss(model.train(), family), Executed()
    sizes = config.diffusion.block_sizes
    steps = [next(s for s in range(99) if batches.block_size(s) == size) for size in sizes]
    for step in steps:
        with counter:
            module(batches.batch(step, torch.arange(ROWS)))[0].backward()
    pairs = sum(number for name, number in counter.counts.items() if "bmm" in name)
    per_token = 1 / (len(steps) * tokens.numel())
    return (counter.counts.total() - pairs) * per_token, pairs * per_token, model


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_products_are_those_of_a_step(tmp_path, monkeypatch, case):
    """Within 3 %: masks and the rows of a first pass are drawn."""
    if "lora" in case.get("train", {}):
        pytest.importorskip("peft")
    monkeypatch.setattr(block, "UNIQUE_FROM", 2**31)  # a CPU projects equal tokens once
    config = config_of(tmp_path, case)
    products, _, model = executed(config)
    monkeypatch.setattr(operations, "_attention", lambda *_: 0.0)
    counted = flops_per_token(config, model)
    assert counted.computed == pytest.approx(products, rel=0.03)
    assert (counted.computed > counted.model) == config.model.gradient_checkpointing


def test_attention_is_that_of_a_step(tmp_path):
    """All pairs of two products, three times; masked ones are computed by this backend."""
    config = config_of(tmp_path, {"model": {"attn_implementation": "eager"}})
    _, pairs, model = executed(config)
    (use,) = token_uses(config)
    assert pairs == 3 * operations._attention(model, use, False)


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_those_that_layouts_allow(tmp_path, causal):
    diffusion = {
        "block_size": 8,
        "objective": {"kind": "mdlm", "ar_weight": 0.5 if causal else 0.0},
    }
    (use,) = token_uses(config_of(tmp_path, {"diffusion": diffusion}))
    allowed = Layout("block_diffusion", 8, causal_context=causal).mask(2 * LENGTH, "cpu")
    assert use.pairs * LENGTH == allowed.sum()
    assert use.noisy_pairs * LENGTH == allowed[:LENGTH].sum()
    (use,) = token_uses(config_of(tmp_path, CASES["left to right"]))
    assert use.pairs * LENGTH == Layout("causal").mask(LENGTH, "cpu").sum()


@pytest.mark.parametrize(("block_size", "expected"), [(None, 31.46e6), (16, 55.71e6)])
def test_flops_of_a_published_size(tmp_path, block_size, expected):
    """6 layers of H = 256, L = 256, V = 257: 3 (24 H^2 n + H V + 4 H L n), less in the last one.

    The last one leaves out 18 H^2 at half of the positions; of a clean stream 20 H^2, and half of
    the pairs.
    """
    model = {"hidden_size": 256, "num_layers": 6, "num_heads": 4}
    case = {"model": model, "diffusion": {"block_size": block_size}}
    config = config_of(tmp_path, case)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"sequence_length": 256})}
    )
    assert run_sizes(config, 257, half=False).flops.model == pytest.approx(expected, rel=0.005)


def test_experts_multiply_what_is_routed_to_them(tmp_path):
    options = {"num_experts": 4, "moe_intermediate_size": 16}
    flops = []
    for chosen in (1, 2):
        folder = write_backbone(
            tmp_path / str(chosen), "qwen3_moe", num_experts_per_tok=chosen, **options
        )
        raw = {"model": {"kind": "transformers", "path": str(folder)}}
        made = Config.model_validate({**raw, "data": {"sequence_length": LENGTH}})
        flops.append(run_sizes(made, 262, half=False).flops.model)
    assert flops[1] - flops[0] == 6 * 2 * 3 * 32 * 16  # layers, matrices


def test_compiled_blocks_compute_more_than_is_needed(tmp_path):
    config = config_of(tmp_path, {"train": {"compile": True}})
    compiled = run_sizes(config, VOCABULARY, half=False).flops
    train = config.train.model_copy(update={"compile": False})
    eager = run_sizes(config.model_copy(update={"train": train}), VOCABULARY, half=False).flops
    assert replace(compiled, computed=compiled.model) == eager
    assert compiled.computed - compiled.model == pytest.approx(6 * 9 * 48**2 * (31 / 64))
