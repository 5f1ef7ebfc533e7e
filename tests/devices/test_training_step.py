"""A training step on a device that computes by itself: nothing waits, and launches are few."""

import math
from dataclasses import replace

import pytest
import torch
from pretend import moved, pretending
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory

from textdiff import loss as loss_module
from textdiff.config import Config
from textdiff.diffusion import randomness
from textdiff.diffusion.family import Blocks, Family, build_family
from textdiff.diffusion.noise import Noise, NoiseUniforms, draw_noise
from textdiff.diffusion.pairs import training_maker
from textdiff.diffusion.process import Vocabulary
from textdiff.loss import Batch, CleanBatch, HeadTerms, PositionTerms, corrupt, training_sum
from textdiff.models import TextDiffusionConfig, TextDiffusionModel
from textdiff.models.layers import Modulation
from textdiff.train.batches import TrainingBatches
from textdiff.train.learned_loss import training_loss

ROWS, LENGTH, VOCABULARY = 3, 16, 45
MASKS = {"process": "absorbing", "objective": {"kind": "mdlm"}}
UNIFORM = {"process": "uniform"}
SPECS = {
    "mdlm": MASKS,
    "blocks": MASKS | {"block_size": 4},
    "next tokens": {"objective": {"kind": "mdlm", "ar_weight": 0.5}, "block_size": 4},
    "shifted outputs": {"objective": {"kind": "mdlm", "shift": True}, "block_size": 4},
    "ar": {"objective": {"kind": "ar"}, "block_size": 1},
    "sedd": {"objective": {"kind": "sedd"}},
    "sedd uniform": UNIFORM | {"objective": {"kind": "sedd"}},
    "d3pm": {"objective": {"kind": "d3pm"}, "timesteps": 5},
    "d3pm uniform": UNIFORM | {"objective": {"kind": "d3pm"}, "timesteps": 5},
    "udlm": UNIFORM | {"objective": {"kind": "udlm"}},
    "udlm blocks": UNIFORM | {"objective": {"kind": "udlm"}, "block_size": 4},
    "gidd": {
        "process": "hybrid", "schedule": {"kind": "hybrid"}, "objective": {"kind": "gidd"},
    },
    "learned": MASKS | {"schedule": {"kind": "learned", "exponent": 1.0}},
}  # fmt: skip


def spec_of(name: str, **more) -> dict:
    common = {"process": "absorbing", "schedule": {"kind": "loglinear"}, "block_size": None}
    return common | {"timesteps": None} | SPECS[name] | more


def network(name: str, **options) -> TextDiffusionModel:
    torch.manual_seed(0)
    levels = spec_of(name)["process"] != "absorbing"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    return TextDiffusionModel(TextDiffusionConfig(
        **(sizes | {"diffusion": spec_of(name)} | options), num_attention_heads=2,
        max_position_embeddings=LENGTH, mask_token_id=44, excluded_token_ids=[43], adaln=levels,
        time_conditioning=levels,
    ))  # fmt: skip


def batch_of(family: Family) -> Batch | CleanBatch:
    x0, blocks = torch.randint(0, 40, (ROWS, LENGTH)), family.blocks(LENGTH)
    level, *positions = (
        torch.rand(ROWS, n, dtype=torch.float64) for n in (blocks.count, LENGTH, LENGTH)
    )
    if family.learned is not None:
        pair = NoiseUniforms(level.repeat(2, 1), torch.cat(positions))
        return CleanBatch(x0, pair, None, family.block_size)
    u = NoiseUniforms(level, *positions) if family.process.replaces_tokens else None
    u = u or NoiseUniforms(level, positions[0])
    noise = draw_noise(family, x0, u, training_maker(family, "count"))
    return corrupt(family, x0, noise, torch.randint(0, 2, (ROWS, LENGTH)).cumsum(1))


def step(model, family, batch) -> list[torch.Tensor]:
    """The loss and all gradients."""
    loss, _ = training_loss(model, family)(batch)
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", SPECS)
def test_a_step_neither_waits_nor_copies_and_is_that_of_the_cpu(name):
    model, vocabulary = network(name), Vocabulary.of(VOCABULARY, 44, [43])
    family = build_family(spec_of(name), vocabulary, None, model.exponents)
    batch = batch_of(family)
    expected = step(model, family, batch)
    model.zero_grad()
    with pretending() as watch:
        moved(model, watch)
        family = build_family(spec_of(name), vocabulary, watch.device, model.exponents)
        watch.uploads.clear()
        there = batch.pin_memory().to(watch.device)
        found = step(model, family, there)
    assert (watch.waits, watch.uploads) == ([], [])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.held, other, rtol=1e-4, atol=1e-5)


