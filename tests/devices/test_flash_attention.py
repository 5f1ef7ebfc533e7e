"""FlashAttention against the reference, by stand-ins that take what the packages' kernels take."""

import math
import sys
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from pretend import pretending
from test_training_step import batch_of, network, spec_of
from torch.nn.attention import varlen

from textdiff.cli import main
from textdiff.config import Config
from textdiff.diffusion.corruption import count_documents
from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.errors import ConfigError
from textdiff.models import CAUSAL, FULL, Layout, flash
from textdiff.models.attention import attend, prepare
from textdiff.train.attention_backend import attention_backend, attention_notes
from textdiff.train.learned_loss import training_loss

CPU = torch.device("cpu")
IDS = torch.tensor([[0] * 5 + [1] + [2] * 6, [3] * 9 + [4] * 3, [5] * 12])
PADDED = torch.tensor([[-1, -1] + [0] * 3 + [1] * 7, [2] * 8 + [-1] * 4, [3] * 12])


def by_segments(q, k, v, offsets, longest, causal):
    """Attend [N, H, D] segment by segment, as both packages document it."""
    assert offsets.dtype == torch.int32
    ends = offsets.tolist()
    assert (ends[0], ends[-1]) == (0, len(q)) == (0, len(k))
    assert all(a <= b <= a + longest for a, b in pairwise(ends))
    assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
    assert (q.ndim, k.shape) == (3, v.shape)
    dtype, q, groups = q.dtype, q.double(), q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    outputs = []
    for a, b in pairwise(ends):
        one, two, three = (x[a:b].transpose(0, 1) for x in (q, k, v))
        scores = one @ two.mT / math.sqrt(q.shape[-1])
        if causal:
            future = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        outputs.append((scores.softmax(-1) @ three).transpose(0, 1))
    return torch.cat(outputs).to(dtype)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert (dropout_p, softmax_scale, q.ndim) == (0.0, None, 4)
    rows, length = q.shape[:2]
    offsets = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    return by_segments(*packed, offsets, length, causal).view(q.shape)


def flash_attn_varlen_func(  # noqa: PLR0913
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False,
):  # fmt: skip
    assert (dropout_p, softmax_scale, max_seqlen_q) == (0.0, None, max_seqlen_k)
    assert cu_seqlens_q is cu_seqlens_k
    return by_segments(q, k, v, cu_seqlens_q, max_seqlen_q, causal)


def varlen_attn(  # noqa: PLR0913
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
):  # fmt: skip
    assert (return_aux, scale, max_q, cu_seq_q) == (None, None, max_k, cu_seq_k)
    assert window_size in ((-1, -1), (-1, 0))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return by_segments(query, key, value, cu_seq_q, max_q, window_size == (-1, 0))


@pytest.fixture
def package(request, monkeypatch):
    """Put a stand-in in the place of `flash_attn`, or of torch's kernel where it is missing."""
    package = SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )
    here = getattr(request, "param", True)
    monkeypatch.setitem(sys.modules, "flash_attn", package if here else None)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    flash.installed.cache_clear()
    yield here
    flash.installed.cache_clear()


both = pytest.mark.parametrize("package", [True, False], indirect=True)


@both
@pytest.mark.parametrize("ids", [None, IDS, PADDED], ids=["whole", "documents", "padding"])
@pytest.mark.parametrize("layout", [FULL, CAUSAL], ids=["full", "causal"])
def test_flash_attention_is_the_reference(package, layout, ids):
    torch.manual_seed(0)
    layout = layout.within(ids, count_documents(ids))
    attention = prepare("flash_attention_2", layout, torch.empty(3, 12), dtype=torch.bfloat16)
    if ids is None and not package:  # torch's SDPA runs the same kernels
        assert attention.backend == "sdpa"
        return
    assert attention.backend == "flash_attention_2"
    leaves = [torch.randn(3, h, 12, 8).bfloat16().requires_grad_() for h in (4, 2, 2)]
    read = torch.ones(3, 1, 12, 1) if ids is None else (ids >= 0)[:, None, :, None]
    weight = torch.randn(3, 4, 12, 8).bfloat16() * read  # nobody reads padding
    found = attend(attention, *leaves)
    reference = prepare("eager", layout, torch.empty(3, 12))
    expected = attend(reference, *(x.double() for x in leaves)).bfloat16()
    torch.testing.assert_close(found * read, expected * read)
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (found, expected)),
                strict=True)  # fmt: skip
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_segments_have_few_numbers_and_nothing_waits_for_them():
    for ids, runs in ((IDS, 6), (PADDED, 6), (IDS[2:], 1)):
        assert count_documents(ids) == runs
    with pretending() as watch:
        layout = FULL.within(watch.put(IDS), 6)
        offsets = flash.segments(layout, 12).offsets
        assert (watch.waits, watch.uploads) == ([], [])
    assert offsets.held.tolist() == [0, 5, 6, 12, 21, 24, 36, 36, 36]
    everywhere = torch.arange(24).view(2, 12)  # documents of one token
    cut = flash.segments(FULL.within(everywhere, count_documents(everywhere)), 12)
    assert cut.offsets.tolist() == list(range(25))


