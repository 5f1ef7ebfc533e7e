"""Lines of a file of prompts, as rows to generate.

Each line is a JSON object: `prompt` or `template`, any option of a generation under its name, and
keys of the user's own, which come back in the output. What a row becomes depends on its line alone:
on its own `seed` if it has one, else on the job's seed and its number. `null` is as if the key were
not there.
"""

import codecs
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from textdiff.data.plain_data import parse_json
from textdiff.errors import DataError, TextDiffError
from textdiff.generation import Order, SampleDefaults
from textdiff.pipeline import TextDiffusion
from textdiff.sampling import Cache
from textdiff.template import HOLE
from textdiff.watching import FinishedRow

WRITTEN = (
    "line", "sample", "text", "completion", "holes", "new_tokens", "prompt_lost", "error",
)  # fmt: skip
"""Keys of the output that are not the user's."""

OF_THE_JOB = ("batch_size", "block_size", "device", "dtype", "watch", "film", "trace")
"""Options of the command line that a line cannot have: its key of such a name is the user's own."""

MOST_SAMPLES = 1_000_000

CACHES: dict[Any, Cache | None] = {"auto": None, "on": True, "off": False}
"""Names of caches on the command line; others stand for themselves."""


@dataclass(frozen=True)
class Request:
    """One row of the output.

    Attributes:
        line: number of its line, from 1.
        sample: which of the texts of that line it is, from 0.
        record: the line's keys and values.
        order: the row to generate; None if the line cannot be used.
        error: why.
        cache: whether to keep keys and values; see `TextDiffusion.generate`.
    """

    line: int
    sample: int
    record: Mapping[str, Any]
    order: Order | None = None
    error: str | None = None
    cache: Cache | None = None

    def failed(self, error: str) -> str:
        """The line of the output that says why there is no text."""
        sample = {} if self.order is None else {"sample": self.sample}
        return _dump({"line": self.line, **sample, "error": error})

    def answered(self, row: FinishedRow) -> str:
        """The line of the output with the text; holes are listed where there are several.

        What the model does not see of the prompt as it is written is said in `prompt_lost`.
        """
        found: dict[str, Any] = {"text": row.text, "completion": row.completion}
        if row.holes != [row.completion]:
            found["holes"] = row.holes
        found["new_tokens"] = row.new_tokens
        if self.order is not None and self.order.lost:
            found["prompt_lost"] = list(self.order.lost)
        return _dump({"line": self.line, "sample": self.sample, **self.record, **found})


def _dump(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True)
class LineDefaults:
    """What holds for lines that say nothing else.

    Attributes:
        num_samples: rows per line.
        seed: seed of lines without their own.
        cache: see `TextDiffusion.generate`.
        options: of `TextDiffusion.order`.
        read_template: reads a file that holds a text with holes; takes prompt and suffix as well.
    """

    num_samples: int
    seed: int
    cache: Cache | None
    options: Mapping[str, Any]
    read_template: Callable[[str, str, str], str]

    def first_row(self, line: int, sample: int, own_seed: bool) -> int:
        """Return the index of a row, which its random numbers depend on, besides the seed.

        No two rows of a job share one, and it does not depend on the other lines: samples that a
        line has beyond the job's number are counted where no line's other rows are.
        """
        if own_seed:
            return sample
        if sample < self.num_samples:
            return (line - 1) * self.num_samples + sample
        return (sample - self.num_samples + 1 << 32) + line - 1