SHIFTED, SUMMED = ({"kind": "mdlm"} | more for more in ({"shift": True}, {"ar_weight": 0.5}))


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        ({}, []),
        ({"block_size": 4}, [0, 2]),
        ({"objective": SHIFTED}, [1, 2]),
        ({"objective": SHIFTED, "block_size": 4}, [1]),
        ({"objective": SUMMED, "block_size": 4}, None),
    ],
)
def test_masks_of_a_learned_schedule_are_counted_while_blocks_are_queued(more, rows):
    """Their numbers, in the first pass of some rows and in the step, are read before the last."""
    spec, vocabulary = spec_of("learned", **more), Vocabulary.of(VOCABULARY, 44, [43])
    own = rows is not None
    model = network("learned", num_hidden_layers=3, self_conditioning=own, diffusion=spec)
    if own:
        torch.nn.init.normal_(model.self_conditioning.mlp[-1].weight)
    family = build_family(spec, vocabulary, None, model.exponents)
    ids = torch.randint(0, 2, (ROWS, LENGTH)).cumsum(1)
    first_rows = torch.tensor(rows, dtype=torch.int64) if own else None
    batch = replace(batch_of(family), document_ids=ids, first_rows=first_rows)
    expected = step(model, family, batch)
    model.zero_grad()
    queued = []
    with pretending() as watch:
        moved(model, watch)
        for block in (model.blocks[0], model.blocks[-1]):
            block.register_forward_pre_hook(lambda *_: queued.append(len(watch.launches)))
        family = build_family(spec, vocabulary, watch.device, model.exponents)
        watch.uploads.clear()
        found = step(model, family, batch.pin_memory().to(watch.device))
    assert (watch.waits, watch.uploads) == ([], [])
    passes = [last - first for first, last in zip(queued[::2], queued[1::2], strict=True)]
    assert len(passes) == 1 + own
    assert all(one > other > 40 for one, other in zip(watch.readbacks, passes, strict=True))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.held, other, rtol=1e-4, atol=1e-5)


def test_the_watch_sees_what_a_gpu_would_wait_for():
    with pretending() as watch:
        x = watch.put(torch.arange(6.0))
        float(x.sum()), x.cpu(), x.nonzero(), x[x > 2.0], x.tolist()
        assert len(watch.waits) == 5
        x[torch.tensor([1, 2])], torch.ones(3).to(watch.device)
        assert len(watch.uploads) == 2
        torch.ones(3).pin_memory().to(watch.device)
        x[x > 2.0] = 0.0  # a fill
        assert (len(watch.waits), len(watch.uploads)) == (5, 2)
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.arange(6.0)


