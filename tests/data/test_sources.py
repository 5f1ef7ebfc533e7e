import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from textdiff.data import formats, json_rows, sources, utf8
from textdiff.data.document_stream import iterate_texts
from textdiff.data.settings import Source
from textdiff.data.sources import load_documents
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
    with pytest.raises(DataError, match="no text file matches"):
        load(tmp_path / "*.jsonl")


def test_existing_name_with_glob_characters_is_a_file(tmp_path: Path):
    assert load(write(tmp_path / "a[1].txt", "x")) == ["x"]


def test_saved_dataset_and_its_splits(tmp_path: Path):
    saved = Dataset.from_dict({"body": ["x", "", "y"], "n": [1, 2, 3]})
    saved.save_to_disk(tmp_path / "one")
    DatasetDict({"a": saved, "b": saved.select([2])}).save_to_disk(tmp_path / "many")
    assert load(tmp_path / "one", text_column="body") == ["x", "y"]
    assert load(tmp_path / "many", text_column="body", split="b") == ["y"]
    with pytest.raises(DataError, match="no split 'train'; set split to one of: a, b"):
        load(tmp_path / "many", text_column="body")
    with pytest.raises(DataError, match="no column 'text'; set text_column to one of: body, n"):
        load(tmp_path / "one")
    with pytest.raises(DataError, match=r"column 'n' holds .*int64.*, not strings"):
        load(tmp_path / "one", text_column="n")


def test_python_docs_is_a_source(documentation, monkeypatch):
    monkeypatch.setattr(sources, "python_docs", lambda: documentation)
    assert load("python-docs") == documentation


def test_read_texts_reads_paths_in_the_order_given(tmp_path: Path):
    first = write(tmp_path / "z.txt", "1")
    second = write(tmp_path / "a.jsonl", rows("2", "3"))
    assert read_texts([str(first), str(second)]) == ["1", "2", "3"]
    with pytest.raises(DataError, match="no such file or folder"):
        read_texts([str(tmp_path / "nope.txt")])


