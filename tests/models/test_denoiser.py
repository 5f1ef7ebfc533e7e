"""The denoiser: its parameter table, layouts, and its life as a Hugging Face model."""

import pytest
import torch
from children import finished
from transformers import AutoConfig, AutoModelForMaskedLM

from textdiff.models import Layout, TextDiffusionConfig, TextDiffusionModel


def tiny(**options) -> TextDiffusionModel:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 11,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "mask_token_id": 10,
    }
    model = TextDiffusionModel(TextDiffusionConfig(**(settings | options))).double().eval()
    with torch.no_grad():  # branches start as zero; tests need them alive
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def published_table(vocab: int, hidden: int, layers: int, condition: int) -> dict[str, tuple]:
    """The shapes of the published SEDD, MDLM and BD3-LM checkpoints."""
    table = {
        "vocab_embed.embedding": (vocab, hidden),
        "sigma_map.mlp.0.weight": (condition, 256),
        "sigma_map.mlp.0.bias": (condition,),
        "sigma_map.mlp.2.weight": (condition, condition),
        "sigma_map.mlp.2.bias": (condition,),
        "output_layer.norm_final.weight": (hidden,),
        "output_layer.linear.weight": (vocab, hidden),
        "output_layer.linear.bias": (vocab,),
        "output_layer.adaLN_modulation.weight": (2 * hidden, condition),
        "output_layer.adaLN_modulation.bias": (2 * hidden,),
    }
    for i in range(layers):
        table |= {
            f"blocks.{i}.norm1.weight": (hidden,),
            f"blocks.{i}.norm2.weight": (hidden,),
            f"blocks.{i}.attn_qkv.weight": (3 * hidden, hidden),
            f"blocks.{i}.attn_out.weight": (hidden, hidden),
            f"blocks.{i}.mlp.0.weight": (4 * hidden, hidden),
            f"blocks.{i}.mlp.0.bias": (4 * hidden,),
            f"blocks.{i}.mlp.2.weight": (hidden, 4 * hidden),
            f"blocks.{i}.mlp.2.bias": (hidden,),
            f"blocks.{i}.adaLN_modulation.weight": (6 * hidden, condition),
            f"blocks.{i}.adaLN_modulation.bias": (6 * hidden,),
        }
    return table


def test_parameter_table_is_that_of_published_checkpoints():
    with torch.device("meta"):
        config = TextDiffusionConfig(
            vocab_size=50258,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            adaln=True,
        )
        model = TextDiffusionModel(config)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert state == published_table(50258, 768, 12, 128)


def test_ar_baseline_has_no_noise_parameters():
    names = set(tiny().state_dict())
    assert not any("sigma_map" in name or "adaLN" in name for name in names)


def reference(model: TextDiffusionModel, ids: torch.Tensor, sigma: float) -> torch.Tensor:
    """The published forward pass, written out from its description, one head at a time."""
    p = dict(model.named_parameters())
    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = hidden // heads

    def norm(x, weight):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def rotate(x):
        half = size // 2
        angle = torch.arange(len(x)).double()[:, None] * 10000.0 ** (
            -torch.arange(half).double() / half
        )
        a, b = x[:, :half], x[:, half:]
        return torch.cat(
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1
        )

    frequency = 10000.0 ** (-torch.arange(128).double() / 128)
    waves = torch.cat([(sigma * frequency).cos(), (sigma * frequency).sin()])
    c = torch.nn.functional.silu(p["sigma_map.mlp.0.weight"] @ waves + p["sigma_map.mlp.0.bias"])
    c = torch.nn.functional.silu(p["sigma_map.mlp.2.weight"] @ c + p["sigma_map.mlp.2.bias"])
    x = p["vocab_embed.embedding"][ids]
    for i in range(config.num_hidden_layers):
        b = {
            k.removeprefix(f"blocks.{i}."): v for k, v in p.items() if k.startswith(f"blocks.{i}.")
        }
        m = (b["adaLN_modulation.weight"] @ c + b["adaLN_modulation.bias"]).chunk(6)
        h = norm(x, b["norm1.weight"]) * (1 + m[1]) + m[0]
        q, k, v = (h @ b["attn_qkv.weight"].T).view(len(ids), 3, heads, size).unbind(1)
        mixed = []
        for head in range(heads):
            scores = rotate(q[:, head]) @ rotate(k[:, head]).T / size**0.5
            mixed.append(scores.softmax(-1) @ v[:, head])
        x = x + m[2] * (torch.cat(mixed, dim=1) @ b["attn_out.weight"].T)
        h = norm(x, b["norm2.weight"]) * (1 + m[4]) + m[3]
        h = torch.nn.functional.gelu(h @ b["mlp.0.weight"].T + b["mlp.0.bias"], approximate="tanh")
        x = x + m[5] * (h @ b["mlp.2.weight"].T + b["mlp.2.bias"])
    shift, scale = (
        p["output_layer.adaLN_modulation.weight"] @ c + p["output_layer.adaLN_modulation.bias"]
    ).chunk(2)
    x = norm(x, p["output_layer.norm_final.weight"]) * (1 + scale) + shift
    return x @ p["output_layer.linear.weight"].T + p["output_layer.linear.bias"]


