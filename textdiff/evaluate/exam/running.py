"""Exams: tasks of lm-evaluation-harness, found by name, run, and reported with their certainty."""

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from textdiff.errors import ConfigError, DataError, TextDiffError, closest, first_line
from textdiff.evaluate.bound_record import result_origin
from textdiff.evaluate.exam.answer_bounds import Effort
from textdiff.evaluate.exam.answered import Answer, WholeText, WrittenAnswer
from textdiff.evaluate.exam.decisions import Certainty, Decision, decisions_of
from textdiff.pipeline import TextDiffusion

LOCAL_TASKS = Path(__file__).parent / "tasks"
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Exam:
    """Tasks, and how a model answers them.

    Attributes:
        tasks: names of tasks, groups or tags, patterns of names, or YAML files.
        effort: network rows that answers may take.
        options: of `SamplingConfig`, which take the place of a task's own.
        limit: questions per task, or a share of them; None: all.
        fewshot: examples before each question; None: as the task has it.
        batch_size: texts that are written together.
        chat_template: whether questions are written as a conversation.
        cache: file that answers are kept in; None: nowhere.
        data_folder: folder of data of the local tasks, which take the place of others of their
            names where there is one.
        qa_file: file of the task `qa`.
    """

    tasks: Sequence[str]
    effort: Effort = field(default_factory=Effort)
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: float | None = None
    fewshot: int | None = None
    batch_size: int = 16
    chat_template: bool = False
    cache: Path | None = None
    data_folder: str | None = None
    qa_file: str | None = None

    def run(self, model: TextDiffusion) -> "ExamResult | None":
        """Return the result on the first process; None on the others.

        Raises:
            ConfigError: lm-eval is missing, or an unknown task or option.
            DataError: data of a task that cannot be read, or text that the model cannot.
        """
        require_lm_eval()
        from lm_eval.evaluator import simple_evaluate

        from textdiff.evaluate.exam.lm_eval_model import TextDiffusionLM

        effort = asdict(self.effort)
        lm = TextDiffusionLM(
            model, batch_size=self.batch_size, cache=self.cache, **effort, **self.options
        )
        manager = self.task_manager()
        with _no_commit():
            results = simple_evaluate(
                lm,
                tasks=load_tasks(manager, self.tasks),
                task_manager=manager,
                num_fewshot=self.fewshot,
                limit=self.limit,
                apply_chat_template=self.chat_template,
                bootstrap_iters=0 if lm.shared.rank else BOOTSTRAPS,
            )
        if lm.shared.rank or results is None:
            return None
        origin = result_origin(model, processes=lm.shared.count)
        return ExamResult(results, self.effort, lm.shared.reused, origin)

    def task_manager(self) -> Any:
        """Return the harness's manager of tasks, which includes the local ones.

        Its own tasks are read only if they are needed: their files are many.
        """
        from lm_eval.tasks import TaskManager

        about = {"data_folder": self.data_folder, "qa_file": self.qa_file}
        local = TaskManager(None, str(LOCAL_TASKS), include_defaults=False, metadata=about)
        others = [name for name in self.tasks if not local.match_tasks([name])]
        if self.data_folder and not others:
            return local
        own = str(harness_tasks())
        order = [own, str(LOCAL_TASKS)] if self.data_folder else [str(LOCAL_TASKS), own]
        return TaskManager(None, order, include_defaults=False, metadata=about)


@contextmanager
def _no_commit() -> Iterator[None]:
    """Keep the harness from asking git for the commit of the current folder.

    That is not the model's commit, and outside a checkout git complains.
    """
    from lm_eval import evaluator

    asked = getattr(evaluator, "get_git_commit_hash", None)
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked


