"""The training loop.

Nothing here depends on the objective, process or decoding rule: those sit behind `Family`,
`training_loss` and the export. Data and noise are pure functions of (seed, step), so a run that is
interrupted and resumed equals an uninterrupted one.
"""

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from textdiff.config import Config
from textdiff.data.corpus import Corpus
from textdiff.models.devices import compile_blocks, describe_compilation, uncompiled
from textdiff.signals import StopRequest
from textdiff.storage import report_failed_writes
from textdiff.train.batches import TrainingBatches
from textdiff.train.checkpoint import rescue
from textdiff.train.determinism import deterministic, seed_dropout
from textdiff.train.distributed import Vote, full_tensor, on_main
from textdiff.train.divergence import DivergenceGuard, diagnose, propagate_nonfinite
from textdiff.train.initial_weights import starting_notes
from textdiff.train.learned_loss import training_loss
from textdiff.train.measure import Meter
from textdiff.train.optim import lr_multiplier, set_learning_rate
from textdiff.train.profiling import StepProfile
from textdiff.train.reporter import MetricsFile, Reporter, evaluation_values
from textdiff.train.resumption import Resumption, choose_checkpoint
from textdiff.train.run_state import Progress, RunState
from textdiff.train.setup import build_model, write_facts
from textdiff.train.sharding import prepare_training, sum_over_replicas
from textdiff.train.trackers import finish_trackers, start_trackers
from textdiff.train.validation import Abandoned, Validation


