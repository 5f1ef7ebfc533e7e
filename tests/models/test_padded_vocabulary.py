"""Rows of the vocabulary that the tokenizer lacks: they change no loss, bound or text."""

import pytest
import torch
from refusals import refused

from textdiff.config import Config
from textdiff.config.reading import load
from textdiff.diffusion.noise import NoiseUniforms, draw_noise
from textdiff.diffusion.pairs import training_maker
from textdiff.errors import ConfigError
from textdiff.export.loading import family_of
from textdiff.loss import corrupt
from textdiff.pipeline import TextDiffusion
from textdiff.planning.sizes import run_sizes
from textdiff.train.initial_weights import initial_network
from textdiff.train.learned_loss import training_loss
from textdiff.train.setup import model_config, sample_defaults

LEVELS = {"adaln": True, "time_conditioning": True}
CASES = {
    "mdlm": ({"objective": {"kind": "mdlm"}}, {"self_conditioning": True}),
    "sedd": ({"objective": {"kind": "sedd"}}, {}),
    "udlm": ({"objective": {"kind": "udlm"}, "process": "uniform"}, LEVELS),
    "gidd": (
        {"objective": {"kind": "gidd"}, "process": "hybrid", "schedule": {"kind": "hybrid"}},
        LEVELS,
    ),
    "ar": ({"objective": {"kind": "ar"}, "block_size": 1}, {}),
}
TEXTS = ["the cat sat on the mat", "a dog ate the bone"]
MULTIPLE = 32


def config(name: str, multiple: int) -> Config:
    diffusion, options = CASES[name]
    size = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = {**size, **options, "pad_vocab_to_multiple_of": multiple}
    return Config.model_validate({
        "data": {"sequence_length": 16}, "tokenizer": {"kind": "char"}, "model": model,
        "diffusion": diffusion, "sample": {"steps": 8, "max_new_tokens": 16},
    })  # fmt: skip


def pair(name: str) -> list[TextDiffusion]:
    """Models of the same weights, the second one with more rows, whose values are large."""
    made, state = [], {}
    for multiple in (1, MULTIPLE):
        settings = config(name, multiple)
        tokenizer = settings.tokenizer.prepare(TEXTS)
        torch.manual_seed(multiple)
        model = settings.model.build(model_config(settings, tokenizer)).double().eval()
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                tensor.copy_(3.0 * torch.randn_like(tensor) if multiple > 1 else tensor)
                if key in state:
                    tensor[tuple(slice(n) for n in state[key].shape)] = state[key]
        state = model.state_dict()
        family = family_of(model.config, torch.device("cpu"))
        made.append(TextDiffusion(model, tokenizer, family, sample_defaults(settings)))
    return made


@pytest.mark.parametrize("name", CASES)
def test_a_padded_network_is_the_same_model(name):
    plain, padded = pair(name)
    rows = plain.model.config.vocab_size
    assert (rows % MULTIPLE, padded.model.config.vocab_size) == (rows, MULTIPLE)
    vocabularies = [each.family.process.vocabulary for each in (plain, padded)]
    assert torch.equal(vocabularies[0].ids, vocabularies[1].ids)
    x0 = vocabularies[0].ids[torch.randint(0, vocabularies[0].count, (3, 16))]
    blocks = plain.family.blocks(16).count
    u = NoiseUniforms(*(torch.rand(3, n, dtype=torch.float64) for n in (blocks, 16, 16)))
    losses = []
    for each in (plain, padded):
        noise = draw_noise(each.family, x0, u, training_maker(each.family, "count"))
        batch = corrupt(each.family, x0, noise, None)
        loss, nelbo = training_loss(each.model, each.family)(batch)
        loss.backward()
        losses.append(torch.stack([loss.detach(), nelbo]))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    assert not padded.model.output_layer.linear.weight.grad[rows:].any()
    bounds = [each.score(TEXTS[:1], replicates=8)[0] for each in (plain, padded)]
    assert bounds[0].mean == pytest.approx(bounds[1].mean, rel=1e-12)
    texts = [each.generate("", num_samples=4, seed=1).texts for each in (plain, padded)]
    assert texts[0] == texts[1]


def test_a_padded_model_is_saved_and_continued_with_as_many_rows(tmp_path):
    plain, padded = pair("mdlm")
    for model, folder in ((plain, "plain"), (padded, "padded")):
        model.save_pretrained(tmp_path / folder)
    again = TextDiffusion.from_pretrained(tmp_path / "padded", "cpu", "float64")
    assert again.generate("", seed=1).texts == padded.generate("", seed=1).texts
    for folder, multiple, fits in (
        ("plain", 1, True), ("padded", MULTIPLE, True), ("plain", MULTIPLE, False),
    ):  # fmt: skip
        settings = config("mdlm", multiple)
        settings = settings.model_copy(
            update={"train": settings.train.model_copy(
                update={"init_from": str(tmp_path / folder)})}
        )  # fmt: skip
        start = model_config(settings, plain.tokenizer)
        if fits:
            initial_network(settings, start, plain.tokenizer)
            continue
        with refused(ConfigError, "misfit", "pad_vocab_to_multiple_of"):
            initial_network(settings, start, plain.tokenizer)


def test_added_rows_are_planned():
    sizes = [run_sizes(config("mdlm", multiple), 23, half=False) for multiple in (1, MULTIPLE)]
    assert [run.vocabulary for run in sizes] == [23, 32]
    added = 9 * (16 + 16 + 1)  # embedding, head and its bias
    assert sizes[1].counts.total - sizes[0].counts.total == added


def test_configs_with_the_vocabulary_of_gpt2_align_its_rows(root):
    paths = sorted((root / "configs").glob("*-owt-*.yaml"))
    rows = [run_sizes(load(path), 50259, half=True).vocabulary for path in paths]
    assert rows == 4 * [50304]  # 393 x 128
