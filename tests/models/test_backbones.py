"""Networks of transformers as denoisers, against transformers' own attention."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from textdiff.models import CAUSAL, FULL, Layout
from textdiff.models.backbone import TransformersDenoiser
from textdiff.train.distributed import materialized, meta_copy

V, L, BLOCK = 40, 12, 4
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
SPECIAL_IDS = {"cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3}
OPTIONS = {
    "gpt2": {**GPT2, "initializer_range": 0.1},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": MOE,
    "glm4": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5},
    "mistral": {"sliding_window": 5},
    "modernbert": {**SPECIAL_IDS, "local_attention": 8},
    "eurobert": SPECIAL_IDS,
    "granite": {"attention_multiplier": 0.5, "logits_scaling": 3.0},
    "nanochat": {"head_dim": 8},
}
CAUSAL_KINDS = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "mistral",
    "olmo2",
    "phi3",
    "glm4",
    "nanochat",
    "gpt2",
    "gpt_neox",
    "granite",
    "gemma3_text",
]
FULL_KINDS = ["bert", "modernbert", "eurobert", "roberta", "distilbert"]
WINDOWS = {"gemma3_text": 5, "mistral": 5, "modernbert": 5}  # distances below it are seen


def configuration(kind: str, **options: object) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **{**SIZES, **OPTIONS.get(kind, {}), **options})


def build(kind: str, dtype: torch.dtype = torch.float32, **options: object) -> TransformersDenoiser:
    torch.manual_seed(0)
    config = configuration(kind, **options)
    if dtype == torch.float64:  # grouped products of experts have no float64
        config._experts_implementation = "eager"
    return TransformersDenoiser(config).to(dtype).eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(4, V, (2, L), generator=torch.Generator().manual_seed(seed))


def near(denoiser: TransformersDenoiser, at: Tensor, window: int) -> Tensor:
    distance = at[:, None] - at[None, :]
    both = not denoiser.network.get_submodule(denoiser_attention(denoiser)).is_causal
    return (distance.abs() if both else distance) < window


def denoiser_attention(denoiser: TransformersDenoiser) -> str:
    named = denoiser.network.named_modules()
    return next(name for name, m in named if hasattr(m, "textdiff_layer"))


@torch.no_grad()
def reference(denoiser: TransformersDenoiser, ids: Tensor, layout: Layout, kind: str) -> Tensor:
    """Return logits of transformers' own attention under an explicit 4-D mask.

    In float64 it is `sdpa`, because `eager` takes its softmax in float32.
    """
    network = copy.deepcopy(denoiser.network)
    dtype = next(network.parameters()).dtype
    network.set_attn_implementation("eager" if dtype == torch.float32 else "sdpa")
    total = ids.shape[1]
    at = torch.arange(total // layout.streams).repeat(layout.streams)
    allowed = layout.mask(total, ids.device)
    allowed = torch.ones(total, total, dtype=torch.bool) if allowed is None else allowed

    def additive(mask: Tensor) -> Tensor:
        zero = torch.zeros(mask.shape, dtype=dtype)
        return zero.masked_fill(~mask, torch.finfo(dtype).min)[None, None].expand(
            len(ids), 1, -1, -1
        )

    masks = additive(allowed)
    if kind in WINDOWS:
        local = additive(allowed & near(denoiser, at, WINDOWS[kind]))
        masks = (
            local if kind == "mistral" else {"full_attention": masks, "sliding_attention": local}
        )
    first = 1 if kind == "roberta" else 0
    positions = {} if kind == "distilbert" else {"position_ids": at[None] + first}
    if kind == "distilbert":
        embeddings = network.distilbert.embeddings
        embeddings.position_ids = at[None]
    return network(ids, attention_mask=masks, use_cache=False, **positions).logits


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", CAUSAL_KINDS + FULL_KINDS)
@torch.no_grad()
def test_architecture_is_exact_under_every_layout(kind: str, dtype: torch.dtype) -> None:
    limit = 1e-6 if dtype == torch.float32 else 1e-12
    denoiser = build(kind, dtype)
    xt, x0 = tokens(1), tokens(2)
    own = CAUSAL if kind in CAUSAL_KINDS else FULL
    assert difference(denoiser(xt, layout=own).logits, reference(denoiser, xt, own, kind)) < limit
    layout = Layout("block_diffusion", BLOCK)
    two = denoiser(xt, x0, layout=layout).logits
    dense = reference(denoiser, torch.cat([xt, x0], 1), layout, kind)[:, :L]
    assert difference(two, dense) < limit
    blocks, cached = [], []
    causal, cache = Layout("block_causal", BLOCK), denoiser.new_cache(2, L)
    for start in range(0, L, BLOCK):
        here = slice(start, start + BLOCK)
        before = torch.cat([x0[:, :start], xt[:, here]], dim=1)
        blocks.append(denoiser(before, layout=causal).logits[:, start:])
        place = cache.exact_slice(causal, torch.full((2,), start), BLOCK, None, None)
        cached.append(denoiser(xt[:, here], layout=causal, cache=place).logits)
        denoiser(x0[:, here], layout=causal, cache=place)  # the finished block replaces the noisy
    assert difference(torch.cat(blocks, 1), two) < limit
    assert difference(torch.cat(cached, 1), two) < limit


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
@torch.no_grad()
def test_clean_stream_from_left_to_right_is_exact(kind: str) -> None:
    denoiser = build(kind, torch.float64)
    xt, x0 = tokens(1), tokens(2)
    layout = Layout("block_diffusion", BLOCK, causal_context=True)
    every = torch.arange(2 * L)
    states, _ = denoiser.hidden(xt, x0, None, layout, every, context_positions=every)
    found = denoiser.output_layer(states).unflatten(0, (2, 2, L))
    dense = reference(denoiser, torch.cat([xt, x0], 1), layout, kind).unflatten(1, (2, L))
    assert difference(found.transpose(0, 1), dense) < 1e-12
    assert difference(found[1], denoiser(x0, layout=CAUSAL).logits) < 1e-12


@torch.no_grad()
def test_documents_do_not_see_each_other() -> None:
    denoiser = build("qwen3", torch.float64)
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    xt, changed = tokens(1), tokens(1)
    changed[0, :5] = tokens(3)[0, :5]
    one = denoiser(xt, layout=FULL.within(ids)).logits
    other = denoiser(changed, layout=FULL.within(ids)).logits
    assert torch.equal(one[0, 5:], other[0, 5:])
    assert not torch.allclose(one[0, :5], other[0, :5])


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("gemma2", {"head_dim": 8}, "caps its attention scores"),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 2}, "attention sinks"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "1 of its 2 layers"),
        ("albert", {"embedding_size": 16}, "several times"),
        ("bloom", {}, "mixed in another way"),
        ("stablelm", {}, "received no layout"),
        ("falcon", {}, "no other attention"),
    ],
)
def test_inexact_network_is_refused_with_its_reason(
    kind: str, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        build(kind, **options)


def test_leak_outside_attention_is_measured() -> None:
    config = configuration("llama")
    network = AutoModelForCausalLM.from_config(config, attn_implementation="textdiff")
    mlp = network.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + x.roll(1, dims=1)
    with pytest.raises(ValueError, match="outside attention"):
        TransformersDenoiser(config, network)


def test_difference_that_no_argument_shows_is_measured() -> None:
    config = configuration("llama")
    network = AutoModelForCausalLM.from_config(config, attn_implementation="textdiff")
    attention = network.model.layers[0].self_attn
    plain = attention.forward

    def only_with_ours(*args: object, **options: object) -> object:
        out, weights = plain(*args, **options)
        return (2.0 * out if "textdiff" in options else out), weights

    attention.forward = only_with_ours
    with pytest.raises(ValueError, match="does not reproduce"):
        TransformersDenoiser(config, network)


def test_gradients_of_checkpointed_blocks_are_those_of_plain_ones() -> None:
    denoiser = build("qwen3", torch.float64).train()
    xt, x0 = tokens(1), tokens(2)
    positions = torch.tensor([0, 3, 7, 15, 20])

    def gradients() -> dict[str, Tensor]:
        denoiser.zero_grad()
        hidden, _ = denoiser.hidden(xt, x0, None, Layout("block_diffusion", BLOCK), positions)
        denoiser.output_layer(hidden).square().sum().backward()
        return {name: p.grad.clone() for name, p in denoiser.named_parameters()}

    plain = gradients()
    denoiser.gradient_checkpointing_enable()
    again = gradients()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_head_alone_gives_the_logits_of_its_own_forward_pass() -> None:
    for kind in ("granite", "bert", "modernbert"):  # scaled logits, and heads of several layers
        denoiser = build(kind)
        xt = tokens(1)
        positions = torch.tensor([2, 13])
        chosen = denoiser(xt, positions=positions).logits
        assert torch.allclose(chosen, denoiser(xt).logits.flatten(0, 1)[positions], atol=1e-6)


def test_copies_without_storage_attend_by_the_same_backend() -> None:
    config = configuration("qwen3")
    config._attn_implementation = "eager"
    denoiser = TransformersDenoiser(config).eval()
    copied = meta_copy(denoiser)
    assert (denoiser.attn_implementation, copied.attn_implementation) == ("eager", "eager")
    with torch.no_grad(), materialized(copied, dict(denoiser.named_parameters())):
        assert torch.equal(copied(tokens()).logits, denoiser(tokens()).logits)


def test_parameters_have_one_name_each() -> None:
    denoiser = build("qwen3", tie_word_embeddings=True)
    names = [name for name, _ in denoiser.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names))
    assert all(name.startswith("network.") for name in names)
    copied = copy.deepcopy(denoiser)
    assert copied.blocks is copied.network.model.layers
    assert copied.output_layer.shell.lm_head is copied.network.lm_head
