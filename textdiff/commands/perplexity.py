"""`textdiff perplexity`: what a model makes of texts, as a number with its error."""

import json

from textdiff.commands.arguments import (
    Dtype,
    JsonFlag,
    ModelArgument,
    TextArgument,
    checked_device,
    fraction,
    read_given,
)
from textdiff.commands.terminal import ProgressBar, quiet_libraries
from textdiff.errors import ConfigError


def perplexity(
    model: ModelArgument,
    text: TextArgument,
    /,
    replicates: int = 8,
    precision: str | None = None,
    seed: int = 0,
    batch_tokens: int = 8192,
    text_column: str = "text",
    device: str | None = None,
    dtype: Dtype = "float32",
    json_output: JsonFlag = False,
) -> int:
    """Bound the perplexity of texts: unbiased, with its Monte-Carlo error.

    Args:
        model: export directory, run directory or hub id.
        text: .txt, .jsonl or .parquet files, folders or globs of them; `-` reads standard input.
        replicates: independent estimates that the error comes from, at least 8.
        precision: add replicates until the 95 % interval of the perplexity is this narrow on either
            side, such as 0.5%.
        seed: seed of the noise.
        batch_tokens: tokens per network call (the result does not depend on it beyond rounding).
        text_column: column or key that holds the text in .jsonl and .parquet files.
        device: torch device; the default is CUDA if there is one, else the CPU.
        dtype: dtype of the network; normalisation is float32 or wider in any case.
        json_output: print one JSON object.
    """
    if replicates < 8:
        raise ConfigError(f"--replicates {replicates}: give at least 8, the error comes from them")
    wanted = None if precision is None else fraction(precision)
    if batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {batch_tokens}: give at least 1")
    if not text:
        raise ConfigError("no text given: name one or more files, or - for standard input")
    quiet_libraries()
    texts = read_given(text, text_column)
    from textdiff.pipeline import TextDiffusion
    from textdiff.view import describe_bound

    held = TextDiffusion.from_pretrained(model, checked_device(device), dtype)
    with ProgressBar("scoring windows") as progress:
        bound = held.estimate(
            texts,
            seed=seed,
            replicates=replicates,
            precision=wanted,
            batch_tokens=batch_tokens,
            progress=progress,
        ).bound()
    if json_output:
        print(
            json.dumps({"model": model, "seed": seed, "dtype": dtype, **bound.to_dict()}, indent=2)
        )
        return 0
    low, high = bound.perplexity_interval()
    print(describe_bound(bound))
    print(f"95 % interval of the perplexity (Monte-Carlo error): {low:.3f} to {high:.3f}")
    if bound.text_stderr is not None:
        print(
            f"standard error over {bound.documents} documents: {bound.text_stderr:.4f} nats/token"
        )
    kind = "an upper bound" if bound.is_bound else "NOT a bound"
    print(
        f"{bound.tokens:,} tokens, {bound.bytes:,} bytes; estimator {bound.estimator}, "
        f"{bound.replicates} replicates, seed {seed}; {kind} in expectation"
    )
    return 0
