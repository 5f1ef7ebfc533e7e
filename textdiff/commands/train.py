"""`textdiff train`: a run from a config, resumed by itself, with what to do next at its end."""

import json
import os
import shlex
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import load_config, take_option
from textdiff.errors import TextDiffError
from textdiff.view.progress import PreparationView, make_console, quiet_libraries, unfailing

if TYPE_CHECKING:
    from textdiff.config import Config
    from textdiff.data.corpus import Corpus
    from textdiff.pipeline import TextDiffusion


def train(arguments: Sequence[str]) -> int:
    """Run `textdiff train CONFIG [--resume auto|never|PATH] [--section.key VALUE ...]`."""
    arguments, resume = take_option(list(arguments), "--resume", "auto")
    config = load_config(arguments, "textdiff train", "[--resume auto|never|PATH] ")
    quiet_libraries()
    from textdiff.train.attention_backend import attention_backend
    from textdiff.train.directory import claim
    from textdiff.train.distributed import make_accelerator, on_main, report_lost_process
    from textdiff.train.engines import sharding_notes
    from textdiff.train.resumption import choose_checkpoint
    from textdiff.train.trainer import Trainer
    from textdiff.view.training import LiveView, PlainView

    if config.train.deterministic:  # cuBLAS reads it once
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    accelerator = make_accelerator(config)
    attention_backend(config, accelerator.device)  # refused before a corpus is read
    console = make_console()
    view = unfailing(LiveView(console) if console.is_terminal else PlainView(console))
    with ExitStack() as stack:
        stack.enter_context(report_lost_process(accelerator))
        on_main(accelerator, lambda: claim(Path(config.run.dir), resume, view.message, stack))
        chosen = choose_checkpoint(Path(config.run.dir), resume, accelerator, view.message)
        corpus = _prepare(config, accelerator, console.is_terminal)
        if accelerator.is_main_process:
            for note in (*sharding_notes(accelerator), *corpus.notes):
                view.message(note)
        trainer = Trainer(config, corpus, accelerator, view, chosen)
        if hasattr(view, "close"):  # a live view has to give the terminal back
            stack.callback(view.close)
        signal = trainer.run()
    if accelerator.is_main_process:
        if signal:
            _show_stop(view, trainer, arguments)
        else:
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
                block_sizes=config.diffusion.block_sizes,
                verify="changed" if first else "nothing",  # all processes map the same files
                others_wait=accelerator.num_processes > 1,
                progress=progress,
            )
        prepared.append(corpus)

    on_main(accelerator, prepare)
    if not prepared:
        prepare()
    return prepared[0]


def _show_stop(view: Any, trainer: Any, arguments: Sequence[str]) -> None:
    """Say how a run that a signal has stopped continues."""
    saved = f"stopped at step {trainer.progress.step}, everything saved"
    if trainer.accelerator.num_processes > 1:  # how they were launched is not known here
        view.message(f"{saved}; start the same command again to continue")
    else:
        view.message(f"{saved}; continue with")
        view.message(f"  {shlex.join(['textdiff', 'train', *arguments])}")


def _show_result(console: Any, config: "Config", trainer: Any) -> None:
    from textdiff.pipeline import TextDiffusion
    from textdiff.view.display import can_animate, watch_rows
    from textdiff.view.training import describe_bound

    directory = Path(config.run.dir)
    console.print(
        f"\nvalidation: {describe_bound(trainer.state.bound)}", highlight=False, soft_wrap=True
    )
    export = str(directory / "export")
    if config.sample.num_samples and config.data.conversations is None:
        # What was written, not what was trained: the weights of that may be spread over processes.
        written = TextDiffusion.from_pretrained(export, device=str(trainer.accelerator.device))
        if can_animate(console):
            watch_rows(console, written, config.sample.num_samples, config.run.seed)
        else:
            drawn = written.generate(
                "", num_samples=config.sample.num_samples, seed=config.run.seed
            )
            print("\n" + "\n\n---\n\n".join(drawn.texts))
    first, validation = trainer.corpus.validation[0], str(directory / "validation.jsonl")
    print(f"\nThe model is in {export}. Try next:")
    if config.data.conversations is not None:
        commands = questions_to_try(export, validation, first, trainer.corpus.tokenizer)
    else:
        usable = accepts(trainer.state.exported)
        commands = commands_to_try(export, validation, first, usable)
    for command in commands:
        print(f"  {command}")


