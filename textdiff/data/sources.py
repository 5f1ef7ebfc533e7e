"""Kinds of sources: what `data.sources` of a config may name, each a class of the registry.

A kind says which names it reads and makes documents of them. To add one, register a subclass of
`SourceKind`; it is used as `source: KIND:REST`, or for the names that its `fits` claims. Nothing is
read before documents are iterated, and only a block at a time.

This module imports neither datasets nor pyarrow, so that `--help` stays quick.
"""

import hashlib
import os
import platform
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from textdiff.data.document_stream import Documents, Omissions, from_texts, section
from textdiff.data.formats import TABLES, is_saved, kind_of_file, known_kind, suffixes
from textdiff.data.paths import existing, find_files, missing
from textdiff.errors import DataError
from textdiff.registry import Registry
from textdiff.section import Section

if TYPE_CHECKING:
    from textdiff.data.sections import Source

COMPRESSED = 3
"""Bytes of text per byte of compressed files and tables, about."""

_HINT = "; data.on_bad_rows: skip leaves such rows out"


class SourceKind(Section):
    """One way to read what a source names; its docstring says in a line which names these are."""

    kind: str

    def fits(self, name: str) -> bool:
        """Return whether this kind reads a name: unless it says otherwise, `KIND:REST`."""
        return name.startswith(f"{self.kind}:") and existing(name) is None

    def load(self, source: "Source", omissions: Omissions) -> Documents:
        """Return the documents, none of them empty, in the same order on every pass.

        Args:
            source: the name, and which part of what it holds is wanted.
            omissions: of the documents; refuses rows that cannot be used, or counts them.

        Raises:
            DataError: the source cannot be found. Unusable text is found by reading it.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return what the record of a run says about the source besides its text."""
        return {}


SOURCES: Registry[SourceKind] = Registry("source")
"""Kinds of sources; the one that was registered last and fits a name reads it."""


@SOURCES.register
class HubDataset(SourceKind):
    """Dataset id of the Hugging Face hub."""

    kind: Literal["hub"] = "hub"

    def fits(self, name: str) -> bool:
        """Return true: this is the last resort."""
        return True

    def load(self, source: "Source", omissions: Omissions) -> Documents:
        """See `SourceKind`; nothing local has this name."""
        from textdiff.data.hub import load_hub

        if source.source == "-":
            raise DataError(
                "a corpus is read several times, and standard input can be read once; write it to "
                "a file and name that",
                code="standard_input",
            )
        if _looks_local(source.source):
            raise missing(source.source)
        return load_hub(source, omissions)


def _looks_local(name: str) -> bool:
    """Return whether a name was meant as a path; hub ids are `name` or `owner/name`."""
    folder = os.path.dirname(name)
    return (
        name.startswith((".", "~", "/"))
        or known_kind(Path(name)) is not None
        or name.count("/") > 1
        or os.path.isabs(name)
        or bool(folder and os.path.isdir(folder))
    )


@SOURCES.register
class TextFiles(SourceKind):
    """File of text or rows, a folder or pattern of them."""

    kind: Literal["files"] = "files"

    def fits(self, name: str) -> bool:
        """Return whether the name exists, or is a pattern."""
        return existing(name) is not None or has_magic(name)

    def load(self, source: "Source", omissions: Omissions) -> Documents:
        """See `SourceKind`."""
        from textdiff.data.text_files import read_files

        files = find_files(source.source)
        for path in files.paths:
            if not path.is_file():
                raise DataError(
                    f"{path}: not a regular file, and a corpus is read several times",
                    code="not_regular",
                )
        # A table is not read front to back, so its bytes say little about progress.
        plain = all(not suffixes(p)[1] and kind_of_file(p) not in TABLES for p in files.paths)
        size = sum(path.stat().st_size for path in files.paths)
        omissions.unread = files.left_out
        return Documents(
            lambda: read_files(files, source.text_column, omissions),
            files_signature(files.paths, source.text_column, omissions),
            size if plain else None,
            omissions,
            known_bytes=size if plain else size * COMPRESSED,
        )


@SOURCES.register
class SavedDataset(SourceKind):
    """`save_to_disk` folder."""

    kind: Literal["saved"] = "saved"

    def fits(self, name: str) -> bool:
        """Return whether the name is a folder that `datasets` wrote."""
        path = existing(name)
        return path is not None and path.is_dir() and is_saved(path)

    def load(self, source: "Source", omissions: Omissions) -> Documents:
        """See `SourceKind`; of a saved `DatasetDict`, the source's split."""
        from textdiff.data.hub import load_saved

        path = existing(source.source)
        assert path is not None
        files = sorted(file for file in path.rglob("*") if file.is_file())
        signature = files_signature(files, f"{source.split} {source.text_column}", omissions)
        return load_saved(path, source, signature, omissions)


@SOURCES.register
class PythonDocs(SourceKind):
    """`python-docs`, the documentation of this Python."""

    kind: Literal["python-docs"] = "python-docs"

    def fits(self, name: str) -> bool:
        """Return whether this very corpus is named."""
        return name == "python-docs"

    def load(self, source: "Source", omissions: Omissions) -> Documents:
        """See `SourceKind`; the text depends on the version of Python."""
        from textdiff.data.python_docs import python_docs

        return from_texts(python_docs())

    def facts(self) -> dict[str, Any]:
        """Return the version of Python, which the text depends on."""
        return {"python": platform.python_version()}


def kind_of_source(name: str) -> SourceKind:
    """Return the kind that was registered last of those that fit a name.

    Raises:
        DataError: a link that leads nowhere, or a folder that may not be searched.
    """
    newest_first = map(SOURCES.build, reversed(list(SOURCES)))
    return next(kind for kind in newest_first if kind.fits(name))


def load_documents(source: "Source", skip_bad_rows: bool = False) -> Documents:
    """Find one corpus.

    Args:
        source: the name, and which part of what it holds is wanted.
        skip_bad_rows: skip rows that cannot be used, and count them, instead of refusing them.

    Returns:
        The documents, none of them empty, in the same order on every pass.

    Raises:
        DataError: the source cannot be found. Unusable text is found by reading it.
    """
    omissions = Omissions(skip_bad_rows, _HINT)
    documents = kind_of_source(source.source).load(source, omissions)
    if source.skip_documents or source.max_documents is not None:
        return section(documents, source.skip_documents, source.max_documents)
    return documents


def files_signature(paths: Sequence[Path], words: str, omissions: Omissions) -> str:
    """Hash names, sizes and times: these tell a changed file from an unchanged one."""
    digest = hashlib.sha256(reading_signature(words, omissions).encode())
    for path in paths:
        state = path.stat()
        facts = (str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        digest.update(repr(facts).encode())
    return digest.hexdigest()


def reading_signature(words: str, omissions: Omissions) -> str:
    """Return words of a signature together with how bad rows are treated."""
    return f"{words} without bad rows" if omissions.skip else words


def known_sources() -> str:
    """Return what a source may name, as the end of a sentence."""
    lines = [(SOURCES[kind].__doc__ or kind).splitlines()[0] for kind in SOURCES]
    return "; ".join(line[0].lower() + line[1:].rstrip(".") for line in reversed(lines))
