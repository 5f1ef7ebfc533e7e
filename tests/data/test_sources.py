import gzip
import importlib
import json
import lzma
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from children import finished
from datasets import Dataset, DatasetDict
from refusals import refused

from textdiff.data import formats, hub, json_rows
from textdiff.data.conversation_rows import CONVERSATIONS
from textdiff.data.corpus import Corpus, prepare_corpus
from textdiff.data.document_stream import iterate_texts
from textdiff.data.sections import BpeTokenizer, ByteTokenizer, DataConfig, Source
from textdiff.data.sources import SOURCES, kind_of_source, known_sources, load_documents
from textdiff.data.text_files import read_texts
from textdiff.errors import DataError


def load(path: object, **keys: object) -> list[str]:
    return list(iterate_texts(load_documents(Source(source=str(path), **keys))))


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def rows(*values: object, key: str = "text") -> str:
    return "".join(json.dumps({key: value}) + "\n" for value in values)


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["one\r\ntwo\rthree\n\x0b\x0c\u2028\u0085four", "é世\U0001f9ff", "  padded \n\n", "no newline"],
)
def test_text_is_byte_exact(tmp_path: Path, text: str):
    assert load(write(tmp_path / "a.txt", text)) == [text]
    assert load(write(tmp_path / "a.jsonl", rows(text))) == [text]
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet") == [text]


def test_only_a_leading_byte_order_mark_is_dropped(tmp_path: Path):
    bom = b"\xef\xbb\xbf"
    assert load(write(tmp_path / "a.txt", bom + b"x" + bom)) == ["x\ufeff"]
    assert load(write(tmp_path / "a.jsonl", bom + rows("x", "y").encode())) == ["x", "y"]


def test_compressed_files(tmp_path: Path):
    write(tmp_path / "1.txt.gz", gzip.compress(b"one\r\n"))
    write(tmp_path / "2.txt.xz", lzma.compress(b"two"))
    write(tmp_path / "3.jsonl.gz", gzip.compress(rows("three", "four").encode()))
    assert load(tmp_path) == ["one\r\n", "two", "three", "four"]


