"""From a `Source` of the config to documents.

Nothing is read before the documents are iterated, and only a block at a time: text files from where
they lie, `save_to_disk` folders and hub datasets from their memory-mapped tables.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)

from textdiff.data.document_stream import (
    Block,
    Documents,
    Tally,
    all_bad,
    from_texts,
    missing_column,
    no_text,
    section,
    text_of,
)
from textdiff.data.formats import is_compressed, kind_of, known_kind
from textdiff.data.paths import Files, existing, find_files, is_saved, missing
from textdiff.data.python_docs import python_docs
from textdiff.data.settings import Source
from textdiff.data.tables import column_texts
from textdiff.data.text_files import read_files
from textdiff.errors import DataError

if TYPE_CHECKING:  # it brings pandas: a second that text files and models do without
    import datasets

_HUB_TIMEOUT_SECONDS = 10.0
_HINT = "; data.on_bad_rows: skip leaves such rows out"


def load_documents(source: Source, skip_bad_rows: bool = False) -> Documents:
    """Finds one corpus.

    The first reading that fits wins: `python-docs`; an existing local file, folder or
    `save_to_disk` folder; a glob; a hub dataset.

    Args:
        source: where the text is and which part of it is wanted; `name` and `split` matter to hub
            datasets, `split` also to a saved `DatasetDict`.
        skip_bad_rows: skip rows that cannot be used, and count them, instead of refusing them.

    Returns:
        The documents, none of them empty, in the same order on every pass.

    Raises:
        DataError: the source cannot be found. What is no usable text is found by reading it.
    """
    documents = _find(source, Tally(skip_bad_rows, _HINT))
    if source.skip_documents or source.max_documents is not None:
        return section(documents, source.skip_documents, source.max_documents)
    return documents


def _find(source: Source, tally: Tally) -> Documents:
    name = source.source
    if name == "python-docs":
        return from_texts(python_docs())
    path = existing(name)
    if path is not None and path.is_dir() and is_saved(path):
        return _load_saved(path, source, tally)
    if path is not None or has_magic(name):
        return _from_files(find_files(name), source.text_column, tally)
    if name == "-":
        raise DataError(
            "a corpus is read several times, and standard input can be read once; write it to a "
            "file and name that"
        )
    if _looks_local(name):
        raise missing(name)
    return _load_hub(source, tally)


def _from_files(files: Files, text_column: str, tally: Tally) -> Documents:
    paths = files.paths
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: not a regular file, and a corpus is read several times")
    # A table is not read front to back, so its bytes say little about progress.
    tables = ("parquet", "arrow")
    plain = all(not is_compressed(path) and kind_of(path) not in tables for path in paths)
    return Documents(
        lambda: read_files(files, text_column, tally),
        _signature(paths, _reading(text_column, tally)),
        sum(path.stat().st_size for path in paths) if plain else None,
        tally,
        files.left_out,
    )


def _reading(words: str, tally: Tally) -> str:
    """How a source is read, as a part of its signature."""
    return f"{words} without bad rows" if tally.skip else words


def _signature(paths: Sequence[Path], column: str) -> str:
    """Names, sizes and times: what tells a changed file from an unchanged one without reading."""
    digest = hashlib.sha256(column.encode())
    for path in paths:
        found = path.stat()
        facts = (str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        digest.update(repr(facts).encode())
    return digest.hexdigest()


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist was meant as a path; hub ids are `name`, `owner/name`."""
    folder = os.path.dirname(name)
    return (
        name.startswith((".", "~", "/"))
        or known_kind(Path(name)) is not None
        or name.count("/") > 1
        or os.path.isabs(name)
        or bool(folder and os.path.isdir(folder))
    )


def _load_saved(path: Path, source: Source, tally: Tally) -> Documents:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes of the readers below
        raise DataError(f"{path}: not a readable save_to_disk folder ({_brief(error)})") from None
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            splits = ", ".join(map(str, saved))
            raise DataError(f"{path}: no split {source.split!r}; set split to one of: {splits}")
        saved = saved[source.split]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    signature = _signature(files, _reading(f"{source.split} {source.text_column}", tally))
    return _from_dataset(saved, str(path), source.text_column, signature, tally)


