"""Datasets of the Hugging Face hub and of `save_to_disk` folders, read by `datasets`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from textdiff.data.conversation_rows import CONVERSATIONS, row_text, wanted_columns
from textdiff.data.document_stream import Documents, Omissions, TextBlock, brief, no_text
from textdiff.data.sources import known_sources, reading_signature
from textdiff.data.table_rows import table_texts
from textdiff.errors import DataError

if TYPE_CHECKING:  # it imports pandas: a second that text files and models do without
    import datasets

    from textdiff.data.sections import Source

HUB_TIMEOUT_SECONDS = 10.0
_ADVICE = "check the spelling and the network, or give a local file"


def load_saved(path: Path, source: "Source", signature: str, omissions: Omissions) -> Documents:
    """Return the documents of a `save_to_disk` folder.

    Raises:
        DataError: it cannot be read, or has no such split or column.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes of the readers below
        raise DataError(
            f"{path}: not a readable save_to_disk folder ({brief(error)})", code="unreadable"
        ) from None
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            splits = ", ".join(map(str, saved))
            raise DataError(
                f"{path}: no split {source.split!r}; set split to one of: {splits}", code="no_split"
            )
        saved = saved[source.split]
    return _from_dataset(saved, str(path), source.text_column, signature, omissions)


def load_hub(source: "Source", omissions: Omissions) -> Documents:
    """Return the documents of a hub dataset, downloaded or streamed.

    Raises:
        DataError: it cannot be loaded, or has no such column.
    """
    import datasets

    label = f"hub dataset {source.source!r}"
    revision = _check_hub(source.source, label)
    options = {"streaming": True, "revision": revision} if source.streaming else {}
    try:
        loaded = datasets.load_dataset(source.source, source.name, split=source.split, **options)
    except Exception as error:  # the hub client has no common base for what can go wrong
        wanted = f"split {source.split!r}" + (f", name {source.name!r}" if source.name else "")
        raise DataError(
            f"cannot load {label} ({wanted}: {brief(error)}); {_ADVICE}", code="not_loaded"
        ) from None
    column = source.text_column
    if source.streaming:
        # The commit stands for the content; a stream has no other fingerprint.
        facts = (source.source, source.name, source.split, column, revision)
        return Documents(
            lambda: _streamed(loaded, label, column, omissions),
            reading_signature(repr(facts), omissions),
            omissions=omissions,
            known_bytes=_split_bytes(loaded, source.split),
        )
    signature = reading_signature(f"{loaded._fingerprint} {column}", omissions)
    return _from_dataset(loaded, label, column, signature, omissions)


def _split_bytes(rows: "datasets.IterableDataset", split: str) -> int:
    """Return the bytes of a split as the hub counts them; 0 where it does not."""
    splits = getattr(getattr(rows, "info", None), "splits", None) or {}
    return int(getattr(splits.get(split), "num_bytes", None) or 0)


def _streamed(
    rows: "datasets.IterableDataset", where: str, column: str, omissions: Omissions
) -> Iterator[TextBlock]:
    """Read a hub dataset over the network, in its order, without keeping it."""
    texts = (
        omissions.usable(row_text, row, _place(where, n, column, row), column)
        for n, row in enumerate(rows, start=1)
    )
    try:
        yield from _documents(texts, where, omissions)
    except DataError:
        raise
    except Exception as error:  # the transport's errors change with the installed HTTP client
        raise DataError(
            f"{where}: the stream broke off ({brief(error)}); run the command again",
            code="broken_stream",
        ) from None


def _place(where: str, number: int, column: str, row: object) -> str:
    """Return the place of a row; a column that is missing is missing everywhere."""
    named = column == CONVERSATIONS or (isinstance(row, dict) and column in row)
    return f"{where}, row {number}" if named else where


def _documents(texts: Iterator[str], where: str, omissions: Omissions) -> Iterator[TextBlock]:
    """Yield rows as documents.

    Raises:
        DataError: all of them are blank or bad.
    """
    omissions.restart()
    blank = True
    for text in texts:
        blank = blank and not text.strip()
        if text:
            yield TextBlock(text, True)
    if blank:
        raise no_text(where, omissions)


def _check_hub(name: str, label: str) -> str | None:
    """Ask the hub once whether the dataset exists: `load_dataset` would retry for half a minute.

    Without a network, a dataset that is in the local cache may still be loaded.

    Returns:
        The dataset's commit; None without a network.
    """
    import datasets

    # A bare "text" or "json" means "whatever is in the working directory" to load_dataset.
    if name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        raise DataError(
            f"{name!r} is a file format, not a dataset; give a path such as data/*.jsonl",
            code="format_name",
        )
    try:
        return getattr(HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS), "sha", None)
    except GatedRepoError:
        raise DataError(
            f"{label} requires an accepted licence and a login first", code="gated"
        ) from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{label} does not exist (or is private); {_ADVICE}", code="no_dataset"
        ) from None
    except HFValidationError:
        raise DataError(
            f"{name!r} is not a possible source; a source is one of: {known_sources()}",
            code="unknown_source",
        ) from None
    except Exception as error:  # the transport's errors change with the installed HTTP client
        cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
        if not cached.exists():
            raise DataError(
                f"cannot load {label} ({brief(error)}); {_ADVICE}", code="not_loaded"
            ) from None
    return None


def _from_dataset(
    dataset: "datasets.Dataset", where: str, column: str, signature: str, omissions: Omissions
) -> Documents:
    columns = wanted_columns(dataset.column_names, where, column)
    feature = None if column == CONVERSATIONS else dataset.features[column]
    if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise DataError(
            f"{where}: column {column!r} holds {feature}, not strings", code="no_string"
        )
    table = dataset.select_columns(columns).with_format("arrow")

    def read() -> Iterator[TextBlock]:
        batches = table.iter(batch_size=256)
        return _documents(table_texts(batches, where, column, omissions), where, omissions)

    return Documents(read, signature, omissions=omissions, known_bytes=dataset.data.nbytes)
