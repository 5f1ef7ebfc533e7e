"""Gathering of FSDP2: when, in which precision; two ranks have the unsharded numbers."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from forked_ranks import in_ranks
from torch._dynamo.utils import counters
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.noise import ByCount, NoiseUniforms, draw_noise
from textdiff.diffusion.process import Vocabulary
from textdiff.loss import DenoisingLoss, corrupt
from textdiff.models import TextDiffusionConfig, TextDiffusionModel
from textdiff.models.backbone import TransformersDenoiser
from textdiff.models.devices import compilation_counts
from textdiff.train.sharding import shard

pytestmark = pytest.mark.dist
ROWS, LENGTH = 11, 8


def family_of(block_size: int | None = None, **objective: float) -> Family:
    spec = {
        "process": "absorbing",
        "schedule": {"kind": "loglinear"},
        "objective": {"kind": "mdlm", **objective},
        "block_size": block_size,
    }
    return build_family(spec, Vocabulary.of(ROWS, 4, ()))


def build() -> DenoisingLoss:
    torch.manual_seed(0)
    config = TextDiffusionConfig(
        vocab_size=ROWS,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        conditioning_size=8,
        adaln=True,
        time_conditioning=False,
        mask_token_id=4,
    )
    model = TextDiffusionModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return DenoisingLoss(model, family_of())


def build_two_losses() -> DenoisingLoss:
    """The next-token loss of the clean stream gives the head gradients, too."""
    torch.manual_seed(0)
    config = TextDiffusionConfig(
        vocab_size=ROWS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        mask_token_id=4,
    )
    return DenoisingLoss(TextDiffusionModel(config), family_of(4, ar_weight=0.5))


def build_llama() -> DenoisingLoss:
    """Embedding and head are two tables."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    config.mask_token_id, config.excluded_token_ids, config.diffusion = 4, [], {}
    return DenoisingLoss(TransformersDenoiser(config), family_of())


def batch_of(loss: DenoisingLoss, rank: int):
    generator = torch.Generator().manual_seed(rank)
    x0 = torch.randint(5, ROWS, (4, LENGTH), generator=generator)
    u = torch.rand(4, LENGTH, generator=generator, dtype=torch.float64)
    blocks = loss.family.blocks(LENGTH).count
    v = torch.rand(4, blocks, generator=generator, dtype=torch.float64)
    return corrupt(
        loss.family, x0, draw_noise(loss.family, x0, NoiseUniforms(v, u), ByCount()), None
    )


def gathered(model) -> dict[str, torch.dtype]:
    return {name: p.dtype for name, p in model.named_parameters() if not isinstance(p, DTensor)}


def step(loss, batch, half: bool) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        total, _ = loss(batch)
    total.backward()
    return total.detach()


def processes(half: bool) -> SimpleNamespace:
    """The parts of an accelerator that `shard` reads."""
    plugin = SimpleNamespace(cpu_offload=OffloadPolicy(), reshard_after_forward=True)
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16" if half else "no",
        device=torch.device("cpu"),
        parallelism_config=None,
        num_processes=dist.get_world_size(),
    )


def sharded_step(rank: int, half: bool):
    """Loss and gradients, expected and sharded, and what is gathered inside of some modules."""
    plain = build()
    loss = copy.deepcopy(plain)
    total = step(plain, batch_of(plain, rank), half)
    expected = {name: p.grad for name, p in plain.denoiser.named_parameters()}
    for gradient in expected.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    shard(loss, processes(half))
    model, seen = loss.denoiser, {}
    for name in ("vocab_embed", "blocks.1.attn_out", "output_layer.linear"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, at=name: seen.update({at: gathered(model)}))
    names = [name for name, _ in model.named_parameters()]
    assert names == list(expected)
    assert not gathered(model)
    found = step(loss, batch_of(loss, rank), half)
    seen["after"] = gathered(model)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return (total, expected), (found, gradients), seen


@pytest.mark.parametrize("half", [False, True])
def test_a_sharded_step_has_the_numbers_of_an_unsharded_one(half):
    for (total, expected), (found, gradients), seen in in_ranks(
        2, lambda rank: sharded_step(rank, half)
    ):
        assert torch.equal(found, total)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        assert_gathered_when_used(seen, expected, half)


@pytest.mark.parametrize("build_loss", [build_two_losses, build_llama])
def test_sharding_alone_rounds_nothing(build_loss):
    def work(rank: int):
        plain, loss = build_loss(), build_loss()
        shard(loss, processes(True))
        totals = [step(module, batch_of(module, 0), True) for module in (plain, loss)]
        expected = {name: p.grad for name, p in plain.named_parameters()}
        return totals, expected, {name: p.grad.full_tensor() for name, p in loss.named_parameters()}

    (((total, found), expected, gradients),) = in_ranks(1, work)
    assert torch.equal(found, total)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def compiled_steps(rank: int) -> tuple[list[torch.Tensor], dict[str, int]]:
    loss = build()
    for block in loss.denoiser.blocks:
        block.compile(backend="eager")
    shard(loss, processes(True))
    torch._dynamo.reset()
    counters.clear()  # of the tests before, which this fork inherits
    return [step(loss, batch_of(loss, number), True) for number in range(3)], compilation_counts()


def test_gathering_does_not_break_the_graphs_of_blocks():
    ((found, counts),) = in_ranks(1, compiled_steps)
    plain = build()
    expected = [step(plain, batch_of(plain, number), True) for number in range(3)]
    assert all(map(torch.equal, found, expected))
    assert counts == {"graphs": 1, "breaks": 0}


def assert_gathered_when_used(seen, parameters, half: bool) -> None:
    """Matrices of one block at a time, the tables where they are used, and nothing afterwards."""
    in_blocks = {name for name in parameters if name.startswith("blocks.")}
    vectors = {name for name in in_blocks if parameters[name].ndim < 2} if half else set()
    tables = {name for name in parameters if name.startswith(("vocab_embed", "output_layer"))}
    root = (set(parameters) - in_blocks - tables) | vectors
    own = {name for name in in_blocks if name.startswith("blocks.1.")}
    assert set(seen["vocab_embed"]) == root | {"vocab_embed.embedding"}
    assert set(seen["blocks.1.attn_out"]) == root | own
    assert set(seen["output_layer.linear"]) == root | (tables - {"vocab_embed.embedding"})
    assert not seen["after"]
    for at in seen.values():
        for name, dtype in at.items():
            low = half and name in in_blocks - vectors
            assert dtype == (torch.bfloat16 if low else torch.float32), name