def require_lm_eval() -> None:
    """Make sure that lm-evaluation-harness is installed, and quiet.

    Raises:
        ConfigError: it is not installed, or broken.
    """
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise ConfigError(
            f"tasks are those of the package lm-eval, which cannot be imported "
            f"({first_line(error)}); install it with pip install 'textdiff[eval]'",
            code="lm_eval_missing",
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def harness_tasks() -> Path:
    """Return the folder of the harness's own tasks."""
    import lm_eval

    return Path(str(lm_eval.__file__)).parent / "tasks"


def load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """Return the tasks and groups of names, loaded.

    Raises:
        ConfigError: an unknown name.
        DataError: data that cannot be read.
    """
    wanted: list[str] = []
    for name in names:
        matches = manager.match_tasks([name]) or ([name] if Path(name).is_file() else [])
        if not matches:
            hint = closest(name, manager.all_tasks)
            raise ConfigError(f"unknown task {name!r}; {hint}", code="unknown_task")
        wanted += matches
    try:
        loaded = manager.load(list(dict.fromkeys(wanted)))
    except TextDiffError:
        raise
    except Exception as error:  # data sets raise whatever their readers and the network raise
        raise DataError(
            f"the data of {', '.join(names)} cannot be read ({first_line(error)}); without a "
            "network use local tasks, with TEXTDIFF_DATA set to their folder",
            code="task_not_loaded",
        ) from error
    inside = {child for children in loaded["group_map"].values() for child in children}
    groups = [group for name, group in loaded["groups"].items() if name not in inside]
    return [*groups, *(task for name, task in loaded["tasks"].items() if name not in inside)]


@dataclass(frozen=True)
class ExamResult:
    """Result of an exam.

    Attributes:
        results: as lm-evaluation-harness returns them, samples included.
        effort: network rows that answers might take.
        reused: answers that came from the cache.
        origin: files of the model, code and device.
    """

    results: Mapping[str, Any]
    effort: Effort
    reused: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict)

    def certainties(self) -> dict[str, Certainty]:
        """Return the certainty of the accuracy of every task and group with alternatives."""
        samples = self.results["samples"]
        decisions = {task: decisions_of(rows) for task, rows in samples.items()}
        groups = self.results.get("group_subtasks", {})

        def of(name: str) -> list[Decision]:
            return decisions.get(name) or [d for child in groups.get(name, ()) for d in of(child)]

        chosen = {name: of(name) for name in [*groups, *decisions]}
        return {name: Certainty.of(rows) for name, rows in chosen.items() if rows}

    def answers(self) -> Iterator[Any]:
        """Yield every answer once."""
        for rows in self.results["samples"].values():
            seen = set()
            for sample in rows:  # once per filter of the task
                if sample["doc_id"] not in seen:
                    seen.add(sample["doc_id"])
                    yield from (response[0] for response in sample["resps"])

    def counts(self) -> dict[str, int | float]:
        """Return counts of answers, and the largest standard error of a log-likelihood."""
        answers = list(self.answers())
        scored = [a for a in answers if isinstance(a, Answer | WholeText)]
        errors = [a.stderr for a in scored]
        limit = self.effort.precision
        written = [a.calls for a in answers if isinstance(a, WrittenAnswer)]
        return {
            "scored": len(scored),
            "exact": sum(a.exact for a in scored),
            "largest_stderr": max(errors, default=0.0),
            # A quarter more is what chance makes of an error that was planned by a pilot.
            "less_precise": sum(e > 1.25 * limit for e in errors) if limit else 0,
            "written": len(written),
            "calls_per_written": sum(written) / max(1, len(written)),
            "truncated": sum(getattr(a, "truncated", False) for a in answers),
            "shortened": sum(getattr(a, "shortened", False) for a in answers),
            "lossy": sum(getattr(a, "lossy", False) for a in answers),
            "reused": self.reused,
        }

    def record(self) -> dict[str, Any]:
        """Return the result as plain data, without the single questions."""
        kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples")
        certainty = {name: each.to_dict() for name, each in self.certainties().items()}
        return {
            **{key: self.results[key] for key in kept if key in self.results},
            "certainty": certainty,
            "answers": self.counts(),
            "effort": asdict(self.effort),
            "lm_eval": self.results.get("lm_eval_version"),
            "provenance": dict(self.origin),
        }

    def lines(self) -> list[str]:
        """Return the harness's tables, and lines on the certainty of the figures."""
        from lm_eval.utils import make_table

        tables = [make_table(self.results)]
        if self.results.get("groups"):
            tables.append(make_table(self.results, "groups"))
        groups = self.results.get("group_subtasks", {})
        inside = {child for children in groups.values() for child in children}
        about = [
            f"{name}: accuracy {c.accuracy:.4f} (95 % with the Monte-Carlo error {c.low:.4f} to "
            f"{c.high:.4f}), {c.undecided} of {c.questions} questions undecided"
            for name, c in self.certainties().items()
            if name not in inside
        ]
        return [*tables, *about, *self._notes()]

    def _notes(self) -> Iterator[str]:
        """Yield notes on the answers."""
        counts = self.counts()
        if counts["scored"]:
            yield (
                f"{counts['exact']} of {counts['scored']} log-likelihoods exact, the largest "
                f"standard error of the others {counts['largest_stderr']:.3f} nats"
            )
        if counts["written"]:
            calls = f"{counts['calls_per_written']:.1f} network calls per answer"
            yield f"{counts['written']} answers written, {calls}"
        notes = {
            "less_precise": "log-likelihoods are less precise than asked for",
            "truncated": "contexts were longer than the model's and lost their beginning",
            "shortened": "answers had room for fewer tokens than the task allows",
            "lossy": "texts do not come back from their tokens: these are scored, not the texts",
            "reused": "answers are those of an earlier start, from the cache",
        }
        yield from (f"{counts[key]} {words}" for key, words in notes.items() if counts[key])