def test_large_text_is_read_in_blocks(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(utf8, "_READ_BYTES", 5)
    text = "\ufeff".join(["é世\U0001f9ff", "x" * 23, "\r\n"]) * 7
    documents = load_documents(Source(source=str(write(tmp_path / "a.txt", text))))
    blocks = list(documents.blocks())
    assert "".join(block.text for block in blocks) == text
    assert [block.last for block in blocks] == [False] * (len(blocks) - 1) + [True]
    assert max(len(block.text) for block in blocks) <= 5
    for end in (b"\xf0\x9f", b"ab\xff", b"abc\0"):
        path = write(tmp_path / "bad.txt", b"0123456789ab" + end)
        at = 14 if end[-1:] in (b"\xff",) else 12 if end[0] == 0xF0 else 15
        with pytest.raises(DataError, match=f"(byte|offset) {at}"):
            load(path)


def test_overlong_json_line_is_refused(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(json_rows, "_LONGEST_LINE_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl", rows("x", "y" * (1 << 20)))
    with pytest.raises(DataError, match=r"line 2: longer than 1 MB; give so long a text as a .txt"):
        load(path)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.txt", b" \n\t\r\n", "a.txt: holds no text"),
        ("a.txt", b"ab\0c", "not a text file .zero byte at offset 2"),
        ("a.txt", b"caf\xe9 au lait", "not valid UTF-8 at byte 3"),
        ("a.txt", b"\xef\xbb\xbfok\xff", "not valid UTF-8 at byte 5"),
        ("a.txt.gz", b"plain", "a.txt.gz: cannot be read"),
        ("a.txt.gz", gzip.compress(b"cut off" * 99, mtime=0)[:-9], "a.txt.gz: cannot be read"),
        ("a.txt.xz", b"plain", "a.txt.xz: cannot be read"),
        ("a.jsonl", b"", "a.jsonl: holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl: holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl, line 2: not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n["x"]\n',
            "line 2: not an object; every line has to",
        ),
        ("a.jsonl", b'\n{"body": "x", "id": 1}\n', "line 2: no column 'text'; .* body, id"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: 'text' holds int, not a string"),
        ("a.jsonl", b'{"text": null}\n', "line 1: 'text' holds NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: 'text' holds half of a surrogate"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "not valid UTF-8 at byte 24"),
        ("a.parquet", b"PAR1 not really", "a.parquet: not a readable Parquet file"),
        ("a.csv", b"x,y\n1,2", "no column 'text'; set text_column to one of: x, y"),
        ("a.parquet.gz", b"PAR1", "a .parquet file cannot be read through .gz; unpack it"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, data: bytes, message: str):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_parquet_columns(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", None], "n": [1, 2]}), path)
    with pytest.raises(DataError, match="row 2: 'text' holds NoneType"):
        load(path)
    with pytest.raises(DataError, match="row 1: 'n' holds int"):
        load(path, text_column="n")
    with pytest.raises(DataError, match="no column 'body'; set text_column to one of: text, n"):
        load(path, text_column="body")


def test_folder_without_text(tmp_path: Path):
    write(tmp_path / "a.png", "x")
    write(tmp_path / "b", "x")
    with pytest.raises(DataError, match=r"in this folder \(left out: 2 files \(.png: 1, without"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["./nope", "/nope/x", "~/nope", "nope.txt", "a/nope.jsonl.gz", "a/b/c"]
)
def test_missing_path_is_not_taken_for_a_hub_id(monkeypatch, name: str):
    monkeypatch.setattr(sources, "_load_hub", lambda source: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file or folder"):
        load(name)


def test_missing_path_in_an_existing_folder(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="data/nope: no such file"):
        load("data/nope")


# --- the hub -------------------------------------------------------------------------------------


def hub(monkeypatch, tmp_path: Path, info: object, loaded: object = None) -> None:
    """Replaces the hub by one that answers `info` and `loaded`, raising what is an exception."""

    def answer(value: object) -> object:
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(sources.HfApi, "dataset_info", lambda *a, **k: answer(info))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: answer(loaded))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


def test_hub_dataset(monkeypatch, tmp_path: Path):
    hub(monkeypatch, tmp_path, None, Dataset.from_dict({"body": ["x", "", "y"], "n": [1, 2, 3]}))
    assert load("owner/name", text_column="body") == ["x", "y"]
    with pytest.raises(DataError, match="hub dataset 'owner/name': no column 'text'"):
        load("owner/name")


def test_hub_dataset_with_missing_values(monkeypatch, tmp_path: Path):
    hub(monkeypatch, tmp_path, None, Dataset.from_dict({"text": ["x", None]}))
    with pytest.raises(DataError, match="row 2: 'text' holds NoneType"):
        load("owner/name")


def test_offline(monkeypatch, tmp_path: Path):
    hub(monkeypatch, tmp_path, OSError("Name or service not known\nmore"))
    with pytest.raises(DataError) as caught:
        load("owner/name")
    assert str(caught.value) == (
        "cannot load hub dataset 'owner/name' (Name or service not known); check the spelling and "
        "the network, or give a local file"
    )


def test_offline_but_cached(monkeypatch, tmp_path: Path):
    hub(monkeypatch, tmp_path, OSError("no network"), Dataset.from_dict({"text": ["x"]}))
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
    monkeypatch.setattr(sources.HfApi, "dataset_info", lambda *a, **k: info)
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
    with pytest.raises(DataError, match="no column 'text'; set text_column to one of: body"):
        load("owner/name", streaming=True)


def test_streamed_text_is_checked(monkeypatch, tmp_path: Path):
    streamed(monkeypatch, tmp_path, rows("x", None))
    with pytest.raises(DataError, match="'owner/name', row 2: 'text' holds NoneType"):
        load("owner/name", streaming=True)


def test_broken_stream_says_so(monkeypatch, tmp_path: Path):
    def broken():
        yield {"text": "x"}
        raise ConnectionError("reset by peer")

    stream = datasets.IterableDataset.from_generator(broken)
    hub(monkeypatch, tmp_path, None, stream)
    with pytest.raises(DataError, match=r"the stream broke off \(.*reset by peer.*\); run the"):
        load("owner/name", streaming=True)


def test_unknown_split_or_configuration(monkeypatch, tmp_path: Path):
    hub(monkeypatch, tmp_path, None, ValueError('Unknown split "dev".\nShould be one of'))
    with pytest.raises(DataError, match=r"split 'dev', name 'v2': Unknown split \"dev\"\); check"):
        load("owner/name", split="dev", name="v2")


def test_unknown_dataset(monkeypatch, tmp_path: Path):
    class NotFound(sources.RepositoryNotFoundError):
        def __init__(self) -> None:  # the real one wants an HTTP response
            Exception.__init__(self, "404")

    hub(monkeypatch, tmp_path, NotFound())
    with pytest.raises(DataError, match="'owner/name' does not exist"):
        load("owner/name")


@pytest.mark.parametrize("name", ["text", "json", "parquet"])
def test_format_names_do_not_read_the_working_directory(monkeypatch, tmp_path: Path, name: str):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "secret")
    with pytest.raises(DataError, match="is a file format, no dataset"):
        load(name)


def test_impossible_hub_id():
    with pytest.raises(DataError, match="neither a local file nor a possible hub id"):
        load("spaces are no id")


def test_suffixes_are_all_readable(tmp_path: Path):
    kinds = {
        suffix: formats.known_kind(tmp_path / f"x{suffix.upper()}") for suffix in formats.KINDS
    }
    assert kinds == formats.KINDS