class Trainer:
    """Training run: built from a config and a corpus, then `run`.

    Args:
        config: the resolved config.
        corpus: the prepared corpus.
        accelerator: made by `make_accelerator`.
        reporter: receives what happens, on the main process.
        resume: for `choose_checkpoint`, or what that has returned.

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
        resume: str | Resumption = "auto",
    ):
        self.config, self.corpus, self.accelerator = config, corpus, accelerator
        self.reporter = reporter if accelerator.is_main_process else Reporter()
        self.directory = Path(config.run.dir)
        chosen = choose_checkpoint(self.directory, resume, accelerator, reporter.message)
        self.resumed = chosen.path
        torch.manual_seed(config.run.seed)
        model, family = build_model(config, corpus.tokenizer, accelerator.device)
        ranks = accelerator.process_index, accelerator.num_processes
        self.batches = TrainingBatches(corpus.train, family.on_cpu, config, *ranks)
        self.meter = Meter.of(config, model, accelerator)
        self.profile = StepProfile.of(config, accelerator, self.reporter.message)
        if config.train.compile:
            compile_blocks(model.blocks)
        loss = training_loss(model, family)
        self.module, self.optimizers = prepare_training(loss, accelerator, config.train)
        self.guard = DivergenceGuard(self.optimizers, accelerator.device)
        self.vote = Vote()
        self.state = RunState(
            config, corpus, accelerator, (model, family), self.optimizers, self.batches
        )
        if self.resumed is not None:  # refuses another corpus before it is cut into windows
            self.state.restore(self.resumed)
        elif accelerator.is_main_process:
            for note in starting_notes(config, corpus.tokenizer, model):
                self.reporter.message(note)
        self.validation = Validation(
            config, corpus, self.state.exported, accelerator, self.reporter
        )
        self.noted_lossy = False

    @property
    def progress(self) -> Progress:
        """The counters of the run."""
        return self.state.progress

    def run(self) -> int:
        """Train to the last step, or until a signal.

        Returns:
            0, or the number of the signal that stopped the run (with everything saved).
        """
        failed = report_failed_writes(self.directory, lambda: rescue(self.state.checkpoints))
        with failed, self.state.saver.outlasting_errors():
            self._start()
            if not (signalled := self._loop()):
                self._finish()
            finish_trackers(self.accelerator)
        return signalled

    def _loop(self) -> int:
        config, progress = self.config.train, self.progress
        with (
            StopRequest() as stop,
            closing(self.batches.loader(progress.step, config.steps)) as loader,
            self.profile,
        ):
            batches = self.meter.fetched(loader)
            self.validation.signalled = lambda: self.vote.largest(stop.signal)
            if self._bound_is_due() and (signalled := self._evaluate()):
                return signalled
            self.meter.restart(progress.tokens)
            losses: list[Tensor] = []
            while progress.step < config.steps:
                with deterministic(config.deterministic):
                    norm, rate = self._step(batches, losses)
                self.profile.stepped(progress.step)
                self.reporter.stepped(progress.step)
                self.state.saver.poll()
                if self._due(config.log_every):
                    self._log(losses, norm, rate)
                signalled = self.vote.largest(stop.signal)
                if self._due(self.config.evaluate.every) and not signalled:
                    self._absorb(losses)
                    signalled = self._evaluate()
                if self._due(config.checkpoint_every) or signalled:
                    self._absorb(losses)
                    with self.meter.paused():
                        self.state.save()
                if signalled:
                    self.state.saver.settle()
                    return signalled
                if self._due(config.log_every):
                    self.meter.restart(progress.tokens)
        self.validation.signalled = lambda: 0
        return 0

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.train.steps

    def _bound_is_due(self) -> bool:
        """Return whether a signal stopped the run before a bound that was due."""
        step = self.progress.step
        missed = self._due(self.config.evaluate.every) and self.progress.bound_step != step
        return missed and 0 < step < self.config.train.steps

    def _step(self, batches: Any, losses: list[Tensor]) -> tuple[Tensor, float]:
        """Take one optimizer step and append its loss in nats per token to `losses`."""
        step, config = self.progress.step, self.config
        rate = lr_multiplier(step, config.train)
        set_learning_rate(self.optimizers, rate)
        self.module.train()
        norm, allowed = torch.zeros(()), True
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for micro_step in range(self.batches.accumulation):
            with self.profile.phase("data"):
                batch = next(batches).to(self.accelerator.device)
            seed_dropout(config, self.accelerator, step, micro_step)
            with self.accelerator.accumulate(self.module):
                sum_over_replicas(self.module, self.accelerator.sync_gradients)
                # FSDP2 leaves autocast to the caller.
                with self.profile.phase("forward"), self.accelerator.autocast():
                    total, _ = self.module(batch)
                mean = total / self.batches.scored_tokens(batch)
                with self.profile.phase("backward"):
                    self.accelerator.backward(propagate_nonfinite(mean))
                loss += mean.detach() / self.batches.accumulation
                with self.profile.phase("optimizer"):
                    if self.accelerator.sync_gradients:
                        norm = self._clip()
                        allowed = self.guard.allows(norm, step)
                    for optimizer in self.optimizers:
                        if allowed:
                            optimizer.step()
                        optimizer.zero_grad()
        losses.append(loss)
        with self.profile.phase("averages"):
            self.state.ema.update(self.state.trained)
        self.progress.step += 1
        self.progress.tokens += config.train.global_batch_size * config.data.sequence_length
        return norm, rate * config.train.learning_rate

    def _clip(self) -> Tensor:
        limit = self.config.train.grad_clip or math.inf
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
        return full_tensor(torch.as_tensor(norm).detach())

    def _absorb(self, losses: list[Tensor]) -> None:
        """Move losses from the device into the counters; the CPU waits for the device here.

        Raises:
            TextDiffError: a step since the last time was not finite.
        """
        values = torch.stack([*losses, self.guard.step]).view(1, -1)
        # Gathered, then averaged here: a reduction's order of adding may depend on its length.
        *averages, diverged = self.accelerator.gather(values).mean(0).tolist()
        losses.clear()
        if diverged >= 0:
            self.state.saver.settle()  # so that the newest checkpoint is named
            module = self.accelerator.unwrap_model(self.module)
            norm, decode = float(self.guard.norm), self.corpus.tokenizer.decode
            raise diagnose(module, self.batches, int(diverged), norm, self.accelerator, decode)
        self.progress.losses += averages

    def _log(self, losses: list[Tensor], norm: Tensor, rate: float) -> None:
        progress = self.progress
        self._absorb(losses)  # first: the meter stops when the device has done the steps
        values = {
            "loss": math.fsum(progress.losses) / len(progress.losses),
            "learning_rate": rate,
            "grad_norm": float(norm),
            "tokens": progress.tokens,
            **self.meter.values(progress.tokens),
        }
        progress.losses = []
        self._record(values)
        self.reporter.logged(progress.step, values)

    def _record(self, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.metrics.write({"step": self.progress.step, **values})
        self.accelerator.log(values, step=self.progress.step)

    def _evaluate(self) -> int:
        """Measure the averaged weights in every block size that is trained.

        Where mask rates are searched, training continues with the best ones.

        Returns:
            0, or the number of the signal that stopped it: a bound may take longer than whoever
            sent the signal waits. A resumed run begins with this bound.
        """
        step = self.progress.step
        try:
            with self.meter.paused(), self.state.averaged(), uncompiled(self.config.train.compile):
                bounds, choices = self.validation.measure(self.batches, step)
        except Abandoned as stop:
            return stop.signal
        bound = next(iter(bounds.values()))  # of the default block size
        self.state.bound, self.progress.bound_step = bound, step
        self.batches.ranges |= {size: choice.range for size, choice in choices.items()}
        self._record(evaluation_values(bounds, choices))
        self.reporter.evaluated(step, bounds, choices)
        if bound.lossy and not self.noted_lossy:
            self.noted_lossy = True
            self.reporter.message(f"this is NOT a bound: {bound.note}")
        return 0

    def _start(self) -> None:
        if self.accelerator.is_main_process:
            flops, texts = self.meter.flops_per_token, self.validation.texts
            write_facts(self.config, self.accelerator, self.corpus, texts, flops)
            path, progress = self.directory / "metrics.jsonl", self.progress
            self.metrics = MetricsFile(path, progress.step, progress.bound_step)
        resumed = self.resumed is not None
        on_main(self.accelerator, lambda: start_trackers(self.accelerator, self.config, resumed))
        self.accelerator.wait_for_everyone()
        step, steps = self.progress.step, self.config.train.steps
        self.reporter.started(
            {
                "directory": str(self.directory),
                "parameters": self.state.parameters,
                "vocabulary": self.state.exported.model.config.vocab_size,
                "device": str(self.accelerator.device),
                "processes": self.accelerator.num_processes,
                "precision": "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32",
                "resumed": self.resumed and str(self.resumed),
                "step": step,
                "steps": steps,
                "corpus": self.corpus.record,
            }
        )
        if step >= steps:
            self.reporter.message(
                f"nothing is left to train: the run has made {step} steps, and train.steps is "
                f"{steps}; raise it to go on"
            )

    def _finish(self) -> None:
        """Close the run, with the bound that a signal at the last step may have left out."""
        if self.progress.bound_step != self.progress.step:
            self._evaluate()
            self.state.save()
        self.state.saver.settle()
        if self.config.train.compile:
            self.reporter.message(describe_compilation())
        self.reporter.finished()
