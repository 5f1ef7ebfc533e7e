import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from textdiff.data import encode, packing, shards, token_stream
from textdiff.data.document_stream import Documents, TextBlock, from_texts
from textdiff.data.encode import encode_documents
from textdiff.data.packing import tokenize
from textdiff.data.sections import ByteTokenizer
from textdiff.data.sequences import PackedSequences
from textdiff.data.split import split_documents
from textdiff.data.token_stream import TokenStream
from textdiff.data.tokenizer import train_tokenizer
from textdiff.errors import DataError


def build(texts: list[str], tokenizer, folder: Path, num_proc: int = 1) -> TokenStream:
    return tokenize(from_texts(texts), tokenizer, num_proc=num_proc, cache_dir=str(folder))


def expected(tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [np.append(ids, end) for ids in encode_documents(tokenizer, texts)]
    documents = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return np.concatenate(parts), documents


@pytest.fixture
def small_tasks(monkeypatch):
    """About three documents per record batch, so that reads cross many chunks."""
    monkeypatch.setattr(encode, "_TASK_CHARACTERS", 1500)


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_stream_is_every_document_and_its_end(tokenizers, corpus, tmp_path, small_tasks, kind):
    texts = [*corpus[:20], "", *corpus[20:]]
    stream = build(texts, tokenizers[kind], tmp_path)
    tokens, documents = expected(tokenizers[kind], texts)
    assert len(stream) == len(tokens)
    assert stream.num_documents == len(texts)
    assert stream.read(0, len(stream)).dtype == np.int32
    assert np.array_equal(stream.read(0, len(stream)), tokens)
    assert np.array_equal(stream.documents(0, len(stream)), documents)


def test_without_an_end_token_empty_documents_vanish_but_keep_their_number(tmp_path, small_tasks):
    tokenizer = train_tokenizer(ByteTokenizer(), [])
    tokenizer.eos_token = None
    texts = ["", "ab", "", "", "c" * 2000, "d", ""]
    stream = build(texts, tokenizer, tmp_path)
    assert bytes(stream.read(0, len(stream)).astype(np.uint8)) == "".join(texts).encode()
    assert stream.documents(0, 3).tolist() == [1, 1, 4]
    assert stream.documents(len(stream) - 2, len(stream)).tolist() == [4, 5]
    assert stream.num_documents == 7


def test_every_window_equals_the_slice(tokenizers, corpus, tmp_path, small_tasks):
    stream = build(corpus, tokenizers["bpe"], tmp_path)
    tokens, documents = expected(tokenizers["bpe"], corpus)
    rng = np.random.default_rng(0)
    edges = [0, 1, len(stream) - 1, len(stream), *stream._starts.tolist()]
    windows = [sorted(rng.integers(0, len(stream) + 1, 2)) for _ in range(300)]
    windows += [(a, b) for a in edges for b in edges if a <= b]
    for start, stop in windows:
        assert np.array_equal(stream.read(start, stop), tokens[start:stop])
        assert np.array_equal(stream.documents(start, stop), documents[start:stop])
    for start, stop in [(-1, 2), (3, 2), (0, len(stream) + 1)]:
        with pytest.raises(IndexError):
            stream.read(start, stop)


def test_same_stream_for_every_process_count(tokenizers, corpus, tmp_path, small_tasks):
    one = build(corpus, tokenizers["bpe"], tmp_path / "one", num_proc=1)
    two = build(corpus, tokenizers["bpe"], tmp_path / "two", num_proc=2)
    assert one.folder.name == two.folder.name
    files = [(stream.folder / "tokens-00000.arrow").read_bytes() for stream in (one, two)]
    assert files[0] == files[1]


def test_same_stream_for_every_task_size(tokenizers, corpus, tmp_path, monkeypatch):
    tokens, _ = expected(tokenizers["char"], corpus)
    for size in (1, 700, 10**9):
        monkeypatch.setattr(encode, "_TASK_CHARACTERS", size)
        stream = build(corpus, tokenizers["char"], tmp_path / str(size))
        assert np.array_equal(stream.read(0, len(stream)), tokens)


def test_files_are_mapped_and_hold_two_bytes_per_token(tokenizers, corpus, tmp_path):
    stream = build(corpus, tokenizers["byte"], tmp_path)
    (view,) = stream._chunks
    assert view.dtype == np.uint16
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_cache_is_reused_and_keyed_by_content_and_tokenizer(
    tokenizers, corpus, tmp_path, monkeypatch
):
    first = build(corpus, tokenizers["bpe"], tmp_path)
    build([*corpus, "more"], tokenizers["bpe"], tmp_path)
    build(corpus[::-1], tokenizers["bpe"], tmp_path)
    build(corpus, tokenizers["byte"], tmp_path)
    assert len(os.listdir(tmp_path / "textdiff")) == 4
    monkeypatch.setattr(packing, "_build", lambda *a: pytest.fail("tokenised again"))
    again = build(list(corpus), tokenizers["bpe"], tmp_path)
    assert again.folder == first.folder
    assert np.array_equal(again.read(0, len(again)), first.read(0, len(first)))


def truncate(folder: Path) -> None:
    os.truncate(folder / "tokens-00000.arrow", 100)


def garble(folder: Path) -> None:
    path = folder / "tokens-00000.arrow"
    path.write_bytes(b"\xa5" * path.stat().st_size)


def lose_tokens(folder: Path) -> None:
    (folder / "tokens-00000.arrow").unlink()


def lose_description(folder: Path) -> None:
    (folder / "description.json").unlink()


def halve_description(folder: Path) -> None:
    path = folder / "description.json"
    path.write_text(path.read_text()[:10])


def miscount(folder: Path) -> None:
    path = folder / "description.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "documents": 3}))


@pytest.mark.parametrize(
    "damage", [truncate, garble, lose_tokens, lose_description, halve_description, miscount]
)
def test_damaged_cache_is_rebuilt(tokenizers, corpus, tmp_path, damage):
    folder = build(corpus, tokenizers["bpe"], tmp_path).folder
    damage(folder)
    assert TokenStream.open(folder) is None
    stream = build(corpus, tokenizers["bpe"], tmp_path)
    assert np.array_equal(stream.read(0, len(stream)), expected(tokenizers["bpe"], corpus)[0])
    assert os.listdir(tmp_path / "textdiff") == [folder.name]


def flip_a_bit(folder: Path, name: str = "tokens-00000.arrow") -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def test_flipped_bit_is_found_by_hash_named_and_mended(tokenizers, corpus, tmp_path, caplog):
    stream = build(corpus, tokenizers["bpe"], tmp_path)
    assert stream.damaged() == []
    flip_a_bit(stream.folder)
    assert TokenStream(stream.folder).damaged() == ["tokens-00000.arrow"]
    mended = build(corpus, tokenizers["bpe"], tmp_path)
    assert "tokens-00000.arrow is damaged and is encoded again" in caplog.text
    assert mended.damaged() == []
    assert np.array_equal(mended.read(0, len(mended)), expected(tokenizers["bpe"], corpus)[0])


@pytest.fixture
def small_shards(monkeypatch, small_tasks):
    """Two tasks, about six documents, per shard."""
    monkeypatch.setattr(encode, "_SHARD_CHARACTERS", 3000)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.stem != "checked"}


