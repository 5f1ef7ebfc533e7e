"""Generates what a file of prompts asks for, so that interruptions leave no trace in the result.

Rows are shared out in windows that depend on nothing but the job: neither on what is finished, nor
on how many processes there are. A window that was interrupted is generated again as a whole, and
only what is missing is kept, so that every row always has the same company in its network calls,
and a resumed job gives what an uninterrupted one gives down to the last rounding.
"""

from collections.abc import Callable, Sequence

from textdiff.batch.output import Output
from textdiff.batch.requests import OutputRow
from textdiff.errors import TextDiffError
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.callbacks import Callback, FinishedRow
from textdiff.sampling.preparation import Request

Window = list[int]
"""Rows of the output that are generated together."""


def windows(requests: Sequence[OutputRow], size: int) -> list[Window]:
    """Rows that can be generated, in windows of the same settings, similar lengths together.

    Args:
        requests: all rows of the job.
        size: rows of a window.
    """
    kinds: dict[str, Window] = {}
    for row, request in enumerate(requests):
        if request.order is not None:
            kind = repr((request.order.settings, request.order.stops, request.cache))
            kinds.setdefault(kind, []).append(row)
    found = [rows[at : at + size] for rows in kinds.values() for at in range(0, len(rows), size)]
    for window in found:
        window.sort(key=lambda row: _length(requests[row]))
    return sorted(found, key=min)


def _length(request: OutputRow) -> int:
    assert request.order is not None
    return int(request.order.job.lengths[0])


def fill(
    model: TextDiffusion,
    requests: Sequence[OutputRow],
    output: Output,
    *,
    batch_size: int,
    share: tuple[int, int],
    progress: Callable[[int, int], None],
) -> None:
    """Writes every row that is missing and falls to this process.

    Args:
        model: generates.
        requests: all rows of the job.
        output: where they go; ready to write.
        batch_size: rows per network call.
        share: number of this process, and how many there are.
        progress: told, with every row, how many are done and how many tokens this one has.
    """
    rank, count = share
    for row, request in list(enumerate(requests))[rank::count]:
        if request.error is not None:
            output.write(row, request.failed(request.error))
    # Rows of models in blocks leave and enter one by one, and want others that wait.
    size = batch_size * (1 if model.family.block_size is None else 4)
    for window in windows(requests, size)[rank::count]:
        if output.done.issuperset(window):
            continue
        keeper = _Keeper([requests[row] for row in window], window, output, progress)
        orders = [order for order in (requests[row].order for row in window) if order is not None]
        try:
            cache = requests[window[0]].cache  # all rows of a window have the same
            model.run(Request.joined(orders), batch_size, cache, [keeper])
        except TextDiffError as error:  # of settings, which these rows share
            for row in window:
                output.write(row, requests[row].failed(str(error)))


class _Keeper(Callback):
    """Writes rows of a window as soon as they are done."""

    def __init__(
        self,
        requests: Sequence[OutputRow],
        window: Window,
        output: Output,
        progress: Callable[[int, int], None],
    ):
        self.requests, self.window = requests, window
        self.output, self.progress = output, progress

    def finished(self, row: int, result: FinishedRow) -> None:
        self.output.write(self.window[row], self.requests[row].answered(result))
        self.progress(len(self.output.done), result.new_tokens)
