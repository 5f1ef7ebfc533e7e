"""Predicted sizes against the real network, its saved tensors and its optimizers."""

from dataclasses import replace

import pytest
import torch
from tiny_backbones import write_backbone

from textdiff.config import Config
from textdiff.models import TextDiffusionModel, training_layout
from textdiff.planning.memory import (
    MAPPED,
    activations,
    block_bytes,
    block_probabilities,
    communication,
    from_heap,
    largest_micro_batch,
    optimizer_state,
    peak_memory,
)
from textdiff.planning.sizes import RunSizes, run_sizes
from textdiff.train.optim import build_optimizers
from textdiff.train.setup import architecture

VOCABULARY = 23
SEES_NOISE = {"adaln": True, "time_conditioning": True}
NETWORKS = {
    "plain": {},
    "dropout": {"dropout": 0.1},
    "swiglu": {"mlp": "swiglu"},
    "rmsnorm": {"norm": "rmsnorm"},
    "qk_norm": {"qk_norm": True},
    "adaln": {"adaln": True},
    "levels": SEES_NOISE,
    "eager": {"attn_implementation": "eager"},
}


def config(model=None, **sections) -> Config:
    small = {"hidden_size": 64, "num_layers": 2, "num_heads": 2}
    train = {"global_batch_size": 4, "micro_batch_size": 4, **sections.pop("train", {})}
    raw = {"data": {"sequence_length": 64}, "model": {**small, **(model or {})}, "train": train}
    return Config.model_validate({**raw, **sections})


def real(made: Config) -> TextDiffusionModel:
    return TextDiffusionModel(architecture(made, VOCABULARY, mask_token_id=VOCABULARY - 1))


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_are_those_of_the_real_model(network, optimizer):
    made = config(network, train={"optimizer": optimizer})
    counts, model = run_sizes(made, VOCABULARY, half=False).counts, real(made)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.head == sum(p.numel() for p in model.output_layer.parameters())
    assert counts.block == sum(p.numel() for p in model.blocks[1].parameters())
    assert counts.root + 2 * counts.block == counts.total
    assert (counts.muon > 0) == (optimizer == "muon")