@both
@pytest.mark.parametrize("name", ["mdlm", "ar"])
def test_a_training_step_is_that_of_the_reference(name, package, monkeypatch):
    family = build_family(spec_of(name), Vocabulary.of(45, 44, [43]))
    model = network(name).bfloat16()
    batch, calls = batch_of(family), []
    kernel = flash.flash_attention
    counted = lambda *inputs: calls.append(1) or kernel(*inputs)  # noqa: E731
    monkeypatch.setattr("textdiff.models.attention.flash_attention", counted)
    monkeypatch.setattr("textdiff.models.denoiser.unavailable", lambda *_: None)
    found = []
    for backend in ("eager", "flash_attention_2"):
        model.set_attn_implementation(backend)
        model.zero_grad()
        loss, _ = training_loss(model, family)(batch)
        loss.backward()
        found.append(
            [float(loss.detach()), *(p.grad.double().norm().item() for p in model.parameters())]
        )
    assert len(calls) == 2  # one for each block
    assert found[0] == pytest.approx(found[1], rel=0.03)


def test_what_the_kernels_cannot_compute_is_computed_by_sdpa(package):
    documents = FULL.within(IDS, 6)
    with torch.no_grad():
        blocks = prepare("flash_attention_2", Layout("block_causal", 4), torch.empty(3, 12))
    wide = prepare("flash_attention_2", documents, torch.empty(3, 12), dtype=torch.float32)
    unknown = FULL.within(IDS)  # whose ids may come back later in a row
    strewn = prepare("flash_attention_2", unknown, torch.empty(3, 12), dtype=torch.bfloat16)
    assert {x.backend for x in (blocks, wide, strewn)} == {"sdpa"}
    assert torch.equal(wide.mask, documents.mask(12, CPU))
    with pytest.raises(ValueError, match="cannot run the block_diffusion layout"):
        prepare("flash_attention_2", Layout("block_diffusion", 4), torch.empty(3, 24))


@both
@pytest.mark.parametrize("ids", [None, PADDED], ids=["whole", "padding"])
def test_a_causal_clean_stream_is_attended_by_itself(package, ids, monkeypatch):
    monkeypatch.setattr("textdiff.models.attention.unsupported", lambda device: None)
    layout = Layout("block_diffusion", 4, causal_context=True).within(ids, count_documents(ids))
    attention = prepare("flex_attention", layout, torch.empty(3, 24), dtype=torch.bfloat16)
    kernel = "sdpa" if ids is None and not package else "flash_attention_2"
    assert attention.clean.backend == kernel
    if ids is not None:  # masks that differ from batch to batch are made for one stream alone
        assert attention.mask is None
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 24, 8).bfloat16() for _ in range(3))
    reference = prepare("eager", layout, torch.empty(3, 24))
    expected = attend(reference, *(x.double() for x in (q, k, v))).bfloat16()
    read = torch.ones(3, 1, 24, 1) if ids is None else (ids >= 0).repeat(1, 2)[:, None, :, None]
    found = attend(attention, q, k, v)
    torch.testing.assert_close(found * read, expected * read, rtol=0.02, atol=0.02)
    alone = attend(attention, q[:, :, :12], k, v)
    assert torch.equal(alone * read[:, :, :12], found[:, :, :12] * read[:, :, :12])
    wider = prepare("flex_attention", Layout("block_diffusion", 4), torch.empty(3, 24))
    assert (wider.clean, wider.mask is None) == (None, False)