def test_jsonl_reads_the_named_key_and_skips_blank_lines(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", rows("a", key="body") + "\r\n\n" + rows("b", "", key="body"))
    assert load(path, text_column="body") == ["a", "b"]


def test_folder_is_recursive_sorted_and_skips_what_is_no_text(tmp_path: Path):
    write(tmp_path / "b.txt", "2")
    write(tmp_path / "a" / "z.jsonl", rows("0", "1"))
    write(tmp_path / "c.txt", "")
    write(tmp_path / "d.py", "no text")
    write(tmp_path / ".hidden" / "e.txt", "no")
    pq.write_table(pa.table({"text": ["3"]}), tmp_path / "f.parquet")
    assert load(tmp_path) == ["0", "1", "2", "3"]


def test_glob(tmp_path: Path):
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        write(tmp_path / name, name)
    assert load(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert load(tmp_path / "**" / "[ac].txt") == ["a.txt", "deep/c.txt"]
    with refused(DataError, "no_text_files"):
        load(tmp_path / "*.jsonl")


def test_existing_name_with_glob_characters_is_a_file(tmp_path: Path):
    assert load(write(tmp_path / "a[1].txt", "x")) == ["x"]


def test_saved_dataset_and_its_splits(tmp_path: Path):
    saved = Dataset.from_dict({"body": ["x", "", "y"], "n": [1, 2, 3]})
    saved.save_to_disk(tmp_path / "one")
    DatasetDict({"a": saved, "b": saved.select([2])}).save_to_disk(tmp_path / "many")
    assert load(tmp_path / "one", text_column="body") == ["x", "y"]
    assert load(tmp_path / "many", text_column="body", split="b") == ["y"]
    with refused(DataError, "no_split", "one of: a, b"):
        load(tmp_path / "many", text_column="body")
    with refused(DataError, "no_column", "one of: body, n"):
        load(tmp_path / "one")
    with refused(DataError, "no_string", "'n'", "int64"):
        load(tmp_path / "one", text_column="n")


def test_python_docs_is_a_source(documentation, monkeypatch):
    monkeypatch.setattr("textdiff.data.python_docs.python_docs", lambda: documentation)
    assert load("python-docs") == documentation


def test_read_texts_reads_paths_in_the_order_given(tmp_path: Path):
    first = write(tmp_path / "z.txt", "1")
    second = write(tmp_path / "a.jsonl", rows("2", "3"))
    assert read_texts([str(first), str(second)]) == ["1", "2", "3"]
    with refused(DataError, "no_file"):
        read_texts([str(tmp_path / "nope.txt")])


def test_large_text_is_read_in_blocks(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(formats, "_READ_BYTES", 5)
    text = "\ufeff".join(["é世\U0001f9ff", "x" * 23, "\r\n"]) * 7
    documents = load_documents(Source(source=str(write(tmp_path / "a.txt", text))))
    blocks = list(documents.blocks())
    assert "".join(block.text for block in blocks) == text
    assert [block.last for block in blocks] == [False] * (len(blocks) - 1) + [True]
    assert max(len(block.text) for block in blocks) <= 5
    for end in (b"\xf0\x9f", b"ab\xff", b"abc\0"):
        path = write(tmp_path / "bad.txt", b"0123456789ab" + end)
        at = 14 if end[-1:] in (b"\xff",) else 12 if end[0] == 0xF0 else 15
        code, unit = ("zero_byte", "offset") if end[-1:] == b"\0" else ("not_utf8", "byte")
        with refused(DataError, code, f"{unit} {at}"):
            load(path)


def test_overlong_json_line_is_refused(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(json_rows, "_LONGEST_LINE_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl", rows("x", "y" * (1 << 20)))
    with refused(DataError, "long_line", "line 2", ".txt"):
        load(path)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "code", "place"),
    [
        ("a.txt", b"", "no_text", ""),
        ("a.txt", b" \n\t\r\n", "no_text", ""),
        ("a.txt", b"ab\0c", "zero_byte", "offset 2"),
        ("a.txt", b"caf\xe9 au lait", "not_utf8", "byte 3"),
        ("a.txt", b"\xef\xbb\xbfok\xff", "not_utf8", "byte 5"),
        ("a.txt.gz", b"plain", "unreadable", ""),
        ("a.txt.gz", gzip.compress(b"cut off" * 99, mtime=0)[:-9], "unreadable", ""),
        ("a.txt.xz", b"plain", "unreadable", ""),
        ("a.jsonl", b"", "no_text", ""),
        ("a.jsonl", b'{"text": ""}\n', "no_text", ""),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "not_json", "a.jsonl, line 2"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', "not_object", "line 2"),
        ("a.jsonl", b'\n{"body": "x", "id": 1}\n', "no_column", "body, id"),
        ("a.jsonl", b'{"text": 3}\n', "no_string", "line 1: 'text' holds int"),
        ("a.jsonl", b'{"text": null}\n', "no_string", "line 1: 'text' holds NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate", "line 1: 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "not_utf8", "byte 24"),
        ("a.parquet", b"PAR1 not really", "unreadable", ""),
        ("a.csv", b"x,y\n1,2", "no_column", "one of: x, y"),
        ("a.parquet.gz", b"PAR1", "compressed_table", ".gz"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, data: bytes, code: str, place: str):
    path = write(tmp_path / name, data)
    with refused(DataError, code, place, str(path)):
        load(path)


def test_bad_parquet_columns(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", None], "n": [1, 2]}), path)
    with refused(DataError, "no_string", "row 2: 'text'"):
        load(path)
    with refused(DataError, "no_string", "row 1: 'n'"):
        load(path, text_column="n")
    with refused(DataError, "no_column", "one of: text, n"):
        load(path, text_column="body")


def test_folder_without_text(tmp_path: Path):
    write(tmp_path / "a.png", "x")
    write(tmp_path / "b", "x")
    with refused(DataError, "no_text_files", "2 files (.png: 1, without"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["./nope", "/nope/x", "~/nope", "nope.txt", "a/nope.jsonl.gz", "a/b/c"]
)
def test_missing_path_is_not_taken_for_a_hub_id(monkeypatch, name: str):
    monkeypatch.setattr(hub, "load_hub", lambda *a: pytest.fail("asked the hub"))
    with refused(DataError, "no_file"):
        load(name)


def test_missing_path_in_an_existing_folder(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with refused(DataError, "no_file", "data/nope"):
        load("data/nope")


# --- the hub -------------------------------------------------------------------------------------


def answering(monkeypatch, tmp_path: Path, info: object, loaded: object = None) -> None:
    """Replaces the hub by one that answers `info` and `loaded`, raising what is an exception."""

    def answer(value: object) -> object:
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *a, **k: answer(info))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: answer(loaded))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


def test_hub_dataset(monkeypatch, tmp_path: Path):
    answering(
        monkeypatch, tmp_path, None, Dataset.from_dict({"body": ["x", "", "y"], "n": [1, 2, 3]})
    )
    assert load("owner/name", text_column="body") == ["x", "y"]
    with refused(DataError, "no_column", "'owner/name'"):
        load("owner/name")


def test_hub_dataset_with_missing_values(monkeypatch, tmp_path: Path):
    answering(monkeypatch, tmp_path, None, Dataset.from_dict({"text": ["x", None]}))
    with refused(DataError, "no_string", "row 2: 'text'"):
        load("owner/name")


def test_offline(monkeypatch, tmp_path: Path):
    answering(monkeypatch, tmp_path, OSError("Name or service not known\nmore"))
    with pytest.raises(DataError) as caught:
        load("owner/name")
    assert str(caught.value) == (
        "cannot load hub dataset 'owner/name' (Name or service not known); check the spelling and "
        "the network, or give a local file"
    )


def test_offline_but_cached(monkeypatch, tmp_path: Path):
    answering(monkeypatch, tmp_path, OSError("no network"), Dataset.from_dict({"text": ["x"]}))
    (tmp_path / "owner___name").mkdir()
    assert load("owner/name") == ["x"]


def streamed(monkeypatch, tmp_path: Path, lines: str) -> list[dict]:
    """A hub whose dataset is a local file, streamed; returns the options it was asked with."""
    path = write(tmp_path / "remote.jsonl", lines)
    asked: list[dict] = []
    real = datasets.load_dataset

    def load_dataset(name: str, config: str | None, **options: object) -> object:
        asked.append(options)
        return real("json", data_files=str(path), split="train", streaming=options["streaming"])

    info = type("Info", (), {"sha": "0123abcd"})()
    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *a, **k: info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_streamed_hub_dataset(monkeypatch, tmp_path: Path):
    asked = streamed(monkeypatch, tmp_path, rows("one", "", "two", "three", key="body"))
    keys = {"text_column": "body", "streaming": True}
    assert load("owner/name", **keys) == ["one", "two", "three"]
    # Pinned to a commit, so that all passes and all runs read the same.
    assert asked[0]["revision"] == "0123abcd"
    assert load("owner/name", **keys, skip_documents=1, max_documents=1) == ["two"]
    source = Source(source="owner/name", **keys)
    documents = load_documents(source)
    assert list(iterate_texts(documents)) == list(iterate_texts(documents))
    other = load_documents(source.model_copy(update={"skip_documents": 1}))
    assert documents.signature != other.signature
    with refused(DataError, "no_column", "one of: body"):
        load("owner/name", streaming=True)


TALKS = [
    {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]},
    {"messages": [{"role": "user", "content": "Äh"}, {"role": "assistant", "content": "Ja\n"}]},
]
PAIRS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "", "completion": " x"}]


@pytest.mark.parametrize("place", ["parquet", "saved", "splits", "hub", "stream"])
@pytest.mark.parametrize("raw", [TALKS, PAIRS], ids=["messages", "pairs"])
def test_conversations_are_the_same_from_every_source(monkeypatch, tmp_path, place, raw):
    numbered = [row | {"id": n} for n, row in enumerate(raw)]  # a column that is left out
    lines = "".join(json.dumps(row) + "\n" for row in numbered)
    table, name = Dataset.from_list(numbered), str(tmp_path / "saved")
    if place == "parquet":
        name = str(tmp_path / "rows.parquet")
        table.to_parquet(name)
    elif place == "saved":
        table.save_to_disk(name)
    elif place == "splits":
        DatasetDict({"train": table}).save_to_disk(name)
    elif place == "hub":
        name = "owner/name"
        answering(monkeypatch, tmp_path, None, table)
    else:
        name = "owner/name"
        streamed(monkeypatch, tmp_path, lines)
    read = load(name, text_column=CONVERSATIONS, streaming=place == "stream")
    assert [json.loads(text) for text in read] == raw
    assert read == load(write(tmp_path / "rows.jsonl", lines), text_column=CONVERSATIONS)


def test_bad_conversations_of_tables_are_refused_with_their_place(tmp_path):
    wrong = {"messages": [{"role": "robot", "content": "2"}]}
    Dataset.from_list([*TALKS, wrong]).save_to_disk(str(tmp_path / "saved"))
    with refused(DataError, "unknown_role", "saved, row 3", "robot"):
        load(tmp_path / "saved", text_column=CONVERSATIONS)


@pytest.mark.parametrize("limit", [None, 50])
def test_a_stream_is_read_once(monkeypatch, tmp_path: Path, corpus, limit):
    passes: list[int] = []

    def texts():
        passes.append(0)
        for text in corpus:
            passes[-1] += 1
            yield {"text": text}

    stream = datasets.IterableDataset.from_generator(texts)
    answering(monkeypatch, tmp_path, None, stream)
    cache = tmp_path / "cache"

    def prepared(**source) -> Corpus:
        data = {"sources": [source], "validation": 0.2, "sequence_length": 32}
        data = DataConfig.model_validate(data | {"cache_dir": str(cache)})
        return prepare_corpus(data, BpeTokenizer(vocab_size=300), seed=0)

    passes.clear()
    found = prepared(source="owner/name", streaming=True, max_documents=limit)
    assert len(passes) == 1
    assert passes[0] <= (len(corpus) if limit is None else limit + 1)
    assert not list((cache / "textdiff").glob(".partial-*"))
    expected = prepared(source=str(write(tmp_path / "texts.jsonl", rows(*corpus[:limit]))))
    assert found.record["train"] == expected.record["train"]
    assert found.validation == expected.validation
    assert found.streams[0].folder == expected.streams[0].folder


def test_streamed_text_is_checked(monkeypatch, tmp_path: Path):
    streamed(monkeypatch, tmp_path, rows("x", None))
    with refused(DataError, "no_string", "'owner/name', row 2: 'text'"):
        load("owner/name", streaming=True)


def test_broken_stream_says_so(monkeypatch, tmp_path: Path):
    def broken():
        yield {"text": "x"}
        raise ConnectionError("reset by peer")

    stream = datasets.IterableDataset.from_generator(broken)
    answering(monkeypatch, tmp_path, None, stream)
    with refused(DataError, "broken_stream", "reset by peer"):
        load("owner/name", streaming=True)


def test_unknown_split_or_configuration(monkeypatch, tmp_path: Path):
    answering(monkeypatch, tmp_path, None, ValueError('Unknown split "dev".\nShould be one of'))
    with refused(DataError, "not_loaded", "split 'dev', name 'v2': Unknown split \"dev\")"):
        load("owner/name", split="dev", name="v2")


def test_unknown_dataset(monkeypatch, tmp_path: Path):
    class NotFound(hub.RepositoryNotFoundError):
        def __init__(self) -> None:  # the real one wants an HTTP response
            Exception.__init__(self, "404")

    answering(monkeypatch, tmp_path, NotFound())
    with refused(DataError, "no_dataset", "'owner/name'"):
        load("owner/name")


@pytest.mark.parametrize("name", ["text", "json", "parquet"])
def test_format_names_do_not_read_the_working_directory(monkeypatch, tmp_path: Path, name: str):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "secret")
    with refused(DataError, "format_name"):
        load(name)


@pytest.mark.parametrize("name", ["spaces are no id", "python-docs:x", "saved:x", "tox:3"])
def test_impossible_hub_id(name: str):
    with refused(DataError, "unknown_source", "python-docs", "save_to_disk"):
        load(name)


def test_suffixes_are_all_readable(tmp_path: Path):
    kinds = {
        suffix: formats.known_kind(tmp_path / f"x{suffix.upper()}") for suffix in formats.KINDS
    }
    assert kinds == formats.KINDS


# --- kinds that users add ------------------------------------------------------------------------

TOY = '''
"""A source of counted sentences, as a user would write it."""

from typing import Literal

from textdiff.data.document_stream import from_texts
from textdiff.data.sources import SOURCES, SourceKind


@SOURCES.register
class Toy(SourceKind):
    """`toy:N`, N sentences."""

    kind: Literal["toy"] = "toy"

    def load(self, source, omissions):
        """Return N documents."""
        count = int(source.source.partition(":")[2])
        return from_texts(f"Sentence {n} of the toy. " * 9 for n in range(count))
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch):
    """Import a file that registers a source."""
    monkeypatch.setattr(SOURCES, "_members", dict(SOURCES._members))
    write(tmp_path / "toy_source.py", TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("toy_source")
    yield
    del sys.modules["toy_source"]


def test_registered_source_is_prepared_and_cached_by_its_content(toy, tmp_path: Path, monkeypatch):
    def prepared(name: str) -> Corpus:
        data = {"sources": [{"source": name}], "cache_dir": str(tmp_path), "sequence_length": 16}
        return prepare_corpus(DataConfig.model_validate(data), ByteTokenizer(), seed=0)

    first, more = prepared("toy:30"), prepared("toy:31")
    assert [corpus.record["sources"][0]["documents"] for corpus in (first, more)] == [30, 31]
    assert first.train.rows([0]).tokens.shape == (1, 16)
    assert [first.cached, more.cached] == [False, False]
    assert prepared("toy:30").cached
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "toy:3", "a file")  # what exists is what is meant
    assert load("toy:3") == ["a file"]
    assert "`toy:N`, N sentences" in known_sources()


def test_source_that_was_registered_last_is_asked_first(toy, monkeypatch):
    monkeypatch.setattr(SOURCES["toy"], "fits", lambda self, name: name == "sentences")
    assert kind_of_source("sentences").kind == "toy"
    assert kind_of_source("python-docs").kind == "python-docs"
    assert kind_of_source("owner/name").kind == "hub"


def test_kinds_of_sources_are_named_in_the_schema():
    description = Source.model_fields["source"].description
    assert description == known_sources()
    assert len(description.split("; ")) == len(SOURCES)


def test_schema_needs_neither_torch_nor_datasets():
    code = (
        "import sys, textdiff.config; "
        "heavy = {'torch', 'datasets', 'transformers', 'pyarrow', 'tokenizers', 'numpy'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    assert finished([sys.executable, "-c", code]).returncode == 0
