"""From a `Source` of the config to documents.

Nothing is read before the documents are iterated, and only a block at a time: text files from where
they lie, `save_to_disk` folders and hub datasets from their memory-mapped tables.
"""

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)

from textdiff.config import Source
from textdiff.data.documents import Block, Documents, from_texts, section
from textdiff.data.files import (
    SUFFIXES,
    checked_text,
    is_text_file,
    missing_column,
    no_text,
    read_file,
    text_files,
)
from textdiff.data.python_docs import python_docs
from textdiff.errors import DataError

if TYPE_CHECKING:  # it brings pandas: a second that text files and models do without
    import datasets

_HUB_TIMEOUT_SECONDS = 10.0


def load_documents(source: Source) -> Documents:
    """Finds one corpus.

    The first reading that fits wins: `python-docs`; an existing local file, folder or
    `save_to_disk` folder; a glob; a hub dataset.

    Args:
        source: where the text is and which part of it is wanted; `name` and `split` matter to hub
            datasets, `split` also to a saved `DatasetDict`.

    Returns:
        The documents, none of them empty, in the same order on every pass.

    Raises:
        DataError: the source cannot be found. What is no usable text is found by reading it.
    """
    documents = _find(source)
    if source.skip_documents or source.max_documents is not None:
        return section(documents, source.skip_documents, source.max_documents)
    return documents


def _find(source: Source) -> Documents:
    name = source.source
    path = Path(name).expanduser()
    if name == "python-docs":
        return from_texts(python_docs())
    if path.exists():
        if path.is_dir() and _is_saved(path):
            return _load_saved(path, source)
        return _from_files(text_files(path), source.text_column)
    if any(character in name for character in "*?["):
        return _from_files(_matching(str(path)), source.text_column)
    if _looks_local(name):
        raise DataError(f"{name}: no such file or folder; check the path")
    return _load_hub(source)


def _from_files(paths: list[Path], text_column: str) -> Documents:
    def read() -> Iterator[Block]:
        for path in paths:
            yield from read_file(path, text_column)

    # A Parquet file is not read front to back, so its bytes say little about progress.
    plain = all(path.name.lower().endswith((".txt", ".jsonl")) for path in paths)
    size = sum(path.stat().st_size for path in paths) if plain else None
    return Documents(read, _signature(paths, text_column), size)


def _signature(paths: list[Path], column: str) -> str:
    """Names, sizes and times: what tells a changed file from an unchanged one without reading."""
    digest = hashlib.sha256(column.encode())
    for path in paths:
        found = path.stat()
        facts = (str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        digest.update(repr(facts).encode())
    return digest.hexdigest()


def _matching(pattern: str) -> list[Path]:
    paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in paths if path.is_file() and is_text_file(path)]
    if not files:
        known = ", ".join(SUFFIXES)
        raise DataError(f"{pattern}: no text file matches this pattern; textdiff reads {known}")
    return files


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist was meant as a path; hub ids are `name`, `owner/name`."""
    folder = os.path.dirname(name)
    return (
        name.startswith((".", "~", "/"))
        or is_text_file(Path(name))
        or name.count("/") > 1
        or os.path.isabs(name)
        or bool(folder and os.path.isdir(folder))
    )


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_saved(path: Path, source: Source) -> Documents:
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
    signature = _signature(files, f"{source.split} {source.text_column}")
    return _from_dataset(saved, str(path), source.text_column, signature)


def _load_hub(source: Source) -> Documents:
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
        return Documents(lambda: _streamed(loaded, label, source.text_column), repr(facts))
    signature = f"{loaded._fingerprint} {source.text_column}"
    return _from_dataset(loaded, label, source.text_column, signature)


def _streamed(rows: "datasets.IterableDataset", where: str, column: str) -> Iterator[Block]:
    """Reads a hub dataset over the network, in its order, without keeping it."""
    blank = True
    try:
        for number, row in enumerate(rows, start=1):
            if column not in row:
                raise missing_column(where, column, row)
            text = checked_text(row[column], f"{where}, row {number}", column)
            blank = blank and not text.strip()
            if text:
                yield Block(text, True)
    except DataError:
        raise
    except Exception as error:  # the transport's errors change with the installed HTTP client
        raise DataError(
            f"{where}: the stream broke off ({_brief(error)}); run the command again"
        ) from None
    if blank:
        raise no_text(where)


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
    dataset: "datasets.Dataset", where: str, column: str, signature: str
) -> Documents:
    if column not in dataset.column_names:
        raise missing_column(where, column, dataset.column_names)
    kind = dataset.features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise DataError(f"{where}: column {column!r} holds {kind}, not strings")
    table = dataset.select_columns([column]).with_format("arrow")
    return Documents(lambda: _rows(table, where, column), signature)


def _rows(dataset: "datasets.Dataset", where: str, column: str) -> Iterator[Block]:
    row = 0
    blank = True
    for batch in dataset.iter(batch_size=256):
        values: pa.ChunkedArray = batch.column(column)
        if values.null_count:
            first = row + pc.index(pc.is_null(values), True).as_py()
            raise DataError(f"{where}, row {first + 1}: {column!r} holds nothing, not a string")
        for text in values.to_pylist():
            blank = blank and not text.strip()
            if text:
                yield Block(text, True)
        row += len(values)
    if blank:
        raise no_text(where)


def _brief(error: Exception) -> str:
    """The first line of a library's error, short enough for a sentence."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".:") if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