@pytest.mark.parametrize("sigma", [0.0, 1.3])
def test_forward_is_the_published_one(sigma):
    model = tiny(adaln=True, time_conditioning=True)
    ids = torch.randint(0, 11, (2, 7))
    logits = model(ids, sigma=torch.full((2,), sigma, dtype=torch.float64)).logits
    for row in range(2):
        torch.testing.assert_close(
            logits[row], reference(model, ids[row], sigma), rtol=0, atol=1e-10
        )


def test_without_time_conditioning_sigma_is_ignored_and_zero():
    model = tiny(adaln=True, time_conditioning=False)
    ids = torch.randint(0, 11, (2, 7))
    with_noise = model(ids, sigma=torch.tensor([0.5, 2.0])).logits
    assert torch.equal(with_noise, model(ids).logits)
    torch.testing.assert_close(with_noise[0], reference(model, ids[0], 0.0), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True},
        {"adaln": True, "time_conditioning": True},
    ],
)
def test_head_at_positions_equals_head_everywhere(options):
    model = tiny(**options)
    ids = torch.randint(0, 11, (3, 8))
    sigma = torch.tensor([0.1, 0.7, 3.0])
    everywhere = model(ids, sigma=sigma).logits
    positions = torch.tensor([0, 5, 9, 23])
    selected = model(ids, sigma=sigma, positions=positions).logits
    torch.testing.assert_close(selected, everywhere.flatten(0, 1)[positions], rtol=0, atol=1e-12)


def changed_by(model, ids, at, layout, context=None, in_context=False) -> torch.Tensor:
    """Which positions' logits change when one token changes."""
    other_ids, other_context = ids.clone(), None if context is None else context.clone()
    target = other_context if in_context else other_ids
    target[0, at] = (target[0, at] + 1) % 10
    before = model(ids, context, layout=layout).logits
    after = model(other_ids, other_context, layout=layout).logits
    return (before - after).abs().amax(-1)[0] > 1e-12


def test_causal_layout_sees_no_future():
    ids = torch.randint(0, 10, (1, 8))
    changed = changed_by(tiny(), ids, 3, Layout("causal"))
    assert changed.tolist() == [False] * 3 + [True] * 5


def test_block_causal_layout_sees_its_block_and_earlier_ones():
    ids = torch.randint(0, 10, (1, 8))
    changed = changed_by(tiny(), ids, 5, Layout("block_causal", 4))
    assert changed.tolist() == [False] * 4 + [True] * 4


def test_block_diffusion_layout_streams():
    model, layout = tiny(), Layout("block_diffusion", 4)
    ids, context = torch.randint(0, 10, (2, 1, 12)).unbind(0)
    noisy = changed_by(model, ids, 5, layout, context)
    assert noisy.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    clean = changed_by(model, ids, 5, layout, context, in_context=True)
    assert clean.tolist() == [False] * 8 + [True] * 4


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
def test_block_diffusion_equals_one_pass_per_block_with_a_clean_prefix(causal, backend):
    model = tiny(adaln=True, time_conditioning=True)
    model.set_attn_implementation(backend)
    noisy, clean = torch.randint(0, 10, (2, 1, 12)).unbind(0)
    sigma = torch.tensor([[0.3, 1.0, 2.0]])
    two_streams = Layout("block_diffusion", 4, causal_context=causal)
    together = model(noisy, clean, sigma=sigma, layout=two_streams).logits
    for block in range(3):
        end = 4 * (block + 1)
        levels = torch.zeros(1, block + 1)
        levels[0, block] = sigma[0, block]
        alone = model(
            torch.cat([clean[:, : end - 4], noisy[:, end - 4 : end]], dim=1),
            sigma=levels,
            layout=Layout("block_causal", 4, None, causal).after(torch.tensor([end - 4])),
        ).logits
        torch.testing.assert_close(
            together[:, end - 4 : end], alone[:, end - 4 :], rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["full", "causal", "block_causal", "block_diffusion"])
