"""Compiled blocks: one graph for each kind of call, and none of them broken."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from textdiff.models import (
    CAUSAL,
    TextDiffusionConfig,
    TextDiffusionModel,
    sampling_layout,
    training_layout,
)

ROWS, LENGTH = 4, 32
RICH = {"mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True, "adaln": True}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(compiled: bool, train: bool, dropout: float = 0.0, **options) -> TextDiffusionModel:
    torch.manual_seed(0)
    config = TextDiffusionConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=LENGTH, mask_token_id=49, dropout=dropout, **options,
    )  # fmt: skip
    model = TextDiffusionModel(config).train(train)
    for block in model.blocks if compiled else ():
        block.compile(backend="eager")  # traced as for a GPU, without a code generator
    return model


def steps(model, layout, grad: bool, documents: bool = False, autocast: bool = False) -> list:
    """Calls with other tokens, and other numbers of positions; the gradients where there are."""
    torch.manual_seed(1)
    found = []
    for step in range(3):
        ids = torch.randint(0, 50, (ROWS, LENGTH))
        blocks = LENGTH // layout.block_size if layout.block_size else 1
        parts = torch.randint(0, 2, (ROWS, LENGTH)).cumsum(1) if documents else None
        with (
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            logits = model(
                ids,
                context_ids=ids if layout.streams == 2 else None,
                sigma=torch.rand(ROWS, blocks),
                layout=layout.within(parts),
                positions=torch.arange(0, ROWS * LENGTH, 2 + step),
            ).logits
        if grad:
            model.zero_grad()
            logits.float().square().mean().backward()
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append(logits.detach())
    return found


def graphs_and_breaks() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


LAYOUTS = {"full": training_layout(None), "blocks": training_layout(8), "ar": CAUSAL,
           "canvas": sampling_layout(8)}  # fmt: skip


TIMED = RICH | {"time_conditioning": True}


@pytest.mark.parametrize(
    ("train", "dropout", "options"),
    [(True, 0.0, {}), (True, 0.0, TIMED), (True, 0.1, RICH), (False, 0.1, TIMED)],
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_graph_is_broken(name, train, dropout, options):
    model = build(True, train, dropout, **options)
    found = steps(model, LAYOUTS[name], grad=train)
    graphs, breaks = graphs_and_breaks()
    assert breaks == 0, dict(counters["graph_break"])
    assert 1 <= graphs <= (2 if name == "blocks" else 1)
    if dropout == 0.0 or not train:
        plain = steps(build(False, train, dropout, **options), LAYOUTS[name], grad=train)
        for mine, other in zip(found, plain, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "documents", "autocast", "recomputed"),
    [
        ("full", True, False, False),
        ("full", False, True, True),
        ("blocks", True, True, False),
        ("blocks", False, True, True),
    ],
)
def test_no_graph_is_broken_otherwise(name, documents, autocast, recomputed):
    model = build(True, True, 0.1, **RICH)
    if recomputed:
        model.gradient_checkpointing_enable()
    steps(model, LAYOUTS[name], True, documents, autocast)
    graphs, breaks = graphs_and_breaks()
    assert breaks == 0, dict(counters["graph_break"])
    assert graphs <= 2


def test_evaluation_between_steps_adds_graphs_and_no_breaks():
    model = build(True, True, 0.1)
    for train in (True, False, True, False):
        steps(model.train(train), LAYOUTS["blocks"], grad=train)
    assert graphs_and_breaks() == (4, 0)  # two kinds of calls, with gradients and without


def test_calls_with_a_cache_are_not_compiled():
    model = build(True, False)
    cache = model.new_cache(ROWS, LENGTH)
    with torch.no_grad():
        for start in range(0, LENGTH, 8):
            starts = torch.full((ROWS,), start)
            view = cache.exact_slice(LAYOUTS["canvas"], starts, 8, None, None)
            found = model(torch.randint(0, 50, (ROWS, 8)), layout=LAYOUTS["canvas"], cache=view)
    assert found.logits.isfinite().all()
    assert graphs_and_breaks() == (0, 0)
