"""Judges against likelihoods computed one token at a time, from the network's logits alone."""

import math
import shutil

import numpy as np
import pytest
import torch
from tiny_judges import CONTEXT, TEXTS, export
from transformers import AutoModelForCausalLM, AutoTokenizer

from textdiff.errors import CheckpointError, ConfigError, DataError
from textdiff.evaluate.judges import load_judge
from textdiff.pipeline import TextDiffusion


def quiet(done, total):
    pass


def one_by_one(folder, text):
    """(nats, tokens scored, bytes scored) of a text, a network call per token."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    size = len(text.encode())
    if tokenizer.bos_token_id is None:
        size -= len(tokenizer.decode(ids[:1]).encode())
    else:
        ids = [tokenizer.bos_token_id, *ids]
    nats = 0.0
    for place in range(1, len(ids)):
        # Beyond the context a window ends every half context, or with the text.
        late = max(0, math.ceil((place + 1 - CONTEXT) / (CONTEXT // 2)))
        end = min(CONTEXT + late * (CONTEXT // 2), len(ids))
        seen = ids[max(0, end - CONTEXT) : place]
        with torch.no_grad():
            logits = model(torch.tensor([seen])).logits[0, -1]
        nats -= float(logits.log_softmax(-1)[ids[place]])
    return nats, max(0, len(ids) - 1), size


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_judge_gives_what_its_network_gives_token_by_token(judges, name):
    found = load_judge(str(judges[name]), "cpu", "float32", 4096).judge(TEXTS, quiet)
    counts = []
    for index, text in enumerate(TEXTS):
        nats, tokens, size = one_by_one(judges[name], text)
        assert found.nats[index] == pytest.approx(nats, rel=1e-5, abs=1e-6)
        assert found.tokens[index] == tokens
        assert found.bytes[index] == size
        counts.append(tokens)
    assert found.windowed == sum(tokens + 1 > CONTEXT for tokens in counts) > 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_company_changes_nothing(judges, name):
    whole = load_judge(str(judges[name]), "cpu", "float64", 4096).judge(TEXTS, quiet)
    narrow = load_judge(str(judges[name]), "cpu", "float64", 1)
    other = narrow.judge(TEXTS[::-1], quiet)
    np.testing.assert_allclose(whole.nats, other.nats[::-1], rtol=1e-12)
    vectors = load_judge(str(judges[name]), "cpu", "float64", 4096).features(["a cat", "b"], quiet)
    np.testing.assert_allclose(narrow.features(["b"], quiet)[0], vectors[1], rtol=1e-5)


def test_text_that_spells_a_special_token_is_text(judges):
    judge = load_judge(str(judges["gpt2"]), "cpu", "float32", 4096)
    assert judge.judge(["a<s>"], quiet).tokens[0] > 2


def test_the_record_identifies_the_judge(judges):
    found = load_judge(str(judges["gpt2"]), "cpu", "float32", 4096).record()
    assert len(found["model_sha256"]) == len(found["tokenizer_sha256"]) == 64
    assert found["context"] == CONTEXT
    assert found["first_token"].startswith("scored")
    bare = load_judge(str(judges["llama"]), "cpu", "float32", 4096).record()
    assert bare["first_token"] == "not scored"


def test_an_autoregressive_export_judges_exactly(tmp_path):
    folder = export(tmp_path / "ar", "ar")
    judge = load_judge(str(folder), "cpu", "float64", 4096)
    texts = ["a", "", "dogs and cats and mice"]
    found = judge.judge(texts, quiet)
    assert found.tokens.tolist() == found.bytes.tolist() == [1, 0, 22]
    assert found.windowed == 1
    # A likelihood adds up: p(a) = sum over b of p(ab) and what is no character of one byte.
    pairs = judge.judge(["a" + chr(c) for c in range(128)], quiet).nats
    assert 0.1 < np.exp(found.nats[0] - pairs).sum() < 1.0
    held = TextDiffusion.from_pretrained(folder, "cpu", "float64")
    bound = held.estimate(["ab"], estimator="chain_rule").bound()
    assert pairs[ord("b")] == pytest.approx(2 * bound.mean, rel=1e-9)
    with pytest.raises(ConfigError) as error:
        judge.features(["a"], quiet)
    assert error.value.code == "judge_without_features"


def test_a_bound_is_no_judge(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_judge(str(export(tmp_path / "mdlm", "mdlm")), "cpu", "float32", 4096)
    assert error.value.code == "judge_without_likelihood"


def test_bad_judges_are_one_sentence(judges, tmp_path):
    with pytest.raises(CheckpointError) as error:
        load_judge("./nowhere", "cpu", "float32", 4096)
    assert error.value.code == "judge_not_found"
    with pytest.raises(CheckpointError) as error:
        load_judge(str(tmp_path), "cpu", "float32", 4096)
    assert error.value.code == "judge_not_found"
    bare = shutil.copytree(judges["gpt2"], tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(CheckpointError) as error:
        load_judge(str(bare), "cpu", "float32", 4096)
    assert error.value.code == "judge_tokenizer"
    cut = shutil.copytree(judges["gpt2"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError) as error:
        load_judge(str(cut), "cpu", "float32", 4096)
    assert error.value.code == "judge_weights"


def test_a_tokenizer_of_another_network_is_noticed(judges, tmp_path):
    small = shutil.copytree(judges["gpt2"], tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(judges["gpt2"])
    model.resize_token_embeddings(40)
    model.save_pretrained(small)
    with pytest.raises(DataError) as error:
        load_judge(str(small), "cpu", "float32", 4096).judge(["zebra"], quiet)
    assert error.value.code == "judge_tokenizer_of_another"