def test_only_the_damaged_shard_is_encoded_again(
    tokenizers, corpus, tmp_path, small_shards, monkeypatch
):
    folder = build(corpus, tokenizers["bpe"], tmp_path).folder
    before = contents(folder)
    assert len(before) > 5
    flip_a_bit(folder, "tokens-00002.arrow")
    encoded: list[int] = []
    original = encode._encode_task
    monkeypatch.setattr(
        encode, "_encode_task", lambda e, task: encoded.append(task.shard) or original(e, task)
    )
    build(corpus, tokenizers["bpe"], tmp_path)
    assert set(encoded) == {2}
    assert contents(folder) == before


@pytest.mark.parametrize("survived", [1, 4])
def test_interrupted_build_goes_on_to_the_same_bytes(
    tokenizers, corpus, tmp_path, small_shards, monkeypatch, survived
):
    whole = contents(build(corpus, tokenizers["bpe"], tmp_path / "whole").folder)
    original, encoded = encode._encode_task, []

    def interrupted(encoder, task):
        if task.shard > survived and len(encoded) < 1000:
            raise KeyboardInterrupt
        encoded.append(task.shard)
        return original(encoder, task)

    monkeypatch.setattr(encode, "_encode_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(corpus, tokenizers["bpe"], tmp_path / "broken")
    (partial,) = (tmp_path / "broken" / "textdiff").iterdir()
    kept = {name for name in contents(partial) if name.endswith(".arrow")}
    # The shard at hand when the interruption came is not whole, and is not kept.
    assert kept == {f"tokens-{n:05d}.arrow" for n in range(survived)}
    (partial / "tokens-00099.unfinished").write_bytes(b"what a SIGKILL leaves")
    encoded.clear()
    encoded.extend([-1] * 1000)
    stream = build(corpus, tokenizers["bpe"], tmp_path / "broken")
    assert min(encoded[1000:]) == survived
    assert contents(stream.folder) == whole


def test_later_shards_hold_more_text(tokenizers, corpus, tmp_path, monkeypatch, small_tasks):
    monkeypatch.setattr(encode, "_SHARD_CHARACTERS", 1)
    monkeypatch.setattr(encode, "SHARDS_OF_A_SIZE", 4)
    tasks = list(encode.tasks_of(from_texts(corpus).pieces()))
    assert [task.shard for task in tasks] == list(range(len(tasks)))  # a task is larger anyway
    monkeypatch.setattr(encode, "_SHARD_CHARACTERS", 1600)
    tasks = list(encode.tasks_of(from_texts(corpus).pieces()))
    sizes = np.bincount([task.shard for task in tasks])
    assert sizes[4] >= 2 * sizes[0] > 0
    # What an earlier version left of a later shard was of another size, and is not kept.
    monkeypatch.setattr(shards, "SHARDS_OF_A_SIZE", 4)
    whole = build(corpus, tokenizers["bpe"], tmp_path)
    path = whole.folder / "description.json"
    old = json.loads(path.read_text())
    del old["growing"]
    path.write_text(json.dumps(old))
    assert sorted(shards.whole_shards(whole.folder)) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [2**16, 2**16 + 1])