def questions_to_try(export: str, validation: str, document: str, tokenizer: Any) -> list[str]:
    """Return command lines for a new model that answers.

    Args:
        export: path of the model.
        validation: path of its held-out conversations.
        document: a conversation as JSON.
        tokenizer: the model's.
    """
    from textdiff.sampling.template import quoted

    model = _as_argument(export)
    ask = ["textdiff", "chat", model]
    if not tokenizer.chat_template:
        prompt = next(iter(json.loads(document).values()))
        ask = ["textdiff", "generate", model, quoted(prompt)]
    return [
        shlex.join(ask),
        shlex.join(["textdiff", "perplexity", model, _as_argument(validation)]),
    ]


_WORDS = 3
_CHARACTERS = 40  # of a prompt of whole words, so that the command stays a line
_LETTERS = 20  # of a longer word, or of a script that does not part words


def commands_to_try(
    export: str, validation: str, document: str, usable: Callable[[str], bool]
) -> list[str]:
    """Return command lines for a new model.

    Args:
        export: path of the model.
        validation: path of its held-out texts.
        document: a text like those it was trained on.
        usable: returns whether the model can write on after a prompt.
    """
    model, text = _as_argument(export), _as_argument(validation)
    prompt = next((prompt for prompt in _prompts(document) if usable(prompt)), None)
    begin = [] if prompt is None else [prompt]
    commands: Sequence[Sequence[str]] = (
        ["textdiff", "generate", model, *begin, "--watch"],
        ["textdiff", "generate", model, "--num-samples", "4", "--json"],
        ["textdiff", "perplexity", model, text],
    )
    return [shlex.join(command) for command in commands]


def accepts(model: "TextDiffusion") -> Callable[[str], bool]:
    """Return a test of prompts: whether a model takes one, and has as much room again."""

    context = model.model.context

    def usable(prompt: str) -> bool:
        try:
            given = int(model.prepare(prompt).job.tails[0])
        except TextDiffError:  # such as characters that the tokenizer lacks
            return False
        return given <= context // 2

    return usable


def _as_argument(path: str) -> str:
    """Return a path that cannot be taken for a flag."""
    return os.path.join(".", path) if path.startswith("-") else path


def _prompts(document: str) -> Iterator[str]:
    """Yield beginnings of a text that are fit for a command line, the best one first."""
    from textdiff.sampling.template import quoted

    words = [word for word in map(_printable, document[:10_000].split()) if word]
    while words and words[0].startswith("-"):  # would be read as a flag
        words.pop(0)
    for count in range(min(_WORDS, len(words)), 0, -1):
        prompt = " ".join(words[:count])
        if len(prompt) <= _CHARACTERS:
            yield quoted(prompt)
    start = _cut(words[0], _LETTERS) if words else ""
    while start:  # fewer and fewer: a model of bytes needs several for a character
        yield quoted(start)
        start = _cut(start, len(start) // 2)


def _printable(word: str) -> str:
    """Return a word without what a terminal would act on, or not show."""
    return "".join(character for character in word if character.isprintable())


def _cut(text: str, length: int) -> str:
    """Return the first characters of a text; one with marks is left out with them."""
    if len(text) <= length:
        return text
    while length and _joins(text[length]):
        length -= 1
    return text[:length].rstrip()


def _joins(character: str) -> bool:
    """Return whether a character is shown as one with the character before it."""
    return (
        unicodedata.category(character).startswith("M") or "\U0001f3fb" <= character <= "\U0001f3ff"
    )