def test_documents_do_not_see_each_other(backend, kind):
    model = tiny()
    model.set_attn_implementation(backend)
    layout = Layout(kind, 4 if kind.startswith("block") else None)
    layout = layout.within(torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1]]))
    ids = torch.randint(0, 10, (1, 12))
    context = torch.randint(0, 10, (1, 12)) if kind == "block_diffusion" else None
    for in_context in [False, True] if context is not None else [False]:
        changed = changed_by(model, ids, 2, layout, context, in_context)
        assert not changed[5:].any()
        changed = changed_by(model, ids, 11, layout, context, in_context)
        assert not changed[:10].any()


def test_attention_mask_is_padding():
    model = tiny()
    ids = torch.randint(0, 10, (2, 6))
    padded = torch.cat([ids, torch.full((2, 3), 7)], dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 3] * 2)
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, :6], model(ids).logits, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
def test_hidden_states_of_the_clean_stream_are_those_of_clean_tokens_alone(causal, backend):
    model = tiny(adaln=True, time_conditioning=True)
    model.set_attn_implementation(backend)
    noisy, clean = torch.randint(0, 10, (2, 2, 12)).unbind(0)
    sigma, at = torch.rand(2, 3).double(), torch.tensor([3, 4, 17])
    two_streams = Layout("block_diffusion", 4, causal_context=causal)
    hidden, condition = model.hidden(
        noisy, clean, sigma, two_streams, at, context_positions=torch.arange(24)
    )
    found = model.output_layer(hidden, condition)
    own = model(noisy, clean, sigma, two_streams, at).logits
    torch.testing.assert_close(found[:3], own, rtol=0, atol=1e-12)
    layout = Layout("causal") if causal else Layout("block_causal", 4)
    alone = model(clean, sigma=0 * sigma[:, :1], layout=layout).logits.flatten(0, 1)
    torch.testing.assert_close(found[3:], alone, rtol=0, atol=1e-12)


def test_streams_must_match_the_layout():
    ids = torch.randint(0, 10, (1, 4))
    with pytest.raises(ValueError, match="stream"):
        tiny()(ids, ids)
    with pytest.raises(ValueError, match="stream"):
        tiny()(ids, layout=Layout("block_diffusion", 2))


def test_gradient_checkpointing_changes_no_gradient():
    ids = torch.randint(0, 10, (2, 8))
    gradients = []
    for checkpointed in (False, True):
        model = tiny(dropout=0.0).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(ids).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"adaln": True, "norm": "rmsnorm", "qk_norm": True}])
def test_save_and_load_round_trip(tmp_path, options):
    model = tiny(**options)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 10, (2, 8))
    for kind in (TextDiffusionModel, AutoModelForMaskedLM):
        loaded = kind.from_pretrained(tmp_path, dtype=torch.float64)
        assert isinstance(loaded, TextDiffusionModel)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        # Kernels may round otherwise where weights lie at other addresses.
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)
    config = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert config | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}


def test_checkpoint_carries_its_code(tmp_path):
    """`trust_remote_code` works where textdiff is not installed, and refuses older versions."""
    import sys

    model = tiny()
    model.save_pretrained(tmp_path)
    program = (
        "import sys; sys.modules['textdiff'] = None\n"
        "import torch, transformers\n"
        "from transformers import AutoModelForMaskedLM\n"
        "def load():\n"
        "    place = sys.argv[1]\n"
        "    return AutoModelForMaskedLM.from_pretrained(place, trust_remote_code=True)\n"
        "installed, transformers.__version__ = transformers.__version__, '4.57.1'\n"
        "try:\n"
        "    load()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "transformers.__version__ = installed\n"
        "print(load()(torch.tensor([[1, 2, 3]])).logits.shape)\n"
    )
    done = finished(
        [sys.executable, "-c", program, tmp_path],
        env={"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"},
    )
    refused, shape = done.stdout.splitlines()[-2:]
    assert refused.startswith("this textdiff model needs transformers 5.10 or newer")
    assert "and 4.57.1 is installed" in refused
    assert shape == "torch.Size([1, 3, 11])", done.stderr[-2000:]