def test_two_bytes_hold_the_ids_of_small_vocabularies(tmp_path, size):
    pieces = [(np.array([0, size - 1], np.int32), False), (np.array([7], np.int32), True)]
    with shards.Shard(tmp_path, 0, size - 2, size) as shard:
        shard.write(pieces)
    shards.describe_shards(tmp_path, {0: shard.description()}, size - 2)
    stream = TokenStream(tmp_path)
    assert stream._chunks[0].dtype == (np.uint16 if size <= 2**16 else np.int32)
    assert stream.read(0, 4).dtype == np.int32
    assert stream.read(0, 4).tolist() == [0, size - 1, 7, size - 2]


def test_files_are_hashed_again_only_where_they_changed(
    tokenizers, corpus, tmp_path, small_shards, monkeypatch
):
    stream = build(corpus, tokenizers["bpe"], tmp_path)
    for shard in stream.shards:
        os.utime(stream.folder / shard["name"], (10**9, 10**9))
    hashed: list[str] = []
    real = token_stream.file_hash
    monkeypatch.setattr(
        token_stream, "file_hash", lambda path: hashed.append(path.name) or real(path)
    )
    build(corpus, tokenizers["bpe"], tmp_path)  # their times are new
    assert len(hashed) == len(stream.shards)
    hashed.clear()
    build(corpus, tokenizers["bpe"], tmp_path)
    assert hashed == []
    assert stream.damaged() == []  # all of them on demand
    assert len(hashed) == len(stream.shards)
    hashed.clear()
    flip_a_bit(stream.folder, "tokens-00001.arrow")
    assert stream.damaged(changed_only=True) == hashed == ["tokens-00001.arrow"]