# --- the choice ----------------------------------------------------------------------------------

LAYOUTS = {
    "full": {},
    "causal": {"diffusion": {"objective": {"kind": "ar"}, "block_size": 1}},
    "documents": {"data": {"document_mask": True}},
    "blocks": {"diffusion": {"block_size": 16}},
    "both": {"diffusion": {"block_size": [16, None]}, "data": {"document_mask": True}},
}
BLOCKS = ("blocks", "both")
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "auto")


def chosen(backend: str, layout: str, precision: str, device: str, **model) -> str:
    """The backend of a run, or the code of its refusal."""
    changes = LAYOUTS[layout] | {"train": {"mixed_precision": precision}}
    model["attn_implementation"] = backend
    try:
        config = Config.model_validate({**changes, "model": model})
        return attention_backend(config, torch.device(device)).backend
    except (ValueError, ConfigError):
        return "refused"


@pytest.fixture
def new_gpu(monkeypatch):
    monkeypatch.setattr(flash, "capability", lambda device: (9, 0))
    monkeypatch.setattr("textdiff.models.attention.find_spec", lambda name: name)


@pytest.mark.usefixtures("new_gpu", "package")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_backend_layout_and_dtype_has_an_answer(device):
    for backend, layout, precision in product(BACKENDS, LAYOUTS, ("bf16", "fp32")):
        blocks, half = layout in BLOCKS, precision == "bf16"
        expected = backend
        if backend == "auto" and device == "cpu":
            expected = "sdpa"
        elif backend == "auto":
            best = "flash_attention_2" if half else "sdpa"
            expected = "flex_attention" if blocks else best
        elif backend == "flash_attention_2":
            expected = backend if device == "cuda" and half and not blocks else "refused"
        elif backend == "flex_attention":
            expected = backend if device == "cuda" else "refused"
        assert chosen(backend, layout, precision, device) == expected, (backend, layout, precision)


@pytest.mark.usefixtures("new_gpu")
def test_auto_never_fails_where_sdpa_runs(monkeypatch):
    odd = {"hidden_size": 48, "num_heads": 4}  # heads of 12 channels
    assert chosen("auto", "full", "bf16", "cuda", **odd) == "sdpa"
    assert chosen("flash_attention_2", "full", "bf16", "cuda", **odd) == "refused"
    assert chosen("auto", "blocks", "bf16", "cuda", **odd) == "sdpa"
    assert chosen("flex_attention", "blocks", "bf16", "cuda", **odd) == "refused"
    monkeypatch.setattr("textdiff.models.attention.find_spec", lambda name: None)  # no triton
    assert chosen("auto", "blocks", "bf16", "cuda") == "sdpa"
    assert chosen("flex_attention", "blocks", "bf16", "cuda") == "refused"
    monkeypatch.setattr(flash, "capability", lambda device: (7, 5))
    assert chosen("auto", "full", "bf16", "cuda") == "sdpa"
    assert chosen("flash_attention_2", "full", "bf16", "cuda") == "refused"
    assert chosen("auto", "full", "bf16", "mps") == "sdpa"


@pytest.mark.usefixtures("new_gpu")
@both
def test_the_choice_and_its_kernels_are_reported(package):
    def notes(backend, device):
        train, model = {"mixed_precision": "bf16"}, {"attn_implementation": backend}
        config = Config.model_validate({"train": train, "model": model})
        return list(attention_notes(config, torch.device(device)))

    assert notes("sdpa", "cuda") == []
    assert "sdpa, which serves every layout on cpu" in notes("auto", "cpu")[0]
    for backend in ("auto", "flash_attention_2"):
        (note,) = notes(backend, "cuda")
        assert "attention by flash_attention_2" in note
        assert ("the package flash_attn" in note and "not installed" not in note) == package


def test_a_backend_is_refused_before_the_corpus_is_read(tmp_path, capsys):
    for backend in ("flash_attention_2", "flex_attention"):
        (tmp_path / "c.yaml").write_text(
            f"model: {{attn_implementation: {backend}}}\n"
            f"data: {{sources: [{{source: {tmp_path}/missing.txt}}]}}\n"
        )
        assert main(["train", str(tmp_path / "c.yaml"), f"--run.dir={tmp_path / 'run'}"]) == 2
        assert f"model.attn_implementation: {backend}" in capsys.readouterr().err
