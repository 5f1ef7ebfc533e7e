"""`textdiff generate`: text, printed or watched while it is denoised, or for a file of prompts."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import (
    BlockSize,
    Dtype,
    JsonFlag,
    ModelArgument,
    ShowingOptions,
    given_text,
    held_model,
)
from textdiff.commands.batch import Batch, generate_batch
from textdiff.commands.sampling import Sampling, read_template, say_approximate
from textdiff.errors import ConfigError
from textdiff.view.progress import make_console, print_json, quiet_libraries

if TYPE_CHECKING:
    from textdiff.generation import Generation
    from textdiff.pipeline import TextDiffusion
    from textdiff.watching import FinishedRow


def generate(
    model: ModelArgument,
    prompt: str = "",
    /,
    *,
    sampling: Sampling,
    template: str | None = None,
    showing: ShowingOptions,
    batch: Batch,
    num_samples: int = 1,
    batch_size: int = 16,
    block_size: BlockSize = None,
    device: str | None = None,
    dtype: Dtype = "float32",
    json_output: JsonFlag = False,
) -> int:
    """Generate text. Unset options take the model's own defaults.

    Args:
        model: export directory, run directory or hub id.
        prompt: beginning of the text, or a whole text with holes: [MASK:5] is one of 5 tokens.
        sampling: how text is drawn.
        template: file that holds such a text; `-` reads standard input.
        showing: what is shown and recorded.
        batch: a file of prompts.
        num_samples: texts to generate.
        batch_size: texts generated together (they do not depend on it).
        block_size: tokens per block, of those that the model was trained in, or full; the default
            is the first of them.
        device: torch device; the default is CUDA if there is one, else the CPU.
        dtype: dtype of the network.
        json_output: print one JSON object.
    """
    options, prompt = sampling.options(), given_text("the prompt", prompt)
    if template is not None:
        prompt = read_template(template, prompt, sampling.suffix)
    if batch.asked:
        batch.check(prompt, showing, json_output, (num_samples, batch_size))
        quiet_libraries()
        return generate_batch(
            model,
            batch,
            options,
            num_samples=num_samples,
            batch_size=batch_size,
            held=lambda where: held_model(model, device or where, dtype, block_size),
        )
    if showing.watch and json_output:
        raise ConfigError("--watch and --json exclude each other")
    showing.check()
    quiet_libraries()
    held = held_model(model, device, dtype, block_size)
    task = {"prompts": prompt, "num_samples": num_samples, "batch_size": batch_size, **options}
    return _generate(model, held, task, showing, json_output)


def _generate(
    model: str,
    held: "TextDiffusion",
    task: dict[str, Any],
    showing: ShowingOptions,
    json_output: bool,
) -> int:
    """Generates, and prints what is finished, also if the rest is interrupted or not recorded."""
    from textdiff.view.display import TextPrinter, can_animate, live, recording

    console = make_console()
    animated = showing.watch and can_animate(console)
    recorded = showing.film is not None or showing.trace is not None
    texts = TextPrinter(held, held=animated or json_output, alone=not recorded)
    done, failure = None, None
    try:
        with ExitStack() as stack:
            watchers = stack.enter_context(
                recording(held, model, task, showing.film, showing.trace)
            )
            if animated:
                watchers.append(stack.enter_context(live(console, held, task)))
            done = held.generate(**task, watchers=[*watchers, texts])
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
    """One object with all samples; those that were finished, where the rest was interrupted."""
    figures: dict[str, Any] = {"interrupted": True}
    if done is not None:
        figures = {"calls": done.calls, "tokens_per_forward": done.tokens_per_forward}
        figures |= {"prompt_lost": list(done.lost)} if done.lost else {}
    samples = [
        {
            "text": row.text,
            "completion": row.completion,
            "holes": row.holes,
            "tokens": row.tokens,
        }
        for row in rows
    ]
    record = {"model": model, "prompt": task["prompts"], "seed": task["seed"], **figures}
    print_json({**record, "samples": samples})


def _say_beyond(model: "TextDiffusion", length: int, options: dict[str, Any]) -> None:
    """Says how a text came to be longer than what the network was trained on."""
    context = model.model.config.max_position_embeddings
    if length <= context:
        return
    window, stride = options.get("window"), options.get("stride")
    if model.family.block_size is None:
        stride = stride or max(1, context // 2)
        how = f"written {stride} tokens at a time, each time from the last {context - stride}"
    elif window == 0:
        how = "every block saw all before it, which is exact but farther than in training"
    else:
        size = model.family.block_size
        window = window or max(size, (context - size) // size * size)
        how = (
            f"blocks saw the {window} tokens before them; with a cache that is an approximation "
            "(--cache off is exact in the window, --window 0 sees all)"
        )
    print(f"note: {length} tokens, the model's context is {context}: {how}", file=sys.stderr)


def _say_unseen(model: "TextDiffusion", prompt: str, suffix: str) -> None:
    """Says what a model in blocks does not see of a text that goes on after a hole."""
    from textdiff.template import pieces_of

    size = model.family.block_size
    if size is not None and (suffix or any(isinstance(p, int) for p in pieces_of(prompt)[:-1])):
        print(
            f"note: the model writes in blocks of {size} tokens and sees nothing of the blocks "
            "after the one it writes: given text there did not shape what comes before",
            file=sys.stderr,
        )
