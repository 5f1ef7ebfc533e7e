"""`textdiff generate`: text, printed or watched while it is denoised, or for a file of prompts."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import (
    JsonFlag,
    Loading,
    given_text,
)
from textdiff.commands.batch import Batch, generate_batch
from textdiff.commands.sampling import (
    Sampling,
    ShowingOptions,
    read_conversations,
    read_template,
    say_approximate,
)
from textdiff.errors import ConfigError
from textdiff.view.progress import make_console, print_json, quiet_libraries

if TYPE_CHECKING:
    from textdiff.data.conversations import Message
    from textdiff.pipeline import TextDiffusion
    from textdiff.sampling.callbacks import FinishedRow, Generation
    from textdiff.sampling.request import Prompts


@dataclass(frozen=True)
class TextOptions:
    """Number and form of the texts."""

    template: str | None = None
    """File that holds a text with holes; `-` reads standard input."""

    messages: str | None = None
    """JSON file with a conversation to answer, [{"role": "user", "content": ...}], or with a list
    of them; `-` reads standard input."""

    num_samples: int = 1
    """Texts to generate, of each conversation if there are several."""

    batch_size: int = 16
    """Texts generated together (they do not depend on it)."""

    json_output: JsonFlag = False
    """Print one JSON object."""

    def asked(self, prompt: str, suffix: str) -> "str | list[list[Message]]":
        """Return what to go on from: a prompt, a text with holes, or conversations.

        Args:
            prompt: the command line's own.
            suffix: likewise.

        Raises:
            ConfigError: several of them, or a suffix to one that takes none.
            DataError: a file cannot be used.
        """
        if self.messages is None:
            if self.template is None:
                return prompt
            return read_template(self.template, prompt, suffix)
        if prompt or suffix or self.template is not None:
            raise ConfigError(
                "--messages holds all that is given: leave PROMPT, --template and --suffix out",
                code="messages_alone",
            )
        return read_conversations(self.messages)


def generate(
    model: str,
    prompt: str = "",
    /,
    *,
    sampling: Sampling,
    texts: TextOptions,
    showing: ShowingOptions,
    batch: Batch,
    loading: Loading,
) -> int:
    """Generate text. Unset options take the model's own defaults.

    Args:
        model: export or run directory, published checkpoint, or hub id.
        prompt: beginning of the text, or a whole text with holes: [MASK:5] is one of 5 tokens.
        sampling: how text is drawn.
        texts: their number and form.
        showing: what is shown and recorded.
        batch: a file of prompts.
        loading: how the model is loaded.
    """
    options, prompt = sampling.options(), given_text("the prompt", prompt)
    asked = texts.asked(prompt, sampling.suffix)
    counts = {"num_samples": texts.num_samples, "batch_size": texts.batch_size}
    if batch.asked:
        plain = showing == ShowingOptions() and not texts.json_output
        batch.check(bool(asked), plain, *counts.values())
        quiet_libraries()
        return generate_batch(batch, partial(loading.load, model), options, **counts)
    if showing.watch and texts.json_output:
        raise ConfigError("--watch and --json exclude each other")
    showing.check()
    quiet_libraries()
    held = loading.load(model)
    prompts = asked if isinstance(asked, str) else held.chat_prompts(asked)
    task = {"prompts": prompts, **counts, **options}
    return _generate(model, held, task, showing, texts.json_output)


def _generate(
    model: str,
    held: "TextDiffusion",
    task: dict[str, Any],
    showing: ShowingOptions,
    json_output: bool,
) -> int:
    """Generate, and print what is finished, also if the rest is interrupted or not recorded."""
    from textdiff.view.display import TextPrinter, can_animate, live, recording

    console, answers = make_console(), not isinstance(task["prompts"], str)
    animated = showing.watch and can_animate(console)
    recorded = showing.film is not None or showing.trace is not None
    texts = TextPrinter(held, animated or json_output, not recorded, answers)
    done, failure = None, None
    try:
        with ExitStack() as stack:
            callbacks = stack.enter_context(
                recording(held, model, task, showing.film, showing.trace)
            )
            if animated:
                callbacks.append(stack.enter_context(live(console, held, task, answers)))
            done = held.generate(**task, callbacks=[*callbacks, texts])
    except (KeyboardInterrupt, OSError) as error:  # what there is follows
        failure = error
    rows = [texts.done[index] for index in sorted(texts.done)]
    if json_output:
        _print_json(model, task, rows, done)
    elif done is None:
        texts.interrupted()
    else:
        texts.release()
    if done is None:
        print(f"{len(rows)} of {texts.rows} texts were finished", file=sys.stderr)
    if failure is not None:
        raise failure
    say_approximate(task["cache"])
    _say_beyond(held, max(len(row.tokens) for row in rows), task)
    _say_unseen(held, task["prompts"], task["suffix"])
    return 0


def _print_json(
    model: str,
    task: dict[str, Any],
    rows: "Sequence[FinishedRow]",
    done: "Generation | None",
) -> None:
    """Print one object with all samples, of an interrupted generation with the finished ones."""
    figures: dict[str, Any] = {"interrupted": True}
    if done is not None:
        figures = {"calls": done.calls, "tokens_per_forward": done.tokens_per_forward}
        figures |= {"prompt_lost": list(done.lost)} if done.lost else {}
    keys = ("text", "completion", "holes", "tokens")
    samples = [{key: getattr(row, key) for key in keys} for row in rows]
    given: dict[str, Any] = {"prompt": task["prompts"]}
    if not isinstance(task["prompts"], str):
        talks = [[vars(message) for message in prompt.messages] for prompt in task["prompts"]]
        given = {"messages": talks if len(talks) > 1 else talks[0]}
        samples = [
            {"conversation": row.index // task["num_samples"], **sample}
            for row, sample in zip(rows, samples, strict=True)
        ]
    print_json({"model": model, **given, "seed": task["seed"], **figures, "samples": samples})


def _say_beyond(model: "TextDiffusion", length: int, options: dict[str, Any]) -> None:
    """Report how a text came to be longer than the texts that the network was trained on."""
    limit, context = model.context_limit, model.context_limit.context
    if length <= context:
        return
    if limit.block_size is None:
        stride = limit.stride(options["stride"])
        how = f"written {stride} tokens at a time, each time from the last {context - stride}"
    elif options["window"] == 0:
        how = "every block saw all before it, which is exact but farther than in training"
    else:
        window = limit.window(options["window"], length)
        how = (
            f"blocks saw the {window} tokens before them; with a cache that is an approximation "
            "(--cache off is exact in the window, --window 0 sees all)"
        )
    print(f"note: {length} tokens, the model's context is {context}: {how}", file=sys.stderr)


def _say_unseen(model: "TextDiffusion", prompt: "Prompts", suffix: str) -> None:
    """Report what a model in blocks does not see of a text that goes on after a hole."""
    from textdiff.sampling.template import pieces_of

    size = model.family.block_size
    if not isinstance(prompt, str):  # conversations have no holes
        return
    if size is not None and (suffix or any(isinstance(p, int) for p in pieces_of(prompt)[:-1])):
        print(
            f"note: the model writes in blocks of {size} tokens and sees nothing of the blocks "
            "after the one it writes: fixed text there did not shape what comes before",
            file=sys.stderr,
        )
