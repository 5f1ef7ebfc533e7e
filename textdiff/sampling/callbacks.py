"""Who looks on while texts are generated: streamers, live views, films, traces, files of rows.

A callback says which optional parts of the steps it needs, and is told of every job, every step and
every row that is done:

    class Counter(Callback):
        def step(self, step):
            print(step.calls, len(step.changed))

    model.generate("The iterator", callbacks=[Counter()])

Watching changes no token.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from textdiff.sampling.job import Job
from textdiff.sampling.segment import Step


@dataclass(frozen=True)
class FinishedRow:
    """A row as it will stay.

    Attributes:
        seed: seed of its random numbers.
        index: its index under that seed.
        text: all of it, special tokens removed.
        completion: what follows the prompt, up to the end-of-text token or a stop string; of a row
            with given text between or after holes, all from its first hole to its last.
        holes: what was written into each hole; a plain prompt has one, its completion.
        tokens: all its token ids, also those that the text was cut before.
        new_tokens: how many of them were generated.
    """

    seed: int
    index: int
    text: str
    completion: str
    holes: list[str]
    tokens: list[int]
    new_tokens: int


class Callback:
    """Does nothing, whatever it is told.

    Attributes:
        parts: optional parts of steps that it needs, of `sampling.watch.PARTS`.
    """

    parts: Collection[str] = ()

    def begin(self, job: Job) -> None:
        """Rows are about to be generated, up to 16 batches; steps are theirs until the next."""

    def step(self, step: Step) -> None:
        """The network was called and a rule has looked at the result."""

    def finished(self, row: int, result: FinishedRow) -> None:
        """A row is done; rows finish in any order.

        Args:
            row: its place in the job, as in the canvas of steps.
            result: what became of it.
        """


class CallbackHandler:
    """The callbacks of one job, told of rows as soon as these are done.

    Args:
        job: what is generated.
        callbacks: who looks on.
        finish: makes the result of a row, its place in the job, from its token ids.
    """

    def __init__(
        self,
        job: Job,
        callbacks: Sequence[Callback],
        finish: Callable[[int, list[int]], FinishedRow],
    ):
        self.job, self.callbacks, self.finish = job, callbacks, finish
        self.done: dict[int, FinishedRow] = {}

    @property
    def results(self) -> list[FinishedRow]:
        """The rows of a walk that was followed to its end, in the job's order."""
        return [self.done[row] for row in range(len(self.job.prompts))]

    def follow(self, walk: Generator[Step, None, Tensor]) -> Iterator[Step]:
        """Yields the steps of the walk, each after the callbacks have seen it."""
        for callback in self.callbacks:
            callback.begin(self.job)
        while True:
            try:
                step = next(walk)
            except StopIteration as end:
                self._tell(range(len(self.job.prompts)), step.canvas, end.value)
                return
            assert step.done is not None
            assert step.final is not None
            self._tell(step.done.nonzero().flatten().tolist(), step.canvas, step.final)
            for callback in self.callbacks:
                callback.step(step)
            yield step

    def _tell(self, rows: Iterable[int], canvas: Tensor, lengths: Tensor) -> None:
        for row in rows:
            if row in self.done:
                continue
            self.done[row] = self.finish(row, canvas[row, : int(lengths[row])].tolist())
            for callback in self.callbacks:
                callback.finished(row, self.done[row])
