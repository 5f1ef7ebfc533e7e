"""The zero-shot programme of `evals/`, on tiny stand-ins for its corpora."""

import gzip
import importlib.util
import json
import sys

import pytest

from textdiff.data.detokenize import DETOKENIZERS
from textdiff.likelihood.protocols import PROTOCOLS


@pytest.fixture
def zero_shot(root):
    spec = importlib.util.spec_from_file_location("zero_shot", root / "evals" / "zero_shot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """$TEXTDIFF_DATA with a few rows of Lambada and WikiText-2."""
    (tmp_path / "lambada").mkdir()
    with gzip.open(tmp_path / "lambada" / "lambada_test.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"passage number {i} ."}) + "\n" for i in range(6))
    (tmp_path / "wikitext2-valid-test").mkdir()
    with gzip.open(tmp_path / "wikitext2-valid-test" / "test.txt.gz", "wt") as file:
        file.write(" \n = Cats = \n \n Cats , it is said , sleep . \n" * 3)
    monkeypatch.setenv("TEXTDIFF_DATA", str(tmp_path))
    return tmp_path


def run(zero_shot, monkeypatch, tmp_path, *words) -> tuple[int, dict]:
    output = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["zero_shot.py", *map(str, words), "--output", str(output)])
    code = zero_shot.main()
    return code, json.loads(output.read_text())


def test_every_corpus_is_complete(zero_shot):
    assert set(zero_shot.CORPORA) == {
        "ptb", "wikitext2", "wikitext103", "lm1b", "lambada", "ag_news", "pubmed", "arxiv",
    }  # fmt: skip
    for corpus in zero_shot.CORPORA.values():
        assert corpus["detokenizer"] in DETOKENIZERS
        assert set(corpus["split"]) == {*PROTOCOLS, "none"}
        assert corpus["hub"].count("/") == 1


def test_local_corpora(zero_shot, exports, corpora, monkeypatch, tmp_path):
    words = (exports / "a", "--datasets", "lambada", "wikitext2", "--max-documents", "5")
    code, record = run(zero_shot, monkeypatch, tmp_path, *words)
    assert code == 0
    lambada, wikitext = record["results"]["lambada"], record["results"]["wikitext2"]
    assert lambada["documents"] == 5
    assert lambada["is_bound"]
    assert wikitext["documents"] == 1
    assert wikitext["detokenizer"] == "wikitext"
    assert "<unk>" in wikitext["source"]


def test_protocol_and_what_cannot_be_scored(zero_shot, exports, corpora, monkeypatch, tmp_path):
    words = (exports / "c", "--datasets", "lambada", "ptb", "--protocol", "bd3lm")
    code, record = run(zero_shot, monkeypatch, tmp_path, *words)
    assert code == 1
    assert "cannot predict" in record["results"]["lambada"]["error"]
    assert "cannot be loaded from the hub" in record["results"]["ptb"]["error"]
    words = (exports / "a", "--datasets", "lambada", "--protocol", "bd3lm")
    code, record = run(zero_shot, monkeypatch, tmp_path, *words)
    assert code == 0
    assert not record["results"]["lambada"]["is_bound"]
    assert record["results"]["lambada"]["biases"]
