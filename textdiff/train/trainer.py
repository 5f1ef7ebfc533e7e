"""The training loop.

Nothing here knows which objective, process or decoding rule is at work: those sit behind `Family`,
`training_loss` and the export. Data and noise are pure functions of (seed, step), so a run that is
interrupted and resumed is the run that was not.
"""

import json
import math
import time
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration, gather_object
from torch import Tensor

from textdiff.config import Config
from textdiff.config.reading import to_yaml
from textdiff.data import Corpus
from textdiff.diffusion.randomness import Stream, bits
from textdiff.errors import CheckpointError, ConfigError, TextDiffError
from textdiff.export.loading import DTYPES, cpu_only, family_of
from textdiff.likelihood import Bound, Windows, estimate
from textdiff.likelihood.texts import pieces_of, windows_of
from textdiff.loss import training_loss
from textdiff.pipeline import TextDiffusion
from textdiff.storage import sweep, writing
from textdiff.train.batches import TrainingBatches
from textdiff.train.checkpoint import (
    Checkpoint,
    checkpoints,
    damage,
    newest_usable,
    optimizer_states,
    rescue,
    write_export,
)
from textdiff.train.distributed import (
    TIMEOUT,
    Vote,
    check_engine,
    filled,
    gather,
    hollow,
    is_sharded,
    load_optimizer,
    load_tensors,
    on_main,
    refuse_reimport,
    whole,
)
from textdiff.train.divergence import DivergenceGuard, as_record, carrying, describe, examine
from textdiff.train.ema import EMA
from textdiff.train.optim import (
    build_optimizers,
    lr_multiplier,
    resolve_precision,
    set_learning_rate,
)
from textdiff.train.ranges import RangeChoice, search_range
from textdiff.train.reporter import MetricsFile, Reporter, StepReport, evaluation_values
from textdiff.train.setup import build_model, check_resume, environment, sample_defaults
from textdiff.train.signals import StopRequest


@dataclass
class Progress:
    """Counters that a checkpoint carries.

    Attributes:
        step: optimizer steps done.
        tokens: training tokens seen.
        losses: training loss of each step since the last log line. A sum would depend, in its last
            bit, on where an interruption cut it.
        bound_step: step of the newest validation bound; -1: none yet.
    """

    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    bound_step: int = -1


