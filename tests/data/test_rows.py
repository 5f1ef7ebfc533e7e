"""Rows of every kind of file, good and bad."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refused

from textdiff.data import json_rows
from textdiff.data.corpus import prepare_corpus
from textdiff.data.document_stream import iterate_texts
from textdiff.data.paths import find_files
from textdiff.data.sections import ByteTokenizer, DataConfig, Source
from textdiff.data.sources import load_documents
from textdiff.data.text_files import iterate_documents, read_texts
from textdiff.errors import DataError

TEXTS = ["plain", 'with "quotes", commas\tand tabs', "several\r\nlines\n", " é世\U0001f9ff ", "NA"]
HUGE = "9" * 5000


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["n", "text"], *([str(n), text] for n, text in enumerate(TEXTS))])
    return file.getvalue().encode()


def arrow(new) -> bytes:
    table = pa.table({"n": range(len(TEXTS)), "text": TEXTS})
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def through(codec: str, data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


ROWS = [{"n": n, "text": text} for n, text in enumerate(TEXTS)]
FILES = {
    "a.jsonl": lines(*ROWS),
    "a.ndjson": lines(*ROWS),
    "lines.json": lines(*ROWS),
    "list.json": json.dumps(ROWS, indent=2).encode(),
    "tight.json": json.dumps(ROWS, separators=(",", ":")).encode(),
    "several-lines.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "a.csv": separated(","),
    "a.tsv": separated("\t"),
    "marked.csv": b"\xef\xbb\xbf" + separated(","),
    "file.arrow": arrow(pa.ipc.new_file),
    "stream.arrow": arrow(pa.ipc.new_stream),
    "a.jsonl.gz": gzip.compress(lines(*ROWS)),
    "a.csv.bz2": bz2.compress(separated(",")),
    "a.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    "a.jsonl.zst": through("zstd", lines(*ROWS)),
    "two-frames.jsonl.zst": through("zstd", lines(*ROWS[:2])) + through("zstd", lines(*ROWS[2:])),
    "a.tsv.lz4": through("lz4", separated("\t")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_gives_the_same_texts(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert read_texts([str(tmp_path / name)]) == TEXTS
    assert read_texts([str(tmp_path)]) == TEXTS
    assert list(iterate_texts(load_documents(Source(source=str(tmp_path / name))))) == TEXTS


@pytest.mark.parametrize("name", ["lines.json", "list.json", "several-lines.json", "a.csv"])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_kinds_that_are_read_in_blocks(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr("textdiff.data.formats._READ_BYTES", size)
    (tmp_path / name).write_bytes(FILES[name])
    assert read_texts([str(tmp_path / name)]) == TEXTS


def test_long_field_of_a_table_is_read(tmp_path):
    text = "x" * 200_000  # more than the csv module takes by itself
    (tmp_path / "a.csv").write_text(f'text\n"{text}"\n')
    assert read_texts([str(tmp_path / "a.csv")]) == [text]


@pytest.mark.parametrize(
    ("name", "data", "code", "place"),
    [
        ("a.csv", b"", "no_text", ""),
        ("a.csv", b"text\n", "no_text", ""),
        ("a.csv", b"body,n\nx,1\n", "no_column", "one of: body, n"),
        ("a.csv", b"text,n\nx\n", "field_count", "row 1"),
        ("a.csv", b'text\n"x', "not_csv", "row 1"),
        ("a.csv", b'text\n"x"y\n', "not_csv", "row 1"),
        ("a.csv", b"text\nx\0\n", "zero_byte", "offset 6"),
        ("a.csv", b"text\nx\xff\n", "not_utf8", "byte 6"),
        ("a.json", b"[", "not_json", "the list does not end"),
        ("a.json", b'[{"text": "x"},', "not_json", "row 2"),
        ("a.json", b'[{"text": "x"},]', "not_json", "row 2"),
        ("a.json", b'[{"text": "x"} {"text": "y"}]', "not_json", ""),
        ("a.json", b'[{"text": "x"}] more', "not_json", "more follows after the list"),
        ("a.json", b'{"text": "x"}}', "not_json", "row 2"),
        ("a.json", b"[" * 100_000, "not_json", ""),
        ("a.json", b'"text"', "not_object", "row 1"),
        ("a.json", b'{"text": ["x", "y"]}', "no_string", "row 1: 'text' holds list"),
        ("a.arrow", b"no arrow at all", "unreadable", ""),
        ("a.txt.zst", through("zstd", b"cut off" * 999)[:-9], "unreadable", ""),
        ("a.txt.bz2", b"plain", "unreadable", ""),
        ("a.txt.lz4", b"plain", "unreadable", ""),
        ("a.jsonl", f'{{"text": {HUGE}}}'.encode(), "no_string", "line 1: 'text' holds"),
        ("a.jsonl", b'{"text": "x"', "not_json", "line 1"),
    ],
)
def test_bad_file_is_one_sentence(tmp_path, name, data, code, place):
    (tmp_path / name).write_bytes(data)
    with refused(DataError, code, place) as caught:
        read_texts([str(tmp_path / name)])
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    "suffix", ["txt", "md", "py", "jsonl", "json", "csv", "parquet", "arrow", "txt.gz", "jsonl.zst"]
)
def test_git_lfs_pointer_is_not_a_text(tmp_path, suffix):
    path = tmp_path / f"texts.{suffix}"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 9\n")
    (tmp_path / "other.txt").write_text("a real text")
    for names in ([str(path)], *([[str(tmp_path)]] if suffix != "py" else [])):
        with pytest.raises(DataError, match=f"texts.{suffix} is a git-lfs pointer"):
            read_texts(names)


def test_text_about_git_lfs_is_a_text(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1 " + 1000 * "is what pointers begin with "
    (tmp_path / "notes.txt").write_text(text)
    assert read_texts([str(tmp_path / "notes.txt")]) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_integer_that_nobody_reads_may_have_any_length(tmp_path, name):
    (tmp_path / name).write_text(f'{{"id": {HUGE}, "text": "x"}}\n{{"id": -{HUGE}, "text": "y"}}\n')
    assert read_texts([str(tmp_path / name)]) == ["x", "y"]


# --- bad rows ------------------------------------------------------------------------------------

BAD_LINES = {
    "invalid JSON": b'{"text": \n',
    "no object": b"[1]\n",
    "no column": b'{"body": "x"}\n',
    "null": b'{"text": null}\n',
    "a number": b'{"text": 3}\n',
    "a huge integer": f'{{"text": {HUGE}}}\n'.encode(),
    "half a surrogate pair": b'{"text": "\\ud800"}\n',
    "invalid UTF-8": b'{"text": "\xff"}\n',
    "a zero byte": b'{"text": "\0"}\n',
    "deep": b"[" * 100_000 + b"\n",
    "too long": b'{"text": "' + b"x" * 3000 + b'"}\n',
}


@pytest.mark.parametrize("why", BAD_LINES)
def test_bad_lines_are_skipped_on_request(tmp_path, why, monkeypatch):
    if why == "too long":
        monkeypatch.setattr(json_rows, "_LONGEST_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    good = lines({"text": "one"}), lines({"text": "two"})
    path.write_bytes(good[0] + BAD_LINES[why] + good[1] + BAD_LINES[why])
    source = Source(source=str(path))
    with pytest.raises(DataError) as caught:
        list(iterate_texts(load_documents(source)))
    documents = load_documents(source, skip_bad_rows=True)
    for _ in range(2):  # every pass counts anew
        assert list(iterate_texts(documents)) == ["one", "two"]
        assert documents.omissions.bad_rows == 2
        assert f"{documents.omissions.first_bad_row}; data.on_bad_rows: skip" in str(caught.value)
    assert documents.signature != load_documents(source).signature


def test_bad_rows_of_tables_are_skipped_on_request(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\nx,1\ny\nz,1,2\n"q"r,1\nw,1\n')
    pq.write_table(pa.table({"text": ["v", None, "u"]}), tmp_path / "b.parquet")
    bad = pa.StringArray.from_buffers(3, *pa.array([b"t", b"\xff", b"s"]).buffers()[1:])
    pq.write_table(pa.table({"text": bad}), tmp_path / "c.parquet")
    documents = load_documents(Source(source=str(tmp_path)), skip_bad_rows=True)
    assert list(iterate_texts(documents)) == ["x", "w", "v", "u", "t", "s"]
    assert documents.omissions.bad_rows == 5
    for name, code in (
        ("a.csv", "field_count"),
        ("b.parquet", "no_string"),
        ("c.parquet", "no_string"),
    ):
        with refused(DataError, code, "row 2"):
            list(load_documents(Source(source=str(tmp_path / name))).blocks())


def test_bad_rows_of_a_saved_dataset(tmp_path):
    import datasets

    saved = datasets.Dataset.from_dict({"text": ["x", None, "y"]})
    saved.save_to_disk(tmp_path / "saved")
    source = Source(source=str(tmp_path / "saved"))
    documents = load_documents(source, skip_bad_rows=True)
    assert list(iterate_texts(documents)) == ["x", "y"]
    assert documents.omissions.bad_rows == 1
    with refused(DataError, "no_string", "row 2"):
        list(load_documents(source).blocks())


def test_nothing_but_bad_rows_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD_LINES["null"] * 3)
    with refused(DataError, "bad_rows", "3 bad rows", "line 1"):
        list(load_documents(Source(source=str(path)), skip_bad_rows=True).blocks())


def config(tmp_path: Path, **keys: object) -> DataConfig:
    source = Source(source=str(tmp_path / "a.jsonl"))
    places = {"cache_dir": str(tmp_path / "cache"), "sequence_length": 16}
    return DataConfig(sources=(source,), validation=0.2, **places, **keys)


def test_corpus_says_what_was_skipped_also_from_the_cache(tmp_path):
    good = [{"text": f"row {n} has a text of its own"} for n in range(20)]
    (tmp_path / "a.jsonl").write_bytes(lines(*good))
    whole = prepare_corpus(config(tmp_path), ByteTokenizer(), seed=0)
    assert whole.notes == []
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"oops\n" + lines(*good) + b'{"text": 1}\n')
    with refused(DataError, "not_json", "line 1"):
        prepare_corpus(config(tmp_path), ByteTokenizer(), seed=0)
    for found in (False, True):
        corpus = prepare_corpus(config(tmp_path, on_bad_rows="skip"), ByteTokenizer(), seed=0)
        assert corpus.cached == found
        assert corpus.omissions[0].bad_rows == 2
        (note,) = corpus.notes
        assert note.startswith(f"{path}: skipped 2 bad rows, the first one: {path}, line 1: not")
        assert corpus.record["sources"][0]["documents"] == 20
        assert corpus.record["sources"][0]["sha256"] == whole.record["sources"][0]["sha256"]
    facts = (tmp_path / "cache" / "textdiff").glob("prepared-*/facts.json")
    kept = [json.loads(path.read_text())["omissions"][0]["bad_rows"] for path in facts]
    assert sorted(kept) == [0, 2]
    with refused(DataError, "not_json", "line 1"):  # a cached part is not taken for all
        prepare_corpus(config(tmp_path), ByteTokenizer(), seed=0)


# --- no more than is wanted ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "b.parquet", "a.ndjson"])
def test_later_rows_and_files_are_not_touched(tmp_path, name, monkeypatch):
    monkeypatch.setattr("textdiff.data.formats._READ_BYTES", 16)
    data = {
        "a.jsonl": lines(*ROWS) + b"\xff",
        "a.json": json.dumps(ROWS).encode() + b"\xff",
        "a.csv": separated(",") + b"\xff",
        "a.ndjson": lines(*ROWS) + b"{",
    }
    if name in data:
        (tmp_path / name).write_bytes(data[name])
    else:
        pq.write_table(pa.table({"text": [TEXTS[0], None]}), tmp_path / name)
    (tmp_path / "c.txt").write_bytes(b"\xff\0")
    (tmp_path / "d.json").write_bytes(b"[")
    for where in (tmp_path / name, tmp_path, tmp_path / "*"):
        documents = iterate_documents([find_files(str(where))], "text")
        assert next(documents) == TEXTS[0]
        source = Source(source=str(where), max_documents=1)
        assert list(iterate_texts(load_documents(source))) == TEXTS[:1]
        with pytest.raises(DataError):
            list(documents)