def test_a_learned_schedule_is_counted_and_doubles_the_batch():
    learned = {"schedule": {"kind": "learned"}, "noise": {"draw": "time"}}
    made = config(diffusion=learned)
    sizes = run_sizes(made, VOCABULARY, half=False)
    assert sizes.counts.total == sum(p.numel() for p in real(made).parameters())
    assert sizes.tokens == 2 * 4 * 64


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_bytes_are_those_of_a_real_step(optimizer):
    made = config(train={"optimizer": optimizer})
    model = real(made)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    held = 0
    for built in build_optimizers(model, made.train):
        built.step()
        states = (t for state in built.state.values() for t in state.values())
        held += sum(t.nbytes for t in states if t.ndim > 0)  # step counters are scalars
    assert optimizer_state(run_sizes(made, VOCABULARY, half=False)) == held


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def saved_bytes(made: Config, half: bool, rows: int = 4) -> int:
    """Bytes of everything that the blocks keep for the backward pass, weights aside."""
    if made.model.kind == "textdiff":
        model = real(made).train()
    else:
        model = made.model.build(architecture(made, 262, mask_token_id=261)).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(rows, 64, dtype=torch.int64)
    size = made.diffusion.block_size
    context, levels = (None, 1) if size is None else (ids, 64 // size)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model.hidden(ids, context, torch.ones(rows, levels), training_layout(size))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_activations_are_the_tensors_that_autograd_saves(network, half):
    one, three = (config({**network, "num_layers": n}) for n in (1, 3))
    sizes = run_sizes(one, VOCABULARY, half)
    casts = 2 * sizes.counts.matrices if half else 0
    real_bytes = (saved_bytes(three, half) - saved_bytes(one, half)) / 2 - casts
    # What is not per position, such as a modulation's weights in half precision, is left out.
    assert sizes.tokens * sum(block_bytes(sizes).values()) == pytest.approx(real_bytes, rel=0.02)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("network", ["dropout", "levels"])
def test_activations_of_two_streams_are_what_autograd_saves(network, half):
    """From the second to the last but one block: the last one leaves the clean stream out."""
    made = [
        config({**NETWORKS[network], "num_layers": n}, diffusion={"block_size": 16}) for n in (2, 4)
    ]
    sizes = run_sizes(made[0], VOCABULARY, half)
    casts = sizes.counts.matrices if half else 0  # of two layers, halved
    real_bytes = (saved_bytes(made[1], half) - saved_bytes(made[0], half)) / 2 - casts
    assert sizes.tokens * sum(block_bytes(sizes).values()) == pytest.approx(real_bytes, rel=0.02)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt2", "modernbert"])
def test_a_backbone_keeps_what_autograd_saves(tmp_path, kind, half):
    """Grouped heads, experts, activations in many operations; parameters of tied heads once."""
    made = []
    for layers in (1, 3):
        options = {"num_hidden_layers": layers, "tie_word_embeddings": True, **EXPERTS}
        folder = write_backbone(tmp_path / str(layers), kind, **options)
        network = {"kind": "transformers", "path": str(folder)}
        train = {"global_batch_size": 4, "micro_batch_size": 4, "optimizer": "muon"}
        raw = {"data": {"sequence_length": 64}, "diffusion": {"block_size": 16}}
        made.append(Config.model_validate({**raw, "model": network, "train": train}))
    one, sizes = (run_sizes(c, 262, half) for c in made)
    model = made[1].model.build(architecture(made[1], 262, mask_token_id=261))
    assert sizes.counts.total == sum(p.numel() for p in model.parameters())
    assert sizes.counts.muon == sum(p.numel() for p in model.block_matrices())
    real = [saved_bytes(c, half, rows) for c in made for rows in (2, 4)]
    real_bytes = (real[3] - real[2]) - (real[1] - real[0])  # without casts of weights
    counted = (activations(sizes) - activations(one)) / 2  # of 2 rows
    assert counted == pytest.approx(real_bytes, rel=0.02)


def test_two_streams_double_activations_and_recomputing_keeps_inputs_alone():
    made = config()
    whole = run_sizes(made, VOCABULARY, half=True)
    blocks = run_sizes(config(diffusion={"block_size": 16}), VOCABULARY, half=True)
    again = run_sizes(config({"gradient_checkpointing": True}), VOCABULARY, half=True)
    kept = sum(block_bytes(blocks).values()) - block_probabilities(blocks)
    assert kept == sum(block_bytes(whole).values())  # bfloat16 keeps no log-sum-exp
    assert blocks.tokens == 2 * whole.tokens
    assert 1.5 < activations(blocks) / activations(whole) < 2.5
    assert activations(again) == 2 * 4 * 64 * 64 * 4  # layers x tokens x hidden x float32
    left_to_right = {"objective": {"kind": "ar"}, "block_size": 1}
    assert run_sizes(config(diffusion=left_to_right), VOCABULARY, half=True).streams == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_largest_micro_batch_is_the_last_that_fits(checkpointing):
    sizes = run_sizes(config({"gradient_checkpointing": checkpointing}), VOCABULARY, half=False)
    rows = largest_micro_batch(sizes, 300_000_000)
    fits, bursts = (peak_memory(sizes.with_rows(n))["resident"] for n in (rows, rows + 1))
    assert rows > 4
    assert fits <= 300_000_000 < bursts
    assert largest_micro_batch(sizes, 1000) == 0


def test_more_of_anything_needs_more_and_sharding_less():
    base = peak_memory(run_sizes(config(), VOCABULARY, half=False))
    for larger in (config({"num_layers": 3}), config({"hidden_size": 128})):
        assert peak_memory(run_sizes(larger, VOCABULARY, half=False))["peak"] > base["peak"]
    assert peak_memory(run_sizes(config(), 10 * VOCABULARY, half=False))["peak"] > base["peak"]
    assert (
        peak_memory(run_sizes(config(), VOCABULARY, half=True))["activations"] < base["activations"]
    )
    big = config({"num_layers": 12, "hidden_size": 256}, train={"global_batch_size": 32})
    copies, shards = (
        peak_memory(replace(run_sizes(big, VOCABULARY, half=False, devices=8), sharded=s))
        for s in (False, True)
    )
    assert shards["weights"] == copies["weights"] // 8
    assert shards["optimizer"] == copies["optimizer"] // 8
    assert copies["communication"] == copies["weights"]
    assert copies["peak"] > shards["peak"]
    sizes = run_sizes(big, VOCABULARY, half=True, devices=8)
    copies, shards = (peak_memory(replace(sizes, sharded=s)) for s in (False, True))
    # Blocks are gathered in bfloat16, so that only the head is cast.
    assert copies["low_precision"] - shards["low_precision"] == 2 * sizes.counts.matrices


def sharded_sizes(half: bool, model=None) -> RunSizes:
    train = {"global_batch_size": 8, "micro_batch_size": 1}
    made = config({"num_layers": 3, **(model or {})}, train=train)
    return replace(run_sizes(made, 5000, half, devices=8), sharded=True)


@pytest.mark.parametrize("half", [False, True])
def test_what_is_gathered_together_is_what_the_policy_of_sharding_says(half):
    sizes = sharded_sizes(half)
    model = TextDiffusionModel(architecture(sizes.config, 5000, mask_token_id=4999))
    block = [p.numel() for p in model.blocks[1].parameters() if p.ndim == 2 or not half]
    vectors = [p.numel() for p in model.blocks.parameters() if p.ndim < 2 and half]
    table, head = (
        sum(p.numel() for p in module.parameters())
        for module in (model.vocab_embed, model.output_layer)
    )
    root = sum(p.numel() for p in model.parameters()) - table - head - 3 * sum(block)
    assert root >= sum(vectors)
    # Two blocks as they are multiplied, and gradients of one with their float32 copies.
    blocks = (2 * sizes.value + sizes.value + 4) * sum(block)
    moments = communication(sizes)
    assert moments["loss"] == 4 * root + 8 * head  # the head, and the buffer it came in
    assert moments["start"] == 8 * root + blocks
    assert moments["end"] == 4 * root + 8 * (root + table)
    assert moments["update"] == 0
    assert peak_memory(sizes)["communication"] == max(moments.values())


def test_one_table_or_both_in_the_root_are_gathered_for_the_whole_pass():
    apart, both = (sharded_sizes(False, {"self_conditioning": on}).counts for on in (False, True))
    assert min(apart.tables) > 0
    assert both.tables == (0, 0)


def test_a_large_table_does_not_hide_the_widest_tensor_of_a_block(tmp_path):
    """Of a llama's MLP: gate, its activation, values and their product have 48 channels each."""
    folder = write_backbone(tmp_path, "llama", rows=10_000)
    train = {"global_batch_size": 4, "micro_batch_size": 4}
    network = {"kind": "transformers", "path": str(folder)}
    raw = {"data": {"sequence_length": 64}, "model": network, "train": train}
    sizes = run_sizes(Config.model_validate(raw), 10_262, half=False)
    counted = sizes.blocks.counted
    assert counted.widest == 4 * 48
    assert from_heap(sizes, 10**9) == 10**9
    many = sizes.with_rows(MAPPED // (64 * 4 * 48))  # the widest tensors have 32 MiB
    kept = activations(many)
    assert from_heap(many, kept) == kept - 2 * 4 * many.tokens * 4 * 48


def test_accumulated_gradients_are_alive_while_activations_are():
    made = config(train={"global_batch_size": 8})
    once, twice = (peak_memory(run_sizes(c, VOCABULARY, half=False)) for c in (config(), made))
    assert twice["peak"] == once["peak"] + once["gradients"]
