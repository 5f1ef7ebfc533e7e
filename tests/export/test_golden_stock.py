"""Published families on stock networks: what official codes compute from the same small weights.

Ids that are never predicted here are predicted there: raw logits are compared on all rows, loss
terms and confidences under the official distribution, which gives them probability.
"""

import json

import pytest
import torch
from golden_stock import (
    IN_BLOCKS,
    OPTIONS,
    RATES,
    RAW,
    StockGolden,
    documents,
    raw_logits,
    read_golden,
)
from torch import Tensor

from textdiff.cli import main
from textdiff.diffusion.objectives import Prediction
from textdiff.models import CacheSlice, left_neighbours
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.context import Context
from textdiff.sampling.controls import Controls
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.positions import Positions
from textdiff.sampling.request import Request
from textdiff.sampling.rules.ordered import ORDERS, Confidence, Threshold
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.rules.unmasking import unmask_in_order
from textdiff.sampling.segment import Segment
from textdiff.sampling.settings import SamplingConfig

COLD = Controls(SamplingConfig(temperature=0.0))


@pytest.fixture
def load(golden_folder):
    """Loader of a golden folder by name."""
    return lambda name: read_golden(golden_folder / name, OPTIONS.get(name, ""))


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in RAW for key in RAW[name]])
def test_raw_logits(load, name, key):
    golden: StockGolden = load(name)
    assert golden.error(key, raw_logits(golden, *RAW[name][key])) < 1.0


@pytest.mark.parametrize("name", ["llada", "a2d-qwen3"])
def test_padding_is_hidden(load, name):
    golden = load(name)
    seen = golden["padded/attention_mask"].bool()
    logits = golden.logits(golden["x_t"], layout=documents(seen))
    assert golden.error("padded/raw_logits", logits, seen) < 1.0


def test_dream_counts_positions_from_the_first_token_that_is_not_padding(load):
    golden = load("dream")
    seen = golden["padded/attention_mask"].bool()
    logits = torch.zeros_like(golden["padded/raw_logits"])
    for row, (ids, real) in enumerate(zip(golden["x_t"], seen, strict=True)):
        logits[row, real] = golden.logits(ids[real][None])[0]
    assert golden.error("padded/raw_logits", logits, seen) < 1.0


@pytest.mark.parametrize(("name", "count"), [("dream", 16), ("diffugpt", 15)])
def test_outputs_are_about_the_next_token(load, name, count):
    """The first token is predicted at itself, which DiffuGPT leaves out."""
    golden = load(name)
    xt = golden["x_t"]
    positions = torch.arange(xt.numel()).view(xt.shape)[:, -count:].flatten()
    at = left_neighbours(positions, xt.shape[1])
    logits = golden.logits(xt).flatten(0, 1)[at].view(len(xt), count, -1)
    assert golden.error("prediction_logits", logits) < 1.0
    assert golden.family.objective.shift