class Trainer:
    """One run: built from a config and a corpus, then `run`.

    Args:
        config: the resolved config.
        corpus: the prepared corpus.
        accelerator: made by `make_accelerator`.
        reporter: told what happens, on the main process.
        resume: `auto` (newest usable checkpoint of the run), `never`, or a checkpoint's path.

    Raises:
        ConfigError: settings that do not fit each other or the machine.
        CheckpointError: the checkpoint does not fit the config.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        accelerator: Accelerator,
        reporter: Reporter,
        resume: str = "auto",
    ):
        self.config = config
        self.corpus = corpus
        self.accelerator = accelerator
        self.reporter = reporter if accelerator.is_main_process else Reporter()
        self.directory = Path(config.run.dir)
        torch.manual_seed(config.run.seed)
        model, family = build_model(config, corpus.tokenizer, accelerator.device)
        self.batches = TrainingBatches(
            corpus.train, family.host, config, accelerator.process_index, accelerator.num_processes
        )
        self.trained = model
        self.parameters = sum(p.numel() for p in model.parameters())
        optimizers = build_optimizers(model, config.train)
        if config.train.compile:
            for block in model.blocks:
                block.compile()
        check_engine(accelerator)
        self.module, *self.optimizers = accelerator.prepare(
            training_loss(model, family), *optimizers
        )
        self.guard = DivergenceGuard(self.optimizers, accelerator.device)
        self.vote = Vote()
        self.ema = EMA(model, config.train.ema_decay)
        if is_sharded(model):
            model = hollow(model)
            family = family_of(model.config, accelerator.device, model.exponents)
        self.exported = TextDiffusion(model, corpus.tokenizer, family, sample_defaults(config))
        self.progress = Progress()
        self.bound: Bound | None = None
        self.resumed = self._resume(resume)  # which refuses another corpus before it is cut
        self.windows = self._validation_windows()
        self.told = False  # that its bound is none

    # --- the loop ---

    def run(self) -> int:
        """Trains to the last step, or until a signal.

        Returns:
            0, or the number of the signal that stopped the run (with everything saved).
        """
        saved = self.directory / "checkpoints"
        with writing(self.directory, lambda: rescue(saved)):
            self._start()
            signalled = self._loop()
            if not signalled:
                self._finish()
        return signalled

    def _loop(self) -> int:
        config, progress = self.config.train, self.progress
        with (
            StopRequest() as stop,
            closing(self.batches.loader(progress.step, config.steps)) as batches,
        ):
            if self._owes_bound():
                self._evaluate()
            clock, tokens_before = time.perf_counter(), progress.tokens
            losses: list[Tensor] = []
            while progress.step < config.steps:
                norm, rate = self._step(batches, losses)
                self.reporter.stepped(progress.step)
                if self._due(config.log_every):
                    speed = (progress.tokens - tokens_before) / (time.perf_counter() - clock)
                    self._log(losses, norm, rate, speed)
                signalled = self.vote.largest(stop.signal)
                if self._due(self.config.evaluate.every) and not signalled:
                    self._absorb(losses)
                    self._evaluate()
                if self._due(config.checkpoint_every) or signalled:
                    self._absorb(losses)
                    self._save()
                if signalled:
                    return signalled
                if self._due(config.log_every):
                    clock, tokens_before = time.perf_counter(), progress.tokens
        return 0

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.train.steps

    def _owes_bound(self) -> bool:
        """Whether the run continues where a signal came before a bound that was due."""
        step = self.progress.step
        missed = self._due(self.config.evaluate.every) and self.progress.bound_step != step
        return missed and 0 < step < self.config.train.steps

    def _step(self, batches: Any, losses: list[Tensor]) -> tuple[Tensor, float]:
        """One optimizer step; adds its loss in nats per token to `losses`."""
        step, seed = self.progress.step, self.config.run.seed
        rate = lr_multiplier(step, self.config.train)
        set_learning_rate(self.optimizers, rate)
        self.module.train()
        norm, allowed = torch.zeros(()), True
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for micro_step in range(self.batches.accumulation):
            batch = next(batches).to(self.accelerator.device)
            if self.config.model.dropout:
                index = micro_step * self.accelerator.num_processes + self.accelerator.process_index
                torch.manual_seed(int(bits(seed, Stream.DROPOUT, row=index, step=step)))
            with self.accelerator.accumulate(self.module):
                with self.accelerator.autocast():  # which FSDP2 leaves to the caller
                    total, _ = self.module(batch)
                mean = total / self.batches.scored_tokens(batch)
                self.accelerator.backward(carrying(mean))
                loss += mean.detach() / self.batches.accumulation
                if self.accelerator.sync_gradients:
                    norm = self._clip()
                    allowed = self.guard.allows(norm, step)
                for optimizer in self.optimizers:
                    if allowed:
                        optimizer.step()
                    optimizer.zero_grad()
        losses.append(loss)
        self.ema.update(self.trained)
        self.progress.step += 1
        self.progress.tokens += self.config.train.global_batch_size * self.batch_length
        return norm, rate * self.config.train.learning_rate

    def _clip(self) -> Tensor:
        limit = self.config.train.grad_clip or math.inf
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
        return whole(torch.as_tensor(norm).detach())

    @property
    def batch_length(self) -> int:
        """Tokens per training sequence."""
        return self.config.data.sequence_length

    # --- logging, evaluation, samples ---

    def _absorb(self, losses: list[Tensor]) -> None:
        """Moves losses from the device into the counters: where the host waits for the device.

        Raises:
            TextDiffError: a step since the last time was not finite.
        """
        steps = len(losses)
        values = torch.stack([*losses, self.guard.step]).view(1, -1)
        # Gathered, then averaged here: in which order a reduction adds may depend on its length.
        found = self.accelerator.gather(values).mean(0).tolist()
        losses.clear()
        if found[-1] >= 0:
            raise self._diverged(int(found[-1]))
        self.progress.losses += found[:steps]

    def _diverged(self, step: int) -> TextDiffError:
        """What to say about the first step that was not finite; the details go to a file."""
        accelerator, norm = self.accelerator, float(self.guard.norm)
        module = accelerator.unwrap_model(self.module)
        findings = examine(
            module, self.batches, step, accelerator.device, self.corpus.tokenizer.decode
        )
        findings = sorted(gather_object(findings), key=lambda finding: finding.slot)
        path = self.directory / "divergence.json"
        if accelerator.is_main_process:
            record = as_record(step + 1, norm, findings)
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")
        last = checkpoints(self.directory / "checkpoints")
        export = (
            f" (train.init_from: {self.directory / 'export'} goes on from there)" if last else ""
        )
        return TextDiffError(
            f"step {step + 1} is not finite (gradient norm {norm:.4g}): {describe(findings)}; "
            f"nothing of it was kept, all its samples are in {path}; last checkpoint: "
            f"{last[-1] if last else 'none'}; start a new run.dir with a lower train.learning_rate "
            f"or train.grad_clip{export}, or look at those samples"
        )

    def _log(self, losses: list[Tensor], norm: Tensor, rate: float, speed: float) -> None:
        progress = self.progress
        self._absorb(losses)
        report = StepReport(
            step=progress.step,
            steps=self.config.train.steps,
            loss=math.fsum(progress.losses) / len(progress.losses),
            learning_rate=rate,
            grad_norm=float(norm),
            tokens=progress.tokens,
            tokens_per_second=speed,
        )
        progress.losses = []
        values = {k: v for k, v in vars(report).items() if k not in ("step", "steps")}
        self._record(values)
        self.reporter.logged(report)

    def _record(self, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.metrics.write({"step": self.progress.step, **values})
        self.accelerator.log(values, step=self.progress.step)

    def _validation_windows(self) -> Windows:
        texts = self.corpus.validation[: self.config.evaluate.max_documents]
        self.scored = texts
        return windows_of(
            self.corpus.tokenizer,
            pieces_of(texts),
            self.config.data.sequence_length,
            self.exported.family.process.vocabulary.clean.cpu(),
        )

    def _evaluate(self) -> None:
        """The validation bound of the averaged weights in every block size that is trained.

        Where mask rates are searched, training goes on with those found.
        """
        step, sizes = self.progress.step, self.config.diffusion.block_sizes
        with (
            self._averaged(),
            torch.autocast(
                self.accelerator.device.type,
                DTYPES["bfloat16"],
                enabled=self.config.evaluate.dtype == "bfloat16",
            ),
        ):
            bounds = {size: self._bound(size) for size in sizes}
            searched = sizes if self.config.diffusion.noise.range == "search" else ()
            choices = {size: self._search(size) for size in searched}
            if self.accelerator.is_main_process and self.config.sample.num_samples:
                self._sample()
        self.bound, self.progress.bound_step = bounds[sizes[0]], step
        self.batches.ranges |= {size: choice.range for size, choice in choices.items()}
        self._record(evaluation_values(bounds, choices))
        for size, choice in choices.items():
            self.reporter.range_found(step, size, choice)
        for size in sizes[1:]:
            self.reporter.also_evaluated(step, size, bounds[size])
        self.reporter.evaluated(step, self.bound)
        if self.bound.lossy and not self.told:
            self.told = True
            self.reporter.message(f"this is NOT a bound: {self.bound.note}")

    def _bound(self, block_size: int | None) -> Bound:
        """The validation bound, under common random numbers."""
        return estimate(
            self.exported.model,
            self.exported.family.with_block_size(block_size),
            self.windows,
            seed=self.config.run.seed,
            replicates=self.config.evaluate.replicates,
            shard=self._shard,
            reduce=self._sum,
            progress=self.reporter.evaluating,
        ).bound()

    def _search(self, block_size: int | None) -> RangeChoice:
        """The mask rates of smallest variance."""
        family = self.exported.family.with_block_size(block_size)
        step = self.progress.step
        return search_range(
            self.exported.model, family, self.batches, step, shard=self._shard, reduce=self._sum
        )

    @property
    def _shard(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes

    def _sum(self, values: Tensor) -> Tensor:
        """Values on the host, added over processes."""
        moved = values.to(self.accelerator.device)
        return torch.as_tensor(self.accelerator.reduce(moved, "sum")).cpu()

    def _sample(self) -> None:
        """Draws samples from the averaged weights into `samples/` and the trackers."""
        drawn = self.exported.generate(
            "", num_samples=self.config.sample.num_samples, seed=self.config.run.seed
        )
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        text = "\n\n---\n\n".join(drawn.texts)
        (folder / f"step-{self.progress.step:06d}.txt").write_text(text + "\n", encoding="utf-8")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_text("samples", text, self.progress.step)
        self.reporter.sampled(self.progress.step, drawn.texts)

    # --- starting, saving, finishing ---

    def _start(self) -> None:
        progress, model = self.progress, self.exported.model
        if self.accelerator.is_main_process:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
            facts = environment(self.accelerator, self.corpus.record)
            facts["sharded"] = is_sharded(self.trained)
            (self.directory / "env.json").write_text(json.dumps(facts, indent=2) + "\n")
            with (self.directory / "validation.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in self.scored)
            self.metrics = MetricsFile(
                self.directory / "metrics.jsonl", progress.step, progress.bound_step
            )
        self.accelerator.init_trackers("tensorboard")
        self.accelerator.wait_for_everyone()
        self.reporter.started(
            {
                "directory": str(self.directory),
                "parameters": self.parameters,
                "vocabulary": model.config.vocab_size,
                "device": str(self.accelerator.device),
                "processes": self.accelerator.num_processes,
                "precision": "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32",
                "resumed": self.resumed,
                "step": progress.step,
                "steps": self.config.train.steps,
                "corpus": self.corpus.record,
            }
        )
        if progress.step >= self.config.train.steps:
            self.reporter.message(
                f"nothing is left to train: the run has made {progress.step} steps, and "
                f"train.steps is {self.config.train.steps}; raise it to go on"
            )

    def _state(self) -> dict[str, Any]:
        return {
            **vars(self.progress),
            "ema_updates": self.ema.updates,
            "bound": None if self.bound is None else asdict(self.bound),
            "noise_ranges": list(self.batches.ranges.items()),
            "parameters": self.parameters,
            "vocabulary": self.exported.model.config.vocab_size,
            "corpus": self.corpus.record,
            "config": self.config.model_dump(mode="json"),
        }

    def _save(self) -> None:
        main = self.accelerator.is_main_process
        parameters = {n: p.detach() for n, p in self.trained.named_parameters()}
        checkpoint = Checkpoint(
            gather(parameters, keep=main),
            gather(self.ema.state_dict(), keep=main),
            gather(optimizer_states(self.optimizers), keep=main),
            self._state(),
        )
        root, keep = self.directory / "checkpoints", self.config.train.keep_checkpoints
        on_main(self.accelerator, lambda: checkpoint.save(root, keep))
        export = self.directory / "export"
        with self._averaged():
            on_main(
                self.accelerator,
                lambda: write_export(export, self.exported, self.config, self._state(), self.bound),
            )

    def _averaged(self) -> AbstractContextManager[None]:
        """While entered, `exported` holds the averaged weights, whole; all processes enter."""
        if self.exported.model is self.trained:
            return self.ema.applied(self.trained)
        return filled(self.exported.model, self.ema.state_dict())

    def _finish(self) -> None:
        """Closes the run; a signal at the very last step may have left its bound to us."""
        if self.progress.bound_step != self.progress.step:
            self._evaluate()
            self._save()
        # Not `end_training`: it would leave the groups to the gradients' reducer, whose end joins
        # gloo's threads under the interpreter's lock, which these may be waiting for.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.reporter.finished()

    def _resume(self, resume: str) -> str | None:
        """Loads the newest usable checkpoint; returns where it came from."""
        path = on_main(self.accelerator, lambda: self._usable(resume))
        if path is None:
            return None
        self._restore(Checkpoint.read(path))
        return str(path)

    def _usable(self, resume: str) -> Path | None:
        """The checkpoint to continue from, checked file by file."""
        root = self.directory / "checkpoints"
        for folder in (self.directory, root):
            for name in sweep(folder):
                self.reporter.message(f"put {folder / name} in order, which a kill left half done")
        if resume == "never":
            return None
        if resume == "auto":
            return newest_usable(root, self.reporter.message)
        path = Path(resume)
        problem = damage(path)
        if problem is not None:
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
        return path

    def _restore(self, checkpoint: Checkpoint) -> None:
        check_resume(self.config, self.corpus.record, checkpoint.state, self.directory)
        load_tensors(dict(self.trained.named_parameters()), checkpoint.model)
        self.ema.load_state_dict(checkpoint.ema, checkpoint.state["ema_updates"])
        for optimizer, state in zip(self.optimizers, checkpoint.optimizers, strict=True):
            load_optimizer(optimizer, state)
        self.progress = Progress(**{k: checkpoint.state[k] for k in vars(self.progress)})
        if checkpoint.state["bound"] is not None:
            self.bound = Bound(**checkpoint.state["bound"])
        self.batches.ranges = {
            size: tuple(rates) for size, rates in checkpoint.state["noise_ranges"]
        }


def make_accelerator(config: Config) -> Accelerator:
    """An Accelerator for the config's precision, accumulation and tracker.

    Raises:
        ConfigError: the processes do not divide the global batch, or a worker imports the script.
    """
    refuse_reimport()
    probe = PartialState(cpu=cpu_only(), timeout=TIMEOUT)
    probe.wait_for_everyone()  # one that fails at once must not go before all have found it
    # Accelerate keeps one state per Python process; a second run may want another precision.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    rows, size = config.train.global_batch_size, config.train.micro_batch_size
    accumulation, left = divmod(rows, size * probe.num_processes)
    if left or not accumulation:
        raise ConfigError(
            f"train.global_batch_size {rows} cannot be split over {probe.num_processes} processes "
            f"with train.micro_batch_size {size}: it has to be a multiple of {probe.num_processes} "
            f"x {size} = {size * probe.num_processes}"
        )
    precision = resolve_precision(config.train.mixed_precision, probe.device)
    directory = str(config.run.dir)
    return Accelerator(
        cpu=cpu_only(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=accumulation,
        log_with="tensorboard",
        project_config=ProjectConfiguration(directory, logging_dir=directory),
    )
