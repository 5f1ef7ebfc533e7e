"""`textdiff train`: a run from a config, resumed by itself, with what to do next at its end."""

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import load_config, take_option
from textdiff.view.progress import PreparationView, make_console, quiet_libraries, unfailing

if TYPE_CHECKING:
    from textdiff.config import Config
    from textdiff.data.corpus import Corpus


def train(arguments: Sequence[str]) -> int:
    """Run `textdiff train CONFIG [--resume auto|never|PATH] [--section.key VALUE ...]`."""
    arguments, resume = take_option(list(arguments), "--resume", "auto")
    config = load_config(arguments, "textdiff train", "[--resume auto|never|PATH] ")
    quiet_libraries()
    from textdiff.train.directory import claim
    from textdiff.train.distributed import make_accelerator, on_main, report_lost_process
    from textdiff.train.trainer import Trainer
    from textdiff.view.training import training_view

    accelerator = make_accelerator(config)
    console = make_console()
    view = unfailing(training_view(console))
    with ExitStack() as stack:
        stack.enter_context(report_lost_process(accelerator))
        on_main(accelerator, lambda: claim(Path(config.run.dir), resume, view.message, stack))
        corpus = _prepare(config, accelerator, console.is_terminal)
        if accelerator.is_main_process:
            for note in corpus.notes:
                view.message(note)
        trainer = Trainer(config, corpus, accelerator, view, resume)
        if hasattr(view, "close"):  # a live view has to give the terminal back
            stack.callback(view.close)
        signal = trainer.run()
    if signal and accelerator.is_main_process:
        saved = f"stopped at step {trainer.progress.step}, everything saved"
        if accelerator.num_processes > 1:  # how they were launched is not known here
            view.message(f"{saved}; start the same command again to continue")
        else:
            view.message(f"{saved}; continue with")
            view.message(f"  {shlex.join(['textdiff', 'train', *arguments])}")
    elif accelerator.is_main_process:
        _show_result(console, config, trainer)
    return 128 + signal if signal else 0


def _prepare(config: "Config", accelerator: Any, in_terminal: bool) -> "Corpus":
    """Prepare the corpus in the first process; the others find its cache."""
    from textdiff.data.corpus import prepare_corpus
    from textdiff.train.distributed import on_main

    first = accelerator.is_main_process
    prepared: list[Corpus] = []

    def prepare() -> None:
        with PreparationView(first and in_terminal) as progress:
            corpus = prepare_corpus(
                config.data,
                config.tokenizer,
                config.run.seed,
                verify=first,  # once is enough: all processes map the same files
                progress=progress,
            )
        prepared.append(corpus)

    on_main(accelerator, prepare)
    if not prepared:
        prepare()
    return prepared[0]


def _show_result(console: Any, config: "Config", trainer: Any) -> None:
    from textdiff.commands.suggestions import accepts, commands_to_try
    from textdiff.pipeline import TextDiffusion
    from textdiff.view.display import can_animate, watch_rows
    from textdiff.view.training import describe_bound

    directory = Path(config.run.dir)
    console.print(
        f"\nvalidation: {describe_bound(trainer.state.bound)}", highlight=False, soft_wrap=True
    )
    export = str(directory / "export")
    if config.sample.num_samples:
        # What was written, not what was trained: the weights of that may be spread over processes.
        written = TextDiffusion.from_pretrained(export, device=str(trainer.accelerator.device))
        if can_animate(console):
            watch_rows(console, written, config.sample.num_samples, config.run.seed)
        else:
            drawn = written.generate(
                "", num_samples=config.sample.num_samples, seed=config.run.seed
            )
            print("\n" + "\n\n---\n\n".join(drawn.texts))
    first, usable = trainer.corpus.validation[0], accepts(trainer.state.exported)
    print(f"\nThe model is in {export}. Try next:")
    for command in commands_to_try(export, str(directory / "validation.jsonl"), first, usable):
        print(f"  {command}")