def test_grouped_heads_of_llada(golden_folder, tmp_path):
    folder = golden_folder / "llada"
    config = json.loads((folder / "config.json").read_text()) | {"n_kv_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "gqa.safetensors")
    (tmp_path / "cases.json").symlink_to(folder / "cases.json")
    (tmp_path / "cases.safetensors").symlink_to(folder / "cases.safetensors")
    golden = read_golden(tmp_path)
    assert golden.error("gqa/raw_logits", golden.logits(golden["x_t"])) < 1.0


# --- losses ---


def test_loss_terms_of_llada(load):
    golden = load("llada")
    terms = golden.terms(golden["x_t"], golden["x0"], 1.0 / golden["p_mask"])
    assert torch.allclose(golden["p_mask"], RATES["llada"](golden["t"]))
    assert golden.error("nelbo", terms) < 1.0
    assert golden.error("loss", terms.mean()) < 1.0


def test_likelihood_estimate_of_llada_by_counts(load):
    golden = load("llada")
    prompt, answer = golden["likelihood/prompt"], golden["likelihood/answer"]
    text = torch.cat([prompt, answer]).expand(8, -1)
    masked = golden["likelihood/perturbed"]
    terms = golden.terms(masked, text, 1.0 / golden["likelihood/p_mask"])
    assert golden.error("likelihood/value", -terms.sum(1).mean()) < 1.0


@pytest.mark.parametrize(("kind", "size"), [("mdlm", None), ("bd3lm", 4)])
def test_loss_terms_of_a2d(load, kind, size):
    golden = load("a2d-qwen3")
    terms = golden.terms(golden["x_t"], golden["x0"], 1.0 / (golden["t"] + 1e-6), size)
    assert golden.error(f"{kind}/nelbo", terms) < 1.0
    assert golden.error(f"{kind}/loss", terms.mean()) < 1.0


def test_loss_terms_of_sdar(load):
    golden = load("sdar")
    terms = golden.terms(golden["x_t"], golden["x0"], 1.0 / RATES["llada"](golden["t"]), 4)
    assert golden.family.block_size == 4
    assert golden.error("nelbo", terms) < 1.0
    assert golden.error("loss", terms.mean()) < 1.0


def test_loss_terms_of_dream(load):
    golden = load("dream")
    x0, xt, ones = golden["x0"], golden["x_t"], torch.ones(3)
    terms = golden.terms(xt, x0, 1.0 / (golden["t"] + 1e-6))
    assert golden.error("nelbo", terms) < 1.0
    assert golden.error("loss_cart", golden.terms(xt, x0, ones) * golden["cart_weight"]) < 1.0


@pytest.mark.parametrize("name", ["diffugpt", "diffullama"])
def test_loss_terms_of_diffugpt(load, name):
    golden = load(name)
    xt = golden["x_t"]
    terms = golden.terms(xt, golden["x0"], 1.0 / golden["t"])[:, 1:]
    assert golden.error("nelbo", terms) < 1.0
    if name == "diffugpt":
        masked = (xt == golden.family.process.mask_token_id).sum()
        assert golden.error("loss", terms.sum() / masked) < 1.0


def test_cross_entropy_of_tiny_diffusion(load):
    golden = load("tiny-diffusion")
    xt, steps = golden["x_t"], golden["t"]
    terms = golden.terms(xt, golden["x0"], torch.ones(3), time=steps)
    assert golden.error("cross_entropy", terms) < 1.0
    assert golden.error("loss", terms.sum() / (xt == 0).sum()) < 1.0
    rates = golden["mask_probs"].double()
    assert golden.family.timesteps == len(rates) == 16
    assert torch.equal(golden.family.network_time(1.0 - rates), torch.arange(16.0))


# --- generation ---


def official(golden: StockGolden, **options) -> object:
    """Return a predictor on whole canvases of the distribution that official samplers read.

    In float64, where the rules take scores that are 4e-5 apart as different.
    """

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        logits = golden.logits(canvas, **options).flatten(0, 1).double()
        shift = golden.family.objective.shift
        at = left_neighbours(positions.flat, canvas.shape[1]) if shift else positions.flat
        return Prediction(logits[at].log_softmax(-1))

    return denoise


def fill(
    golden: StockGolden, rule: Rule, canvas: Tensor, open_: Tensor, steps: int, denoise
) -> list:
    """Return the canvases after every call of a rule that fills the open places, greedily."""
    u = torch.full(canvas.shape, 0.5, dtype=torch.float64)
    family = golden.family
    return [
        step.canvas
        for step in rule(
            Segment(
                denoise, family.process, family.schedule, canvas, ~open_, steps, lambda *_: u, COLD
            )
        )
    ]


def spans(shape: tuple[int, ...], starts: list[int], length: int) -> Tensor:
    """Return [B, L] bool, `length` places of each row from its start on."""
    at = torch.arange(shape[1]) - torch.tensor(starts)[:, None]
    return (at >= 0) & (at < length)


def counted(count) -> Rule:
    """Return the confidence rule with a number of tokens per call of its own."""

    class Counted(Confidence):
        def __call__(self, segment):
            yield from unmask_in_order(segment, ORDERS[self.order], count)

    return Counted


def test_llada_generates_token_for_token(load):
    """By the engine, with our vocabulary: nothing else is as likely here."""
    golden = load("llada")
    prompt = golden["generate/one_block/prompt"]
    config = SamplingConfig(rule="confidence", steps=4, temperature=0.0)
    engine = Engine(golden.model, golden.family, Request(Job(prompt.tolist(), [8, 8]), config))
    texts = [step.canvas for step in engine.run()]
    assert torch.equal(torch.stack(texts[:-1]), golden["generate/one_block/states"][1:])
    assert golden.error("generate/one_block/final", texts[-1]) == 0.0


def test_llada_generates_block_after_block_on_whole_canvases(load):
    golden = load("llada")
    texts = [golden["generate/two_blocks/states"][0]]
    for start in (6, 10):
        open_ = spans(texts[0].shape, [start, start], 4)
        texts += fill(golden, Confidence(), texts[-1], open_, 3, official(golden))
    assert torch.equal(torch.stack(texts[:-1]), golden["generate/two_blocks/states"])
    assert golden.error("generate/two_blocks/final", texts[-1]) == 0.0


@pytest.mark.parametrize(
    ("rule", "order"),
    [("maskgit_plus", "probability"), ("entropy", "entropy"), ("topk_margin", "margin")],
)
def test_dream_generates_token_for_token(load, rule, order):
    """Orders and tokens are our rules', the number of tokens per call is Dream's."""
    golden = load("dream")
    times = golden["generate/timesteps"]

    def count(left: Tensor, calls: int) -> Tensor:
        return (left * (1.0 - times[5 - calls] / times[4 - calls])).long()

    states = golden[f"generate/{rule}/states"]
    texts, open_ = [states[0]], states[0] == golden.family.process.mask_token_id
    texts += fill(golden, counted(count)(order=order), texts[0], open_, 4, official(golden))
    assert golden.error(f"generate/{rule}/states", torch.stack(texts)) == 0.0
    first = golden.logits(states[0]).roll(1, dims=1)
    first[:, 0] = golden.logits(states[0])[:, 0]
    assert golden.error("generate/first_logits", first) < 1.0


def test_dream_reveals_by_the_posterior(load):
    """Its `origin` rule is ancestral sampling, but for the last step."""
    golden = load("dream")
    process, times = golden.family.process, golden["generate/timesteps"].double()
    mask = torch.full((4,), process.mask_token_id)
    x0 = torch.full((4, 40), -torch.inf)
    x0[:, 3] = 0.0
    stays = process.posterior(x0, mask, 1.0 - times[1:], 1.0 - times[:-1])[:, mask[0]]
    stays[-1] = 0.0
    assert golden.error("generate/origin_reveal", 1.0 - stays) < 1.0


def test_a2d_generates_on_whole_canvases_token_for_token(load):
    golden = load("a2d-qwen3")
    states = golden["generate/mdlm/states"]
    seen = torch.ones_like(states[0])
    seen[0, 13:] = 0  # the shorter text's padding
    hidden = {"layout": documents(seen)}
    first = golden.logits(states[0], **hidden)
    assert golden.error("generate/mdlm/first_logits", first, seen.bool()) < 1.0
    rule, texts = counted(lambda left, calls: left // calls)(), [states[0]]
    for block in (0, 4):
        open_ = spans(texts[0].shape, [5 + block, 7 + block], 4)
        texts += fill(golden, rule, texts[-1], open_, 3, official(golden, **hidden))
    assert golden.error("generate/mdlm/states", torch.stack(texts)) == 0.0


def test_a2d_generates_blocks_from_the_cache(load):
    """Blocks are counted from the padded start, positions from the first token."""
    golden = load("a2d-qwen3")
    states, wanted = golden["generate/bd3lm/states"], golden["generate/bd3lm/block_logits"]
    cache = golden.model.new_cache(2, 16)
    real = spans((2, 16), [3, 1], 16)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    at = torch.arange(16)
    seen = (at[None] // 4 <= at[:, None] // 4) & real[:, None]
    seen |= torch.eye(16, dtype=torch.bool)  # a row of a softmax is never empty

    def call(tokens: Tensor, start: int) -> Tensor:
        end = start + tokens.shape[1]
        view = CacheSlice(
            cache.store,
            positions[:, start:end],
            slice(start, end),
            None,
            end,
            positions[:, :end],
            seen[:, None, start:end, :end],
        )
        return golden.logits(tokens, layout=IN_BLOCKS, cache=view)

    call(states[0][:, :8], 0)
    texts, logits = [], []
    for start in (8, 12):

        def denoise(canvas: Tensor, t: Tensor, at: Positions, start: int = start) -> Prediction:
            logits.append(call(canvas, start))
            return Prediction(logits[-1].flatten(0, 1)[at.flat].double().log_softmax(-1))

        blank = torch.full((2, 4), golden.family.process.mask_token_id)
        texts += fill(golden, Confidence(), blank, torch.ones(2, 4).bool(), 2, denoise)
        call(texts[-1], start)
    assert golden.error("generate/bd3lm/block_logits", torch.stack(logits)) < 1.0
    assert wanted.shape == torch.stack(logits).shape
    blocks = [states[1][:, 8:12], states[2][:, 8:12], states[3][:, 12:], states[4][:, 12:]]
    assert torch.equal(torch.stack(texts), torch.stack(blocks))


def test_sdar_generates_from_left_to_right_by_the_engine(load):
    golden = load("sdar")

    class LeftToRight(Confidence):
        def __call__(self, segment):
            """Equal scores keep the order of the places."""
            one = lambda left, calls: torch.ones_like(left)  # noqa: E731
            yield from unmask_in_order(segment, lambda log_x0: torch.zeros(len(log_x0)), one)

    job = Job(golden["generate/prompt"].tolist(), [10])
    config = SamplingConfig(steps=4, temperature=0.0)
    engine = Engine(golden.model, golden.family, Request(job, config))
    engine.rule = LeftToRight()
    *_, last = engine.run()
    assert torch.equal(last.canvas, golden["generate/sequential/text"])


@pytest.mark.parametrize(
    ("rule", "temperature", "top_k"),
    [("sequential", 1.0, 1), ("static", 0.8, None), ("dynamic", 0.5, None)],
)
def test_sdar_predicts_blocks_from_the_cache(load, rule, temperature, top_k):
    """Its draws follow our controls; it orders by the drawn token, which our rules do not."""
    golden = load("sdar")
    text = golden[f"generate/{rule}/text"]
    cache, logits = golden.model.new_cache(1, 16), []
    for block, start in zip(
        golden[f"generate/{rule}/blocks"], golden[f"generate/{rule}/start"].tolist(), strict=True
    ):
        for at, tokens in ((0, text[:, :start]), (start, block[None])):
            begins = torch.tensor([at])
            view = cache.exact_slice(IN_BLOCKS, begins, tokens.shape[1], None, None)
            out = golden.logits(tokens, layout=IN_BLOCKS, cache=view)
        logits.append(out[0])
    assert golden.error(f"generate/{rule}/logits", torch.stack(logits)) < 1.0
    drawn = golden[f"generate/{rule}/drawn"].flatten()
    controls = Controls(SamplingConfig(temperature=temperature, top_k=top_k))
    shaped = shape(golden, controls, torch.cat(logits))
    chance = shaped.exp().gather(1, drawn[:, None]).view(-1, 4)
    assert golden.error(f"generate/{rule}/confidence", chance) < 1.0


def shape(golden: StockGolden, controls: Controls, logits: Tensor) -> Tensor:
    """Return [N, rows] log-probabilities of the official distribution under controls."""
    canvas = torch.zeros(1, len(logits), dtype=torch.int64)
    vocabulary = golden.family.process.vocabulary
    at = Positions.of(torch.arange(len(logits)), canvas)
    context = Context(canvas, at, torch.zeros(1), vocabulary)
    shaped = controls.applied(Prediction(logits.log_softmax(-1)), context)
    return shaped.log_x0.log_softmax(-1)


def test_diffugpt_draws_from_the_official_distribution(load):
    golden = load("diffugpt")
    logits = golden.logits(golden["generate/inputs"])
    assert golden.error("generate/logits", logits) < 1.0
    controls = Controls(SamplingConfig(temperature=0.95, top_p=0.9))
    found = shape(golden, controls, logits.flatten(0, 1)).view(logits.shape)
    inside = golden["generate/log_probs"] > -1e5
    assert golden.error("generate/log_probs", found, inside) < 1.0
    assert torch.equal(found > -1e5, inside)
    times = torch.tensor([3.0, 2.0, 1.0])
    assert golden.error("generate/reveal", 1.0 / (times + 1.0)) < 1.0


@pytest.mark.parametrize(
    ("rule", "steps"), [("topk", 5), ("confidence", 20)], ids=["topk", "confidence"]
)
def test_tiny_diffusion_generates_token_for_token(load, rule, steps):
    """Its sampler counts steps upwards, from the least noise on."""
    golden = load("tiny-diffusion")
    states, called = golden[f"generate/{rule}/states"], golden[f"generate/{rule}/t"].tolist()

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        step = torch.tensor([called.pop(0)] * 2)
        return official(golden, sigma=step)(canvas, t, positions)

    four = counted(lambda left, calls: torch.full_like(left, 4))()
    chosen = four if rule == "topk" else Threshold(threshold=0.2)
    texts = [states[0]]
    texts += fill(golden, chosen, states[0], states[0] == 0, steps, denoise)
    assert torch.equal(torch.stack(texts[:-1]), states)
    assert golden.error(f"generate/{rule}/final", texts[-1]) == 0.0
    assert not called


def test_a_converted_model_of_characters_generates_the_same(golden_folder, tmp_path):
    """With a tokenizer made here, a row for padding, and a table of steps beside the network."""
    folder, target = golden_folder / "tiny-diffusion", tmp_path / "export"
    assert main(["convert", str(folder), str(target)]) == 0
    published = TextDiffusion.from_pretrained(folder, "cpu")
    export = TextDiffusion.from_pretrained(target, "cpu")
    assert published.tokenizer("Ab\t")["input_ids"] == [65, 98, 9]
    texts = [m.generate("ABCD", max_new_tokens=8, steps=8).texts for m in (published, export)]
    assert texts[0] == texts[1]
    assert texts[0][0].startswith("ABCD")
