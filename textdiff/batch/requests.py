"""Lines of a file of prompts, as rows to generate.

Each line is a JSON object: `prompt`, any option of the command line under its name, and keys of the
user's own, which come back in the output. What a row becomes depends on its line alone: on its own
`seed` if it has one, else on the job's seed and its number.
"""

import codecs
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from textdiff.errors import DataError, TextDiffError
from textdiff.generation import Order, SampleDefaults
from textdiff.pipeline import TextDiffusion
from textdiff.watching import FinishedRow

WRITTEN = ("line", "sample", "text", "completion", "holes", "new_tokens", "error")
"""Keys of the output that are not the user's."""


@dataclass(frozen=True)
class Request:
    """One row of the output.

    Attributes:
        line: number of its line, from 1.
        sample: which of the texts of that line it is, from 0.
        record: the line's keys and values.
        order: the row to generate; None if the line cannot be used.
        error: why.
    """

    line: int
    sample: int
    record: Mapping[str, Any]
    order: Order | None = None
    error: str | None = None

    def failed(self, error: str) -> str:
        """The line of the output that says why there is no text."""
        sample = {} if self.order is None else {"sample": self.sample}
        return _dump({"line": self.line, **sample, "error": error})

    def answered(self, row: FinishedRow) -> str:
        """The line of the output with the text; holes are listed where there are several."""
        found: dict[str, Any] = {"text": row.text, "completion": row.completion}
        if row.holes != [row.completion]:
            found["holes"] = row.holes
        found["new_tokens"] = row.new_tokens
        return _dump({"line": self.line, "sample": self.sample, **self.record, **found})


def _dump(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_requests(
    model: TextDiffusion,
    path: Path,
    *,
    num_samples: int,
    seed: int,
    options: Mapping[str, Any],
) -> list[Request]:
    """The rows that a file asks for, in its order; blank lines are none.

    Args:
        model: tokenises prompts and knows which options fit it.
        path: a .jsonl file.
        num_samples: rows per line.
        seed: of lines without their own.
        options: of `TextDiffusion.order`, for lines that say nothing else.

    Raises:
        DataError: the file cannot be read or has no line.
    """
    requests: list[Request] = []
    for number, words in _lines(path):
        try:
            record = _record(words)
        except DataError as error:
            requests.append(Request(number, 0, {}, error=str(error)))
            continue
        try:
            requests += _rows(model, number, record, num_samples, seed, options)
        except TextDiffError as error:
            requests.append(Request(number, 0, record, error=str(error)))
    if not requests:
        raise DataError(f"{path} has no line; write one JSON object a line, with a prompt")
    return requests


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    content = content.removeprefix(codecs.BOM_UTF8)
    for number, words in enumerate(content.split(b"\n"), start=1):
        if words.strip():
            yield number, words


def _record(words: bytes) -> dict[str, Any]:
    """A line's object.

    Raises:
        DataError: it is none, has a key that the output needs itself, or cannot be written again.
    """
    try:
        record = json.loads(words.decode())
        _dump(record).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise DataError("half of a surrogate pair (\\ud800 to \\udfff) is no character") from None
    except RecursionError:
        raise DataError("not JSON that can be read: too deeply nested") from None
    except ValueError as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"not a JSON object but {type(record).__name__}: write {{...}}")
    taken = [key for key in WRITTEN if key in record]
    if taken:
        raise DataError(f"the key {taken[0]!r} is written by the output itself: rename it")
    return record


def _rows(
    model: TextDiffusion,
    number: int,
    record: dict[str, Any],
    num_samples: int,
    seed: int,
    options: Mapping[str, Any],
) -> list[Request]:
    """The rows of one line, each an order of its own.

    Raises:
        TextDiffError: a value of a wrong kind or out of range, or a prompt that cannot be used.
    """
    types = option_types()
    given = {key: _checked(key, value, types[key]) for key, value in record.items() if key in types}
    if "prompt" not in given:
        raise DataError("no key 'prompt'")
    if "rule" in given:  # another rule has other knobs
        given.setdefault("knobs", {})
    prompt, own = given.pop("prompt"), given.pop("seed", None)
    first = (number - 1) * num_samples if own is None else 0
    return [
        Request(
            number,
            sample,
            record,
            model.order(
                prompt,
                first_row=first + sample,
                seed=seed if own is None else own,
                **{**options, **given},
            ),
        )
        for sample in range(num_samples)
    ]


def option_types() -> dict[str, Any]:
    """What a line may say, with the type of its value."""
    hints = get_type_hints(SampleDefaults)
    types = {field.name: hints[field.name] for field in fields(SampleDefaults)}
    types["steps"] = types.pop("max_denoising_steps")
    strings = dict.fromkeys(("stop", "ban", "force"), str | list[str])
    return types | strings | {"prompt": str, "suffix": str, "seed": int}


def _checked(key: str, value: Any, kind: Any) -> Any:
    try:
        adapter = TypeAdapter(kind | None, config=ConfigDict(strict=True))
        return adapter.validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        reason = reason[0].lower() + reason[1:]
        raise DataError(f"{key} {json.dumps(value)}: {reason}") from None


def likely_typos(requests: Sequence[Request]) -> dict[str, str]:
    """Keys that are passed through and look like options, with what they look like."""
    known = list(option_types())
    keys = sorted({key for request in requests for key in request.record} - set(known))
    near = {key: difflib.get_close_matches(key, known, n=1, cutoff=0.8) for key in keys}
    return {key: found[0] for key, found in near.items() if found}