def test_flex_attention_agrees_and_refuses_to_train_on_a_cpu():
    model = tiny().float()
    ids = torch.randint(0, 10, (1, 12))
    layout = Layout("block_causal", 4)
    with torch.no_grad():
        expected = model(ids, layout=layout).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(ids, layout=layout).logits, expected, rtol=0, atol=1e-5)
        for layout, context in (
            (Layout("block_causal", 4, None, True).after(torch.tensor([8])), None),
            (Layout("block_diffusion", 4, causal_context=True), ids),
        ):
            model.set_attn_implementation("eager")
            expected = model(ids, context, layout=layout).logits
            model.set_attn_implementation("flex_attention")
            found = model(ids, context, layout=layout).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cannot train on a CPU"):
        model(ids)


def test_flash_attention_is_refused_with_a_reason():
    model = tiny()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="CUDA"):
        model(torch.randint(0, 10, (1, 4)))


@pytest.mark.parametrize("options", [{}, {"adaln": True}, {"mlp": "swiglu"}])
def test_every_matrix_learns(options):
    torch.manual_seed(0)
    model = TextDiffusionModel(TextDiffusionConfig(vocab_size=9, hidden_size=16, **options))
    ids = torch.arange(8)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(4):
        torch.nn.functional.cross_entropy(model(ids).logits[0], torch.arange(8) % 3).backward()
        optimizer.step()
    dead = [n for n, p in model.named_parameters() if p.ndim == 2 and not p.grad.any()]
    assert dead == []


def test_adaln_starts_as_the_network_without_it():
    """Scales and shifts at zero, gates at one: nothing is modulated until training says so."""
    torch.manual_seed(0)
    model = TextDiffusionModel(TextDiffusionConfig(vocab_size=9, hidden_size=16, adaln=True))
    plain = TextDiffusionModel(TextDiffusionConfig(vocab_size=9, hidden_size=16))
    missing, extra = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    assert all("adaLN" in name or "sigma_map" in name for name in extra)
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not torch.equal(model.hidden(ids)[0], model.vocab_embed(ids))


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"adaln": True}, {"adaln": True, "time_conditioning": True}], ids=str
)
def test_a_last_block_at_some_positions_is_the_whole_one_read_there(options, checkpointed, streams):
    """Values and all gradients; what is not asked for gets none."""
    model = tiny(dropout=0.0, **options).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    ids, context = torch.randint(0, 10, (2, 3, 12)).unbind(0)
    layout = Layout("block_diffusion", 4) if streams == 2 else Layout()
    levels = torch.rand(3, 3 if streams == 2 else 1)
    wanted = torch.tensor([0, 5, 13, 14, 35])
    results = []
    for positions in (wanted, None):
        logits = model(
            ids, context if streams == 2 else None, levels, layout, positions=positions
        ).logits
        logits = logits if positions is not None else logits.flatten(0, 1)[wanted]
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *gradients])
    for found, whole in zip(*results, strict=True):
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "rmsnorm", "qk_norm": True},
        {"adaln": True},
        {"adaln": True, "time_conditioning": True},
        {"num_hidden_layers": 1},
    ],
    ids=str,
)
def test_projecting_unique_tokens_once_changes_nothing(options, checkpointed, streams, monkeypatch):
    """Values and all gradients, also where the noise level tells equal tokens apart."""
    model = tiny(dropout=0.0, **options).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    ids, context = torch.randint(0, 7, (2, 3, 12)).unbind(0)
    layout = Layout("block_diffusion", 4) if streams == 2 else Layout()
    levels = torch.rand(3, 3 if streams == 2 else 1)
    projected, results = [], []
    model.blocks[0].attn_qkv.register_forward_pre_hook(lambda _, x: projected.append(x[0].shape[1]))
    monkeypatch.setattr("textdiff.models.block.UNIQUE_SHARE", 1.0)
    for least in (10**9, 1):
        monkeypatch.setattr("textdiff.models.block.UNIQUE_FROM", least)
        logits = model(ids, context if streams == 2 else None, levels, layout).logits
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *gradients])
    for found, whole in zip(*results, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-10)
    shared = not ({"time_conditioning", "num_hidden_layers"} & options.keys())
    assert (projected[-1] == 7) == shared
