"""What Python users hand to a pipeline: numbers of other libraries, dtypes, devices, pickles."""

import copy
import pickle

import numpy as np
import pytest
import torch
from refusals import refused

from textdiff.errors import ConfigError
from textdiff.pipeline import TextDiffusion


@pytest.fixture(scope="module")
def models(exports) -> dict[str, TextDiffusion]:
    return {name: TextDiffusion.from_pretrained(exports / name, device="cpu") for name in "ad"}


GENERATION = {"seed": 3, "num_samples": 2, "batch_size": 1, "max_new_tokens": 5, "steps": 2}
GENERATION |= {"top_k": 3, "min_new_tokens": 2, "stride": 4, "max_denoising_steps": 3}
SCORING = {"seed": 3, "replicates": 9, "samples": 2, "batch_tokens": 512, "stride": 4}


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor])
@pytest.mark.parametrize("name", GENERATION)
def test_whole_numbers_of_a_generation(models, name, kind):
    options = {"max_new_tokens": 6, name: GENERATION[name]}
    expected = models["a"].generate("ab", **options)
    assert models["a"].generate("ab", **(options | {name: kind(GENERATION[name])})) == expected
    for wrong in (1.5, "3", True, [3]):
        with pytest.raises(ConfigError, match=f"^{name.removeprefix('max_denoising_')} "):
            models["a"].generate("ab", **(options | {name: wrong}))


@pytest.mark.parametrize("name", SCORING)
def test_whole_numbers_of_a_bound(models, name):
    texts = ["the cat sat on the mat and a dog ran over the hill"]
    expected = models["a"].estimate(texts, **{name: SCORING[name]})
    found = models["a"].estimate(texts, **{name: np.int64(SCORING[name])})
    assert found.bound() == expected.bound()
    assert models["a"].score(texts, **{name: np.int32(SCORING[name])}) == models["a"].score(
        texts, **{name: SCORING[name]}
    )
    with refused(ConfigError, "whole_number", name):
        models["a"].estimate(texts, **{name: "x"})


def test_whole_numbers_elsewhere(models):
    a, d = models["a"], models["d"]
    assert a.generate("a", seed=np.uint64(2**63 + 5)) == a.generate("a", seed=2**63 + 5)
    assert d.generate("a", window=np.int64(4)) == d.generate("a", window=4)
    held = a.with_block_size(np.int64(4), trained=False)
    assert held.family.block_size == 4
    assert type(held.family.block_size) is int
    knobs = {"order": "margin", "order_temperature": np.float32(0.5)}
    plain = {"order": "margin", "order_temperature": 0.5}
    options = {"rule": "confidence", "max_new_tokens": 6}
    assert a.generate("a", knobs=knobs, **options) == a.generate("a", knobs=plain, **options)
    score = {"estimator": "importance", "orders": 2}
    assert a.score(["ab"], **(score | {"orders": np.int64(2)})) == a.score(["ab"], **score)


@pytest.mark.parametrize("dtype", ["float16", torch.float16, torch.bfloat16, "torch.float64"])
def test_dtypes(exports, dtype):
    model = TextDiffusion.from_pretrained(exports / "a", "cpu", dtype)
    assert str(model.model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    assert len(model.generate("the", max_new_tokens=6).sequences[0]) == 9
    single = TextDiffusion.from_pretrained(exports / "a", "cpu")
    bounds = [m.score(["the cat sat"])[0].mean for m in (model, single)]
    assert bounds[0] == pytest.approx(bounds[1], rel=0.02)


def test_dtypes_and_devices_that_there_are_not(exports):
    for dtype in ("half", "int8", torch.int64, None, 16):
        with pytest.raises(ConfigError) as error:
            TextDiffusion.from_pretrained(exports / "a", dtype=dtype)
        assert error.value.code == "unknown_dtype"
    for device in ("gpu7", "meta", torch.device("meta")):
        with pytest.raises(ConfigError) as error:
            TextDiffusion.from_pretrained(exports / "a", device=device)
        assert error.value.code == "unknown_device"


def test_a_network_without_numbers(exports):
    model = TextDiffusion.from_pretrained(exports / "a", torch.device("cpu"))
    assert model.to("cpu").generate("a", max_new_tokens=3) == model.generate("a", max_new_tokens=3)
    with pytest.raises(ConfigError) as error:
        model.to("meta")
    assert error.value.code == "unknown_device"
    model.model.to("meta")
    for use in (
        lambda: model.generate("a"),
        lambda: next(model.stream("a")),
        lambda: model.score(["a"]),
    ):
        with pytest.raises(ConfigError, match="on device meta"):
            use()


@pytest.mark.parametrize("options", [{"regex": "[ab]+"}, {"ban": "e"}, {"force": "z"}])
@pytest.mark.parametrize("name", ["a", "d"])
def test_pickles_and_copies(models, name, options):
    model = models[name]
    expected = model.generate("the", max_new_tokens=6, seed=1, **options)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        assert other.generate("the", max_new_tokens=6, seed=1, **options) == expected
        assert other.folder == model.folder


def test_a_resized_network_is_saved_and_loaded(exports, tmp_path):
    model = TextDiffusion.from_pretrained(exports / "a", "cpu")
    before = model.score(["the cat"])[0].mean
    model.model.resize_token_embeddings(259, pad_to_multiple_of=64)
    for use in (lambda: model.generate("a"), lambda: model.score(["a"])):
        with pytest.raises(ConfigError, match="resized to 320 ids, where tokenizer and process"):
            use()
    model.save_pretrained(tmp_path)
    loaded = TextDiffusion.from_pretrained(tmp_path, "cpu")
    # Rows that only fill up are never predicted, so the bound is what it was.
    assert loaded.score(["the cat"])[0].mean == pytest.approx(before, rel=1e-5)
    assert max(loaded.generate("a", max_new_tokens=20).sequences[0]) < 259
