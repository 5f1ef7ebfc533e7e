"""`textdiff generate`: text, printed or watched while it is denoised."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from textdiff.commands.arguments import BlockSize, Dtype, JsonFlag, ModelArgument, held_model
from textdiff.commands.terminal import make_console, quiet_libraries
from textdiff.errors import ConfigError

if TYPE_CHECKING:
    from textdiff.pipeline import TextDiffusion


def generate(
    model: ModelArgument,
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = "",
    /,
    max_new_tokens: int | None = None,
    steps: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    rule: str | None = None,
    seed: int = 0,
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
        prompt: beginning of the text.
        max_new_tokens: tokens to generate.
        steps: denoising steps; more steps, better text, at most one network call each.
        temperature: 0 takes the most likely token, 1 draws from the model.
        top_p: draw among the most likely tokens up to this much probability.
        top_k: draw among the k most likely tokens.
        rule: decoding rule.
        seed: seed; the same seed gives the same text.
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
    quiet_libraries()
    held = held_model(model, device, dtype, block_size)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "steps": steps,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "rule": rule,
    }
    console = make_console()
    if watch and console.is_terminal:
        return watch_rows(console, held, prompt, num_samples, seed, options)
    done = held.generate(
        prompt, num_samples=num_samples, seed=seed, batch_size=batch_size, **options
    )
    if json_output:
        samples = [
            {"text": text, "completion": completion, "tokens": ids}
            for text, completion, ids in zip(
                done.texts, done.completions, done.sequences, strict=True
            )
        ]
        print(
            json.dumps(
                {
                    "model": model,
                    "prompt": prompt,
                    "seed": seed,
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


def watch_rows(
    console: Any,
    model: "TextDiffusion",
    prompt: str,
    num_samples: int,
    seed: int,
    options: dict[str, Any],
) -> int:
    """Animates the denoising of one prompt's samples, then prints them."""
    from textdiff.data import encode_documents
    from textdiff.view import watch

    length = len(encode_documents(model.tokenizer, [prompt])[0])
    steps = options.get("steps") or model.defaults.max_denoising_steps
    stream = model.stream(prompt, num_samples=num_samples, seed=seed, **options)
    last = watch(console, model, stream, prompts=[length] * num_samples, planned=steps)
    if last is not None:
        texts = model.finished(last.canvas.tolist(), [length] * num_samples)
        print("\n\n---\n\n".join(texts))
    return 0
