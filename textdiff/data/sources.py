"""From a `Source` of the config to documents: a dataset with the one column `text`.

Local files are held in memory as Arrow strings; `save_to_disk` folders and hub datasets stay
memory-mapped, which is the way to train on a corpus larger than memory.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)

from textdiff.config import Source
from textdiff.data.files import (
    SUFFIXES,
    is_text_file,
    missing_column,
    read_file,
    read_path,
)
from textdiff.data.python_docs import python_docs
from textdiff.errors import DataError

_CHUNK_CHARACTERS = 16_000_000
_HUB_TIMEOUT_SECONDS = 10.0


def load_documents(source: Source) -> Dataset:
    """Loads one corpus.

    The first reading that fits wins: `python-docs`; an existing local file, folder or
    `save_to_disk` folder; a glob; a hub dataset.

    Args:
        source: where the text is; `name` and `split` matter to hub datasets, `split` also to a
            saved `DatasetDict`.

    Returns:
        A dataset with the one column `text` (string or large_string), one row per document, none
        of them empty, in the same order on every call.

    Raises:
        DataError: the source cannot be found or holds something that is no text.
    """
    name = source.source
    path = Path(name).expanduser()
    if name == "python-docs":
        return from_texts(python_docs())
    if path.exists():
        if path.is_dir() and _is_saved(path):
            return _load_saved(path, source)
        return from_texts(read_path(path, source.text_column))
    if any(character in name for character in "*?["):
        return from_texts(_read_glob(str(path), source.text_column))
    if _looks_local(name):
        raise DataError(f"{name}: no such file or folder; check the path")
    return _load_hub(source)


def from_texts(texts: Iterable[str]) -> Dataset:
    """Builds an in-memory dataset with the column `text`, a bounded number of strings at a time."""
    chunks: list[pa.Array] = []
    pending: list[str] = []
    size = 0
    for text in texts:
        pending.append(text)
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            chunks.append(pa.array(pending, pa.large_string()))
            pending, size = [], 0
    chunks.append(pa.array(pending, pa.large_string()))
    column = pa.chunked_array(chunks, pa.large_string())
    return Dataset(datasets.table.InMemoryTable(pa.table({"text": column})))


def iterate_texts(documents: Dataset) -> Iterator[str]:
    """Yields the column `text` row by row, a few hundred rows in memory at a time."""
    for batch in documents.iter(batch_size=256):
        yield from batch["text"]


def _read_glob(pattern: str, text_column: str) -> Iterator[str]:
    paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in paths if path.is_file() and is_text_file(path)]
    if not files:
        known = ", ".join(SUFFIXES)
        raise DataError(f"{pattern}: no text file matches this pattern; textdiff reads {known}")
    for path in files:
        yield from read_file(path, text_column)


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


def _load_saved(path: Path, source: Source) -> Dataset:
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes of the readers below
        raise DataError(f"{path}: not a readable save_to_disk folder ({_brief(error)})") from None
    if isinstance(saved, DatasetDict):
        if source.split not in saved:
            splits = ", ".join(map(str, saved))
            raise DataError(f"{path}: no split {source.split!r}; set split to one of: {splits}")
        saved = saved[source.split]
    return _text_column(saved, str(path), source.text_column)


def _load_hub(source: Source) -> Dataset:
    label = f"hub dataset {source.source!r}"
    advice = "check the spelling and the network, or give a local file"
    _check_hub(source.source, label, advice)
    try:
        loaded = datasets.load_dataset(source.source, source.name, split=source.split)
    except Exception as error:  # the hub client has no common base for what can go wrong
        wanted = f"split {source.split!r}" + (f", name {source.name!r}" if source.name else "")
        raise DataError(f"cannot load {label} ({wanted}: {_brief(error)}); {advice}") from None
    return _text_column(loaded, label, source.text_column)


def _check_hub(name: str, label: str, advice: str) -> None:
    """Asks the hub once whether the dataset exists: `load_dataset` would retry for half a minute.

    Without a network, a dataset that is in the local cache may still be loaded.
    """
    # A bare "text" or "json" means "whatever lies in the working directory" to load_dataset.
    if name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        raise DataError(f"{name!r} is a file format, no dataset; give a path such as data/*.jsonl")
    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_SECONDS)
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


def _text_column(dataset: Dataset, where: str, column: str) -> Dataset:
    if column not in dataset.column_names:
        raise missing_column(where, column, dataset.column_names)
    dataset = dataset.select_columns([column])
    if column != "text":
        dataset = dataset.rename_column(column, "text")
    kind = dataset.features["text"]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise DataError(f"{where}: column {column!r} holds {kind}, not strings")
    return _without_empty(dataset, where, column)


def _without_empty(dataset: Dataset, where: str, column: str) -> Dataset:
    kept: list[int] = []
    row = 0
    blank = True
    for batch in dataset.with_format("arrow").iter(batch_size=1024):
        values = batch.column("text")
        if values.null_count:
            first = row + pc.index(pc.is_null(values), True).as_py()
            raise DataError(f"{where}, row {first + 1}: {column!r} holds nothing, not a string")
        filled = pc.greater(pc.binary_length(values), 0).to_pylist()
        kept.extend(row + index for index, full in enumerate(filled) if full)
        blank = blank and not any(text.strip() for text in values.to_pylist())
        row += len(filled)
    if blank:
        raise DataError(f"{where}: holds no text (it is empty or only white space)")
    return dataset if len(kept) == row else dataset.select(kept)


def _brief(error: Exception) -> str:
    """The first line of a library's error, short enough for a sentence."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".:") if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