def read_requests(
    model: TextDiffusion, content: bytes, name: str, job: LineDefaults
) -> list[Request]:
    """Read the rows that a file asks for, in its order; blank lines are none.

    Args:
        model: tokenises prompts and decides which options fit it.
        content: JSON lines.
        name: what to call them.
        job: what holds for lines that say nothing else.

    Raises:
        DataError: there is no line.
    """
    requests: list[Request] = []
    for number, words in _lines(content):
        try:
            record = _record(words)
        except DataError as error:
            requests.append(Request(number, 0, {}, error=str(error)))
            continue
        try:
            requests += _rows(model, number, record, job)
        except TextDiffError as error:
            requests.append(Request(number, 0, record, error=str(error)))
    if not requests:
        raise DataError(f"{name} has no line; write one JSON object a line, with a prompt")
    return requests


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
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
        record = parse_json(words.decode())
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
    model: TextDiffusion, number: int, record: dict[str, Any], job: LineDefaults
) -> list[Request]:
    """Return the rows of one line, each an order of its own.

    Raises:
        TextDiffError: a value of a wrong kind or out of range, or a prompt that cannot be used.
    """
    types = option_types()
    checked = {
        key: _checked(key, value, types[key]) for key, value in record.items() if key in types
    }
    given = {key: value for key, value in checked.items() if value is not None}
    prompt = _prompt(given, job)
    if "rule" in given:  # another rule has other knobs
        given.setdefault("knobs", {})
    own, cache = given.pop("seed", None), given.pop("cache", job.cache)
    samples = given.pop("num_samples", job.num_samples)
    if not 1 <= samples <= MOST_SAMPLES:
        raise DataError(f"num_samples {samples}: give 1 to {MOST_SAMPLES}")
    return [
        Request(
            number,
            sample,
            record,
            model.order(
                prompt,
                first_row=job.first_row(number, sample, own is not None),
                seed=job.seed if own is None else own,
                **{**job.options, **given},
            ),
            cache=CACHES.get(cache, cache),
        )
        for sample in range(samples)
    ]


def _prompt(given: dict[str, Any], job: LineDefaults) -> str:
    """Take what is fixed of a line's text out of its options.

    Raises:
        TextDiffError: there is none, or a template that cannot be used.
    """
    prompt, template = given.pop("prompt", None), given.pop("template", None)
    if template is None:
        if prompt is None:
            raise DataError("no key 'prompt'")
        return str(prompt)
    if HOLE.search(template):  # the text itself
        if prompt or given.get("suffix"):
            raise DataError("a template holds the whole text: leave prompt and suffix out")
        return str(template)
    return job.read_template(template, prompt or "", given.get("suffix", ""))


def option_types() -> dict[str, Any]:
    """Return what a line may say, with the type of its value."""
    hints = get_type_hints(SampleDefaults)
    types = {field.name: hints[field.name] for field in fields(SampleDefaults)}
    types["steps"] = types["max_denoising_steps"]
    strings = dict.fromkeys(("stop", "ban", "force"), str | list[str])
    texts = dict.fromkeys(("prompt", "template", "suffix"), str)
    cache = bool | Literal["auto", "on", "off", "approximate"]
    return types | strings | texts | {"seed": int, "num_samples": int, "cache": cache}


def _checked(key: str, value: Any, kind: Any) -> Any:
    try:
        adapter = TypeAdapter(kind | None, config=ConfigDict(strict=True, allow_inf_nan=False))
        return adapter.validate_python(value)
    except ValidationError as error:
        reasons = [item["msg"].removeprefix("Input should be ") for item in error.errors()]
        reason = "input should be " + " or ".join(dict.fromkeys(reasons))
        raise DataError(f"{key} {json.dumps(value)}: {reason}") from None


def template_files(requests: Sequence[Request]) -> list[Path]:
    """List the files that lines name for their texts, which the output depends on."""
    names = {request.record.get("template") for request in requests if request.error is None}
    return [Path(n).expanduser() for n in sorted(filter(None, names)) if not HOLE.search(n)]


def notes(requests: Sequence[Request]) -> list[str]:
    """Say which keys are passed through although they look like options."""
    known = list(option_types())
    keys = sorted({key for request in requests for key in request.record} - set(known))
    found = []
    for key in keys:
        name = key.lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if name in OF_THE_JOB:
            found.append(f"it is an option of the whole job, --{name.replace('_', '-')}")
        elif near:
            found.append(f"did you mean {near[0]!r}?")
        else:
            continue
        found[-1] = f"the key {key!r} is passed through to the output; {found[-1]}"
    return found
