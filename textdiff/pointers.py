"""Pointers that git-lfs leaves where a repository was cloned without its large files."""

from pathlib import Path

from textdiff.errors import TextDiffError

_START = b"version https://git-lfs.github.com/spec/"
_LARGEST = 1024  # bytes of a pointer, by its specification


def refuse_pointers(folder: Path, error: type[TextDiffError]) -> None:
    """Stop where a folder holds pointers instead of files.

    Args:
        folder: of a model or a tokenizer.
        error: what is raised.

    Raises:
        TextDiffError: of that kind, with the first pointer.
    """
    for path in sorted(folder.iterdir()):
        refuse_pointer(path, error)


def refuse_pointer(path: Path, error: type[TextDiffError]) -> None:
    """Stop where a file is a pointer; pipes and what does not exist are left alone.

    Args:
        path: the file.
        error: what is raised.

    Raises:
        TextDiffError: of that kind.
    """
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return
    with path.open("rb") as file:
        pointer = file.read(len(_START)) == _START
    if pointer:
        raise error(
            f"{path} is a git-lfs pointer, not the file itself; fetch the files with `git lfs "
            f"pull` in {path.parent}, or download them another way"
        )
