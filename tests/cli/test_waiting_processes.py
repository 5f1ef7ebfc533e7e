"""A launch of several processes: none waits in vain for a large corpus."""

from types import SimpleNamespace

import pytest
from refusals import refused

from textdiff.commands.train import _prepare
from textdiff.config import Config
from textdiff.data import corpus as corpus_module
from textdiff.data import packing
from textdiff.data.corpus import prepare_corpus
from textdiff.errors import DataError
from textdiff.train import distributed


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_large_corpus_has_to_be_prepared_first(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"text{suffix}"
    text = "".join(f"line {number}\n" for number in range(400))
    if suffix == ".txt":
        path.write_text(text)
    else:
        import gzip

        path.write_bytes(gzip.compress(text.encode()))
    section = {"sources": [{"source": str(path)}], "cache_dir": str(tmp_path / "cache")}
    config = Config.model_validate(
        {"data": section | {"sequence_length": 16}, "tokenizer": {"kind": "byte"}}
    )
    sent: list = []

    def broadcast(outcome: list) -> None:
        sent.extend(outcome) if not sent else outcome.__setitem__(slice(None), sent)

    monkeypatch.setattr(distributed, "broadcast_object_list", broadcast)
    first, second = (
        SimpleNamespace(num_processes=2, is_main_process=main) for main in (True, False)
    )
    monkeypatch.setattr(corpus_module, "MOST_WHILE_OTHERS_WAIT", 100)
    with monkeypatch.context() as patched:
        for read in ("scan_documents", "tokenize"):
            patched.setattr(corpus_module, read, lambda *a, **k: pytest.fail("read the corpus"))
        for process in (first, second):  # the error reaches both
            with refused(DataError, "unprepared_corpus", "textdiff data prepare"):
                _prepare(config, process, False)
    assert not (tmp_path / "cache").exists()
    alone = SimpleNamespace(num_processes=1, is_main_process=True)
    prepared = _prepare(config, alone, False)
    sent.clear()
    monkeypatch.setattr(packing, "_build", lambda *a: pytest.fail("tokenised again"))
    for process in (first, second):
        assert _prepare(config, process, False).record == prepared.record


def test_a_small_corpus_is_prepared_while_others_wait(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words of a text\n" * 40)
    section = {"sources": [{"source": str(path)}], "cache_dir": str(tmp_path / "cache")}
    config = Config.model_validate(
        {"data": section | {"sequence_length": 16}, "tokenizer": {"kind": "byte"}}
    )
    assert not prepare_corpus(config.data, config.tokenizer, 0, others_wait=True).cached