def _load_hub(source: Source, tally: Tally) -> Documents:
    import datasets

    label = f"hub dataset {source.source!r}"
    advice = "check the spelling and the network, or give a local file"
    revision = _check_hub(source.source, label, advice)
    options = {"streaming": True, "revision": revision} if source.streaming else {}
    try:
        loaded = datasets.load_dataset(source.source, source.name, split=source.split, **options)
    except Exception as error:  # the hub client has no common base for what can go wrong
        wanted = f"split {source.split!r}" + (f", name {source.name!r}" if source.name else "")
        raise DataError(f"cannot load {label} ({wanted}: {_brief(error)}); {advice}") from None
    if source.streaming:
        # The commit stands for the content; a stream has no other fingerprint.
        facts = (source.source, source.name, source.split, source.text_column, revision)
        return Documents(
            lambda: _streamed(loaded, label, source.text_column, tally),
            _reading(repr(facts), tally),
            tally=tally,
        )
    signature = _reading(f"{loaded._fingerprint} {source.text_column}", tally)
    return _from_dataset(loaded, label, source.text_column, signature, tally)


def _streamed(
    rows: "datasets.IterableDataset", where: str, column: str, tally: Tally
) -> Iterator[Block]:
    """Reads a hub dataset over the network, in its order, without keeping it."""
    tally.restart()
    try:
        yield from _documents(_streamed_texts(rows, where, column, tally), where, tally)
    except DataError:
        raise
    except Exception as error:  # the transport's errors change with the installed HTTP client
        raise DataError(
            f"{where}: the stream broke off ({_brief(error)}); run the command again"
        ) from None


def _streamed_texts(
    rows: "datasets.IterableDataset", where: str, column: str, tally: Tally
) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        try:
            text = text_of(row, where if column not in row else f"{where}, row {number}", column)
        except DataError as error:
            tally.bad_row(error)
        else:
            yield text


def _documents(texts: Iterator[str], where: str, tally: Tally) -> Iterator[Block]:
    """Yields rows as documents.

    Raises:
        DataError: all of them are blank or bad.
    """
    blank = True
    for text in texts:
        blank = blank and not text.strip()
        if text:
            yield Block(text, True)
    if blank:
        raise all_bad(where, tally) if tally.bad_rows else no_text(where)


def _check_hub(name: str, label: str, advice: str) -> str | None:
    """Asks the hub once whether the dataset exists: `load_dataset` would retry for half a minute.

    Without a network, a dataset that is in the local cache may still be loaded.

    Returns:
        The dataset's commit; None without a network.
    """
    import datasets

    # A bare "text" or "json" means "whatever lies in the working directory" to load_dataset.
    if name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        raise DataError(f"{name!r} is a file format, no dataset; give a path such as data/*.jsonl")
    try:
        return getattr(HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_SECONDS), "sha", None)
    except GatedRepoError:
        raise DataError(f"{label} asks for an accepted licence and a login first") from None
    except RepositoryNotFoundError:
        raise DataError(f"{label} does not exist (or is private); {advice}") from None
    except HFValidationError:
        raise DataError(
            f"{name!r} is neither a local file nor a possible hub id; {advice}"
        ) from None
    except Exception as error:  # the transport's errors change with the installed HTTP client
        cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
        if not cached.exists():
            raise DataError(f"cannot load {label} ({_brief(error)}); {advice}") from None
    return None


def _from_dataset(
    dataset: "datasets.Dataset", where: str, column: str, signature: str, tally: Tally
) -> Documents:
    if column not in dataset.column_names:
        raise missing_column(where, column, dataset.column_names)
    kind = dataset.features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise DataError(f"{where}: column {column!r} holds {kind}, not strings")
    table = dataset.select_columns([column]).with_format("arrow")

    def read() -> Iterator[Block]:
        tally.restart()
        columns = (batch.column(column) for batch in table.iter(batch_size=256))
        yield from _documents(column_texts(columns, where, column, tally), where, tally)

    return Documents(read, signature, tally=tally)


def _brief(error: Exception) -> str:
    """The first line of a library's error, short enough for a sentence."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".:") if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
