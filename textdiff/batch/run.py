"""Generation of a file of prompts, in which interruptions leave no trace.

Rows are divided into groups by the job alone: neither by what is finished, nor by the number of
processes. An interrupted group is generated again as a whole, and only missing rows are kept, so
that every row has the same rows beside it in its network calls, and a resumed job gives what an
uninterrupted one gives down to the last rounding.
"""

from collections.abc import Callable, Sequence

from textdiff.batch.lines import OutputRow
from textdiff.batch.output import Output
from textdiff.errors import TextDiffError
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.callbacks import Callback, FinishedRow
from textdiff.sampling.request import Request

Group = list[int]
"""Rows of the output that are generated together."""


def groups(rows: Sequence[OutputRow], size: int) -> list[Group]:
    """Return the rows that can be generated, in groups of equal options, similar lengths together.

    Args:
        rows: all rows of the job.
        size: rows of a group.
    """
    alike: dict[str, Group] = {}
    for number, row in enumerate(rows):
        if row.request is not None:
            alike.setdefault(repr(row.request.config), []).append(number)
    result = [all_[at : at + size] for all_ in alike.values() for at in range(0, len(all_), size)]
    for group in result:
        group.sort(key=lambda number: _length(rows[number]))
    return sorted(result, key=min)


def _length(row: OutputRow) -> int:
    assert row.request is not None
    return int(row.request.job.lengths[0])


def fill(
    model: TextDiffusion,
    rows: Sequence[OutputRow],
    output: Output,
    *,
    batch_size: int,
    share: tuple[int, int],
    progress: Callable[[int, int], None],
) -> None:
    """Write every row that is missing and falls to this process.

    Args:
        model: generates.
        rows: all rows of the job.
        output: where they go; ready to write.
        batch_size: rows per network call.
        share: number of this process, and how many there are.
        progress: gets, with every row, how many are done and how many tokens this one has.
    """
    rank, count = share
    for number, row in list(enumerate(rows))[rank::count]:
        if row.error is not None:
            output.write(number, row.failed(row.error))
    # Rows of models in blocks leave and enter one by one, and want others that wait.
    size = batch_size * (1 if model.family.block_size is None else 4)
    for group in groups(rows, size)[rank::count]:
        if output.done.issuperset(group):
            continue
        keeper = _Keeper([rows[number] for number in group], group, output, progress)
        requests = [row.request for row in keeper.rows if row.request is not None]
        try:
            model.run(Request.joined(requests), batch_size, [keeper])
        except TextDiffError as error:  # of options, which these rows share
            for number in group:
                output.write(number, rows[number].failed(str(error)))


class _Keeper(Callback):
    """Writer of the rows of a group, as soon as they are done."""

    def __init__(
        self,
        rows: Sequence[OutputRow],
        group: Group,
        output: Output,
        progress: Callable[[int, int], None],
    ):
        self.rows, self.group = rows, group
        self.output, self.progress = output, progress

    def finished(self, row: int, result: FinishedRow) -> None:
        self.output.write(self.group[row], self.rows[row].answered(result))
        self.progress(len(self.output.done), result.new_tokens)
