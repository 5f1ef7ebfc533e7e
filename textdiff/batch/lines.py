"""Lines of a file of prompts, read as rows to generate.

Each line is a JSON object: `prompt` or `template`, any option of a generation under its name, and
keys of the user's own, which come back in the output. The text of a row depends on its line alone:
on its own `seed` if it has one, else on the job's seed and its number. A key that is `null` counts
as absent.
"""

import codecs
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from textdiff.data.plain_data import parse_json
from textdiff.errors import DataError, TextDiffError
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.callbacks import FinishedRow
from textdiff.sampling.request import Request
from textdiff.sampling.settings import SamplingConfig, refused_option
from textdiff.sampling.template import HOLE
from textdiff.section import Section, Whole

WRITTEN = (
    "line", "sample", "text", "completion", "holes", "new_tokens", "prompt_lost", "error",
)  # fmt: skip
"""Keys of the output that are not the user's."""

OF_THE_JOB = ("batch_size", "block_size", "device", "dtype", "watch", "film", "trace")
"""Options of the command line that a line cannot have: its key of such a name is the user's own."""


class LineKeys(Section):
    """Keys of a line beside the options of a generation."""

    prompt: str | None = None
    template: str | None = None
    suffix: str = ""
    seed: Whole | None = None
    num_samples: Whole | None = Field(None, ge=1, le=1_000_000)


OPTIONS = [*SamplingConfig.model_fields, "max_denoising_steps"]
"""Options of a generation that a line may have."""

KEYS = [*OPTIONS, *LineKeys.model_fields]
"""Keys that a line gives a meaning to; others are the user's own."""


@dataclass(frozen=True)
class OutputRow:
    """One row of the output.

    Attributes:
        line: number of its line, from 1.
        sample: which of the texts of that line it is, from 0.
        record: the line's keys and values.
        request: the row to generate; None if the line cannot be used.
        error: why.
    """

    line: int
    sample: int
    record: Mapping[str, Any]
    request: Request | None = None
    error: str | None = None

    @property
    def lost(self) -> list[str]:
        """Return what the model does not see of the prompt as it is written, in sentences."""
        return [] if self.request is None else list(self.request.lost)

    def failed(self, error: str) -> str:
        """Return the line of the output with an error in place of a text."""
        sample = {} if self.request is None else {"sample": self.sample}
        return _dump({"line": self.line, **sample, "error": error})

    def answered(self, row: FinishedRow) -> str:
        """Return the line of the output with the text; several holes are listed."""
        result: dict[str, Any] = {"text": row.text, "completion": row.completion}
        if row.holes != [row.completion]:
            result["holes"] = row.holes
        result["new_tokens"] = row.new_tokens
        if self.lost:
            result["prompt_lost"] = self.lost
        return _dump({"line": self.line, "sample": self.sample, **self.record, **result})


def _dump(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True)
class LineDefaults:
    """Defaults of lines.

    Attributes:
        num_samples: rows per line.
        seed: seed of lines without their own.
        options: of `TextDiffusion.prepare`.
        read_template: reads a file that holds a text with holes; takes prompt and suffix as well.
    """

    num_samples: int
    seed: int
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


def read_rows(
    model: TextDiffusion, content: bytes, name: str, job: LineDefaults
) -> list[OutputRow]:
    """Read the rows that a file asks for, in its order; blank lines are none.

    Args:
        model: tokenises prompts and decides which options fit it.
        content: JSON lines.
        name: what to call them.
        job: defaults of lines.

    Raises:
        DataError: all lines are blank.
    """
    rows: list[OutputRow] = []
    for number, words in _lines(content):
        try:
            record = _record(words)
        except DataError as error:
            rows.append(OutputRow(number, 0, {}, error=str(error)))
            continue
        try:
            rows += _rows(model, number, record, job)
        except TextDiffError as error:
            rows.append(OutputRow(number, 0, record, error=str(error)))
    if not rows:
        raise DataError(f"{name} has no lines; write one JSON object a line, with a prompt")
    return rows


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    content = content.removeprefix(codecs.BOM_UTF8)
    for number, words in enumerate(content.split(b"\n"), start=1):
        if words.strip():
            yield number, words


def _record(words: bytes) -> dict[str, Any]:
    """Return a line's object.

    Raises:
        DataError: it is not one, has a key of the output, or cannot be written again.
    """
    try:
        record = parse_json(words.decode())
        _dump(record).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise DataError("half a surrogate pair (\\ud800 to \\udfff) is not a character") from None
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
) -> list[OutputRow]:
    """Return the rows of one line, each with a request of its own.

    Raises:
        TextDiffError: a value of a wrong type or out of range, or a prompt that cannot be used.
    """
    given = {key: value for key, value in record.items() if value is not None}
    keys = _line_keys({key: given[key] for key in LineKeys.model_fields if key in given})
    options = {key: given[key] for key in OPTIONS if key in given}
    if "rule" in options:  # another rule has other knobs
        options.setdefault("knobs", {})
    if "suffix" in given:
        options["suffix"] = keys.suffix
    options = {**job.options, **options, "seed": job.seed if keys.seed is None else keys.seed}
    prompt = _prompt(keys, job)
    rows = []
    for sample in range(keys.num_samples or job.num_samples):
        first = job.first_row(number, sample, keys.seed is not None)
        request = model.prepare(prompt, first_row=first, **options)
        rows.append(OutputRow(number, sample, record, request))
    return rows


def _line_keys(given: dict[str, Any]) -> LineKeys:
    try:
        return LineKeys.model_validate(given, strict=True)
    except ValidationError as error:
        raise refused_option(error, DataError) from None


def _prompt(keys: LineKeys, job: LineDefaults) -> str:
    """Return the fixed text of a line.

    Raises:
        TextDiffError: there is none, or a template that cannot be used.
    """
    if keys.template is None:
        if keys.prompt is None:
            raise DataError("no key 'prompt'")
        return keys.prompt
    if HOLE.search(keys.template):  # the text itself
        if keys.prompt or keys.suffix:
            raise DataError("a template holds the whole text: leave prompt and suffix out")
        return keys.template
    return job.read_template(keys.template, keys.prompt or "", keys.suffix)


def template_files(rows: Sequence[OutputRow]) -> list[Path]:
    """List the files that lines name for their texts, which the output depends on."""
    names = {row.record.get("template") for row in rows if row.error is None}
    return [Path(n).expanduser() for n in sorted(filter(None, names)) if not HOLE.search(n)]


def notes(rows: Sequence[OutputRow]) -> list[str]:
    """Say which keys are passed through although they look like options."""
    sentences = []
    for key in sorted({key for row in rows for key in row.record} - set(KEYS)):
        name = key.lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.8)
        if name in OF_THE_JOB:
            hint = f"it is an option of the job, --{name.replace('_', '-')}"
        elif near:
            hint = f"did you mean {near[0]!r}?"
        else:
            continue
        sentences.append(f"the key {key!r} is passed through to the output; {hint}")
    return sentences
