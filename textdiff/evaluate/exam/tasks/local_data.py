"""Documents of the local tasks, read from one folder of data.

The harness passes a task's metadata, in which the folder is `data_folder`:
`lm_eval --metadata '{"data_folder": "..."}' --include_path ...` reads them for other models.
"""

import gzip
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from textdiff.errors import ConfigError, DataError

Documents = dict[str, Any]
"""Data sets by the name of their split."""

COUNTDOWN = "dream-planning/cd{numbers}_test.jsonl"
SUDOKU = "dream-planning/sudoku_4x4_{givens}.jsonl"


def lambada_passages(data_folder: str | None = None, **_: Any) -> Documents:
    """Return the passages of LAMBADA's test set."""
    path = _path(data_folder, "lambada/lambada_test.jsonl.gz")
    return _splits(test=_rows(path, gzip.decompress(path.read_bytes())))


def blimp_pairs(paradigm: str, data_folder: str | None = None, **_: Any) -> Documents:
    """Return the minimal pairs of one of BLiMP's paradigms."""
    path = _path(data_folder, "blimp/BLiMP.zip")
    with zipfile.ZipFile(path) as archive:
        rows = list(_rows(path, archive.read(f"data/{paradigm}.jsonl")))
    sides = ("sentence_good", "sentence_bad")
    return _splits(test=({side: row[side] for side in sides} for row in rows))


def gsm8k_problems(data_folder: str | None = None, **_: Any) -> Documents:
    """Return the word problems of GSM8K."""
    paths = {split: _path(data_folder, f"gsm8k/{split}.jsonl.gz") for split in ("train", "test")}
    return _splits(
        **{split: _rows(path, gzip.decompress(path.read_bytes())) for split, path in paths.items()}
    )


def countdown_puzzles(numbers: int, data_folder: str | None = None, **_: Any) -> Documents:
    """Return the puzzles of Countdown with so many numbers: `numbers`, `target`, `answer`."""
    path = _path(data_folder, COUNTDOWN.format(numbers=numbers))
    pairs = [(row["input"].rpartition(","), row["output"]) for row in _rows(path)]
    return _splits(
        test=(
            {"numbers": given, "target": target, "answer": answer}
            for (given, _, target), answer in pairs
        )
    )


def sudoku_puzzles(givens: list[int], data_folder: str | None = None, **_: Any) -> Documents:
    """Return Sudokus of 4 x 4 with so many given digits: `puzzle`, `answer`; 0 is empty."""
    paths = [_path(data_folder, SUDOKU.format(givens=count)) for count in givens]
    rows = [row for path in paths for row in _rows(path)]
    return _splits(test=({"puzzle": row["input"], "answer": row["output"]} for row in rows))


def question_answer(qa_file: str | None = None, **_: Any) -> Documents:
    """Return the rows of a JSON lines file of the user's: `question`, `answer`."""
    if not qa_file:
        raise ConfigError(
            "task qa reads questions and answers from a file; name it with --qa FILE",
            code="no_qa_file",
        )
    path = Path(qa_file)
    if not path.is_file():
        raise DataError(f"--qa {qa_file}: this file does not exist", code="no_such_file")
    rows = list(_rows(path))
    for number, row in enumerate(rows, start=1):
        if not all(isinstance(row.get(key), str | int | float) for key in ("question", "answer")):
            raise DataError(
                f"{path}, line {number}: write an object with question and answer",
                code="not_question_and_answer",
            )
    return _splits(test=({k: str(row[k]) for k in ("question", "answer")} for row in rows))


def _path(folder: str | None, name: str) -> Path:
    """Return a file of the folder of data.

    Raises:
        ConfigError: no folder was named.
        DataError: it does not hold the file.
    """
    if not folder:
        raise ConfigError(
            f"local tasks read a folder that holds {name}; name it in the variable TEXTDIFF_DATA",
            code="no_data_folder",
        )
    path = Path(folder) / name
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; put the file there, or set TEXTDIFF_DATA to another folder",
            code="task_data_missing",
        )
    return path


def _rows(path: Path, content: bytes | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON lines.

    Raises:
        DataError: a line is something else.
    """
    text = (path.read_bytes() if content is None else content).decode()
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object", code="not_an_object")
        if row:
            yield row


def _splits(**splits: Iterable[dict[str, Any]]) -> Documents:
    from datasets import Dataset

    return {name: Dataset.from_list(list(rows)) for name, rows in splits.items()}