def test_positions_beyond_two_billion_tokens():
    stream = object.__new__(TokenStream)
    many = np.broadcast_to(np.uint16(7), 3 * 2**31)  # of no memory
    stream._chunks = [many, np.arange(10, dtype=np.uint16)]
    stream._starts = np.cumsum([0, len(many), 10], dtype=np.int64)
    stream._ends = np.array([len(many) - 3, len(many) + 10])
    stream.num_documents = 2
    assert stream.read(len(many) - 2, len(many) + 3).tolist() == [7, 7, 0, 1, 2]
    assert stream.documents(len(many) - 5, len(many)).tolist() == [0, 0, 1, 1, 1]
    packed = PackedSequences(stream, 64, seed=0)
    indices = [0, 2**40, len(packed) - 1, len(packed)]
    rows = packed.rows(indices)
    assert ((rows.tokens == 7).sum(1) >= 54).all()
    for place, index in enumerate(indices):
        assert np.array_equal(packed.rows([index]).tokens[0], rows.tokens[place])
    assert packed._orders == {}  # no list of 100 million rows


def test_text_that_changed_since_the_split_is_refused_and_nothing_of_it_kept(
    tokenizers, corpus, tmp_path, small_shards
):
    texts = list(corpus)
    changing = Documents(lambda: (TextBlock(text, True) for text in texts), "changing")
    split = split_documents(changing, 0.1)
    texts[-1] = texts[-1].upper()
    with refused(DataError, "changed_source"):
        tokenize(split.train, tokenizers["bpe"], num_proc=1, cache_dir=str(tmp_path))
    assert os.listdir(tmp_path / "textdiff") == []


def test_abandoned_leftovers_are_removed(tokenizers, corpus, tmp_path):
    old, new = (tmp_path / "textdiff" / f".partial-{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    build(corpus, tokenizers["bpe"], tmp_path)
    assert not old.exists()
    assert new.exists()


def test_document_longer_than_a_task_is_one_document(tokenizers, tmp_path, small_shards):
    texts = ["short\n", "line of a long text\n" * 1000, "x" * 9000, "end"]
    packing_limit = 700  # pieces are as long as `Documents.pieces` makes them
    documents = from_texts(texts)
    documents.pieces = lambda: Documents.pieces(documents, packing_limit)
    tokenizer = tokenizers["byte"]
    stream = tokenize(documents, tokenizer, num_proc=1, cache_dir=str(tmp_path))
    assert stream.num_documents == 4
    assert len(stream.shards) > 3
    tokens, numbers = expected(tokenizer, texts)
    assert np.array_equal(stream.read(0, len(stream)), tokens)
    assert np.array_equal(stream.documents(0, len(stream)), numbers)


def test_failed_build_leaves_nothing(tokenizers, corpus, tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_record_batch", fail)
    with refused(DataError, "cache", "No space left"):
        build(corpus, tokenizers["bpe"], tmp_path)
    assert os.listdir(tmp_path / "textdiff") == []


def test_unusable_cache_folder(tokenizers, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with refused(DataError, "cache", "data.cache_dir"):
        build(corpus, tokenizers["bpe"], tmp_path / "file")


def test_racing_builds_end_with_one_good_entry(tokenizers, corpus, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(build, corpus, tokenizers["bpe"], tmp_path) for _ in range(4)]
        streams = [job.result() for job in jobs]
    tokens, _ = expected(tokenizers["bpe"], corpus)
    assert all(np.array_equal(s.read(0, len(s)), tokens) for s in streams)
    assert len(os.listdir(tmp_path / "textdiff")) == 1


def test_pickle_carries_the_path_only(tokenizers, tmp_path):
    stream = build(["word " * 50_000], tokenizers["byte"], tmp_path)
    data = pickle.dumps(stream)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).read(5, 99), stream.read(5, 99))
