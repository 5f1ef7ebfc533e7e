"""`textdiff generate`: text, printed or watched while it is denoised."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from textdiff.commands.arguments import BlockSize, Dtype, JsonFlag, ModelArgument, held_model
from textdiff.commands.sampling import SamplingFlags, read_template
from textdiff.commands.terminal import make_console, quiet_libraries
from textdiff.errors import ConfigError

if TYPE_CHECKING:
    from textdiff.pipeline import TextDiffusion


def generate(
    model: ModelArgument,
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = "",
    /,
    *,
    sampling: SamplingFlags,
    template: str | None = None,
    num_samples: int = 1,
    batch_size: int = 16,
    block_size: BlockSize = None,
    watch: bool = False,
    device: str | None = None,
    dtype: Dtype = "float32",
    json_output: JsonFlag = False,
) -> int:
    """Generate text. Unset options take the model's own defaults.

    Args:
        model: export directory, run directory or hub id.
        prompt: beginning of the text, or a whole text with holes: [MASK:5] is one of 5 tokens.
        sampling: how text is drawn.
        template: file that holds such a text.
        num_samples: texts to generate.
        batch_size: texts generated together (they do not depend on it).
        block_size: tokens per block, of those that the model was trained in, or full; the default
            is the first of them.
        watch: animate the denoising in the terminal.
        device: torch device; the default is CUDA if there is one, else the CPU.
        dtype: dtype of the network.
        json_output: print one JSON object.
    """
    if watch and json_output:
        raise ConfigError("--watch and --json exclude each other")
    options = sampling.options()
    if template is not None:
        prompt = read_template(template, prompt, sampling.suffix)
    quiet_libraries()
    held = held_model(model, device, dtype, block_size)
    console = make_console()
    if watch and console.is_terminal:
        return watch_rows(console, held, prompt, num_samples, options)
    done = held.generate(prompt, num_samples=num_samples, batch_size=batch_size, **options)
    _say_beyond(held, max(map(len, done.sequences)), options)
    _say_unseen(held, prompt, sampling.suffix)
    if json_output:
        parts = (done.texts, done.completions, done.holes, done.sequences)
        samples = [
            {"text": text, "completion": completion, "holes": holes, "tokens": ids}
            for text, completion, holes, ids in zip(*parts, strict=True)
        ]
        print(
            json.dumps(
                {
                    "model": model,
                    "prompt": prompt,
                    "seed": sampling.seed,
                    "calls": done.calls,
                    "tokens_per_forward": done.tokens_per_forward,
                    "samples": samples,
                },
                indent=2,
                ensure_ascii=False,
            )
        )
    else:
        print("\n\n---\n\n".join(done.texts))
    return 0


def _say_beyond(model: "TextDiffusion", length: int, options: dict[str, Any]) -> None:
    """Says how a text came to be longer than what the network was trained on."""
    import sys

    context = model.model.config.max_position_embeddings
    if length <= context:
        return
    window, stride = options["window"], options["stride"]
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
    import sys

    from textdiff.template import pieces_of

    size = model.family.block_size
    if size is not None and (suffix or any(isinstance(p, int) for p in pieces_of(prompt)[:-1])):
        print(
            f"note: the model writes in blocks of {size} tokens and sees nothing of the blocks "
            "after the one it writes: given text there did not shape what comes before",
            file=sys.stderr,
        )


def watch_rows(
    console: Any,
    model: "TextDiffusion",
    prompt: str,
    num_samples: int,
    options: dict[str, Any],
) -> int:
    """Animates the denoising of one prompt's samples, then prints them."""
    from textdiff.view import watch

    ordered = {name: value for name, value in options.items() if name != "cache"}
    job = model.order(prompt, num_samples=num_samples, **ordered).job
    steps = options.get("steps") or model.defaults.max_denoising_steps
    stream = model.stream(prompt, num_samples=num_samples, **options)
    last = watch(console, model, stream, prompts=job.onwards[:, 0].tolist(), planned=steps)
    if last is not None:
        texts = model.finished(last.canvas.tolist(), job.tails.tolist())
        print("\n\n---\n\n".join(texts))
    return 0