class Made(TorchDispatchMode):
    """Notes the sizes of tensors that are made, views among them."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not func._schema.is_mutable:
            leaves = pytree.tree_leaves(made)
            self.shapes += [tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor)]
        return made


def test_modulations_of_blocks_are_never_spread_to_all_positions():
    hidden = 32
    model = network("udlm blocks", hidden_size=hidden)
    family = build_family(spec_of("udlm blocks"), Vocabulary.of(VOCABULARY, 44, [43]))
    batch = batch_of(family)
    with pretending() as watch:
        moved(model, watch)
        family = build_family(spec_of("udlm blocks"), Vocabulary.of(45, 44, [43]), watch.device)
        with Made() as made:
            PositionTerms(model, family, batch.pin_memory().to(watch.device))
    most = max(math.prod(shape) for shape in made.shapes if len(shape) == 3)
    assert most <= ROWS * 2 * LENGTH * 4 * hidden  # inside of an MLP; 6 H before


def test_modulation_by_runs_is_that_of_every_position():
    torch.manual_seed(0)
    x, chunks = torch.randn(3, 24, 8), torch.randn(3, 6, 48)
    index, at = torch.arange(24) // 4, torch.tensor([0, 5, 23, 24, 71])
    results = []
    for way in (Modulation(chunks, index, 6), Modulation(chunks, index[::4], 6, 4)):
        half, some = way.first(12), way.at(at, x.shape)
        flat = x.flatten(0, 1)[at]
        results.append([
            way.modulate(x, 0), way.gate(x, 2), half.modulate(x[:, :12], 3),
            half.gate(x[:, :12], 5), some.modulate(flat, 3), some.gate(flat, 5),
        ])  # fmt: skip
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["mdlm", "next tokens", "udlm", "sedd"])
def test_chunks_of_a_device_sum_to_those_of_the_cpu(name, compiled, monkeypatch):
    """With the last chunk short, or begun earlier so that all have one shape."""
    model, vocabulary = network(name), Vocabulary.of(VOCABULARY, 44, [43])
    family, sizes = build_family(spec_of(name), vocabulary), set()
    batch = batch_of(family)
    expected = step(model, family, batch)
    model.zero_grad()

    def counted(objective, logits, *rest):
        sizes.add(len(logits))
        return loss_module.objective_terms(objective, logits, *rest)

    monkeypatch.setattr(loss_module, "DEVICE_CHUNK_LOGITS", 7 * VOCABULARY)
    monkeypatch.setattr(loss_module, "_compiled_terms", lambda: counted)
    with pretending() as watch:
        moved(model, watch)
        model.blocks[-1]._compiled_call_impl = model.blocks[-1]._call_impl if compiled else None
        family = build_family(spec_of(name), vocabulary, watch.device)
        found = step(model, family, batch.pin_memory().to(watch.device))
    assert sizes == ({7} if compiled else set())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.held, other, rtol=1e-4, atol=1e-5)


def test_head_and_loss_launch_few_kernels():
    """Half of 32 rows of 1024 tokens, and GPT-2's vocabulary."""
    positions, vocabulary = 16384, 50258

    def there(*shape: int, dtype=torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    with torch.device("meta"):
        model = network("mdlm", vocab_size=vocabulary)
    family = build_family(spec_of("mdlm"), Vocabulary.of(vocabulary, vocabulary - 1))
    process = replace(family.process, vocabulary=family.process.vocabulary.to(torch.device("meta")))
    terms = object.__new__(PositionTerms)  # without a trunk
    HeadTerms.__init__(terms, model, [there(positions, 16).requires_grad_()])
    terms.following, terms.objective = None, family.objective.on(process)
    terms.x0 = terms.xt = there(positions, dtype=torch.int64)
    terms.noise = Noise(*(there(positions, dtype=torch.float64) for _ in range(4)))
    with pretending(shapes_only=True) as watch, Made() as made:
        training_sum(terms)[0].backward()
    assert len(watch.launches) <= 200
    chunks = len(terms.chunks())
    assert watch.launches.count("addmm_") == chunks  # products are added to the sum of gradients
    assert made.shapes.count((vocabulary, 16)) < chunks


def test_batches_are_pinned_by_data_loaders():
    family = build_family(spec_of("d3pm uniform"), Vocabulary.of(VOCABULARY, 44, [43]))
    learned = build_family(
        spec_of("learned"), Vocabulary.of(VOCABULARY, 44, [43]), None, network("learned").exponents
    )
    with pretending():
        for batch in (batch_of(family), batch_of(learned)):
            tensors = []
            pin_memory(batch).map(tensors.append)
            assert len(tensors) > 2
            assert all(getattr(x, "pretends_pinned", False) for x in tensors)


def test_micro_batches_of_a_step_share_their_levels(monkeypatch):
    config = Config.model_validate({"train": {"global_batch_size": 8, "micro_batch_size": 2}})
    family = build_family(spec_of("blocks"), Vocabulary.of(VOCABULARY, 44, [43]))
    made, blocks, draw = TrainingBatches(None, family, config), Blocks(16, 4), []
    stratified = randomness.stratified
    randomness.level_uniforms.cache_clear()
    monkeypatch.setattr(randomness, "stratified", lambda *u: draw.append(1) or stratified(*u))
    levels = [made.levels(step, 8, blocks) for step in (0, 0, 0, 1, 1, 0)]
    assert len(draw) == 3
    assert torch.equal(levels[0], levels[-1])
    assert not torch.equal(levels[0], levels[3])
