"""The door: `textdiff VERB …`. Verbs are plain functions; their signatures are the flags.

Exit codes: 0 done, 1 an error, 2 wrong usage or config, 130 interrupted by Ctrl-C and 143 by
SIGTERM with everything saved. Heavy imports wait until a verb needs them.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from textdiff import __version__
from textdiff.errors import ConfigError, TextDiffError

if TYPE_CHECKING:
    from textdiff.config import Config
    from textdiff.pipeline import TextDiffusion

Dtype = Literal["float32", "float64", "bfloat16"]
ModelArgument = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
TextArgument = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT...")]

USAGE = """\
usage: textdiff VERB ...

discrete text-diffusion language models

  train CONFIG [--section.key VALUE]    pretrain on a text corpus (resumes by itself)
  perplexity MODEL TEXT...              bound the perplexity of text files
  generate MODEL [PROMPT]               generate text; --watch shows it being denoised
  tokenizer train OUTPUT TEXT...        train a tokenizer on text files
  config show FILE [--section.key VALUE]    print the resolved config

Every verb explains itself with --help. --debug shows tracebacks, --version the version.
"""


# --- verbs ---------------------------------------------------------------------------------------


def train(arguments: Sequence[str]) -> int:
    """`textdiff train CONFIG [--resume auto|never|PATH] [--section.key VALUE ...]`."""
    arguments, resume = _take_option(list(arguments), "--resume", "auto")
    config = _load_config(arguments, "textdiff train", "[--resume auto|never|PATH] ")
    _quiet_libraries()
    from textdiff.data import prepare_corpus
    from textdiff.train.trainer import Trainer, make_accelerator
    from textdiff.view import training_view

    accelerator = make_accelerator(config)
    console = _console()
    view = training_view(console)
    if resume == "never" and accelerator.is_main_process:
        _set_aside(Path(config.run.dir), view.message)
    accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        corpus = prepare_corpus(config.data, config.tokenizer, config.run.seed)
    trainer = Trainer(config, corpus, accelerator, view, resume)
    try:
        signal = trainer.run()
    finally:
        _close(view)
    if not accelerator.is_main_process:
        return 128 + signal if signal else 0
    if signal:
        again = shlex.join(["textdiff", "train", *arguments])
        view.message(f"stopped at step {trainer.progress.step}, everything saved; continue with")
        view.message(f"  {again}")
        return 128 + signal
    _show_result(console, config, trainer)
    return 0


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
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
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
    wanted = None if precision is None else _fraction(precision)
    if batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {batch_tokens}: give at least 1")
    if not text:
        raise ConfigError("no text given: name one or more files, or - for standard input")
    _quiet_libraries()
    texts = _read_texts(text, text_column)
    from textdiff.pipeline import TextDiffusion
    from textdiff.view import describe_bound

    held = TextDiffusion.from_pretrained(model, _device(device), dtype)
    with _progress("scoring windows") as progress:
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
    watch: bool = False,
    device: str | None = None,
    dtype: Dtype = "float32",
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
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
        watch: animate the denoising in the terminal.
        device: torch device; the default is CUDA if there is one, else the CPU.
        dtype: dtype of the network.
        json_output: print one JSON object.
    """
    if watch and json_output:
        raise ConfigError("--watch and --json exclude each other")
    _quiet_libraries()
    from textdiff.pipeline import TextDiffusion

    held = TextDiffusion.from_pretrained(model, _device(device), dtype)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "steps": steps,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "rule": rule,
    }
    console = _console()
    if watch and console.is_terminal:
        return _watch(console, held, prompt, num_samples, seed, options)
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


def train_tokenizer(
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")],
    text: TextArgument,
    /,
    kind: Literal["bpe", "char", "byte"] = "bpe",
    vocab_size: int = 2048,
    text_column: str = "text",
) -> int:
    """Train a tokenizer and save it; use it with `tokenizer: {kind: pretrained, path: OUTPUT}`.

    Args:
        output: folder to write.
        text: .txt, .jsonl or .parquet files, folders or globs of them; `-` reads standard input.
        kind: byte-level BPE, characters, or bytes.
        vocab_size: size of a bpe vocabulary, special tokens included.
        text_column: column or key that holds the text in .jsonl and .parquet files.
    """
    from textdiff.config import BpeTokenizer, ByteTokenizer, CharTokenizer

    if kind == "bpe" and vocab_size < 260:
        raise ConfigError(f"--vocab-size {vocab_size}: give at least 260 (256 bytes and specials)")
    if not text:
        raise ConfigError("no text given: name one or more files, or - for standard input")
    _quiet_libraries()
    texts = _read_texts(text, text_column)
    from textdiff.data import encode_documents
    from textdiff.data import train_tokenizer as fit

    section: BpeTokenizer | CharTokenizer | ByteTokenizer
    if kind == "bpe":
        section = BpeTokenizer(vocab_size=vocab_size)
    else:
        section = CharTokenizer() if kind == "char" else ByteTokenizer()
    tokenizer = fit(section, texts)
    tokenizer.save_pretrained(output)
    tokens = sum(len(ids) for ids in encode_documents(tokenizer, texts))
    size = sum(len(t.encode()) for t in texts)
    print(
        f"{output}: {kind} tokenizer of {len(tokenizer):,} ids, {size / tokens:.2f} bytes per token"
    )
    return 0


def show_config(arguments: Sequence[str]) -> int:
    """`textdiff config show FILE [--section.key VALUE ...]`."""
    from textdiff.config import to_yaml

    print(to_yaml(_load_config(arguments, "textdiff config show")), end="")
    return 0


# --- dispatch ------------------------------------------------------------------------------------


def _typed(function: Callable[..., int], prog: str) -> Callable[[Sequence[str]], int]:
    """A verb whose flags tyro reads from the function's signature."""

    def run(arguments: Sequence[str]) -> int:
        return tyro.cli(
            function, prog=prog, args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,)
        )

    return run


VERBS: dict[tuple[str, ...], Callable[[Sequence[str]], int]] = {
    ("train",): train,
    ("perplexity",): _typed(perplexity, "textdiff perplexity"),
    ("generate",): _typed(generate, "textdiff generate"),
    ("tokenizer", "train"): _typed(train_tokenizer, "textdiff tokenizer train"),
    ("config", "show"): show_config,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb and turns the user's errors into one sentence on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except TextDiffError as error:
        if debug:
            raise
        print(f"textdiff: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if debug:
            raise
        if isinstance(error, BrokenPipeError):  # the reader went away: nobody to tell
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"textdiff: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("textdiff: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"textdiff {__version__}")
        return 0
    for length in (2, 1):
        verb = VERBS.get(tuple(words[:length]))
        if verb is not None:
            code = verb(words[length:])
            sys.stdout.flush()
            return code
    import difflib

    names = [" ".join(verb) for verb in VERBS]
    near = difflib.get_close_matches(" ".join(words[:2]), names, n=1, cutoff=0.4)
    near = near or difflib.get_close_matches(words[0], names, n=1, cutoff=0.4)
    hint = f"did you mean `textdiff {near[0]}`?" if near else f"there are: {', '.join(names)}"
    raise ConfigError(f"unknown command `{' '.join(words[:2])}`; {hint}")


# --- pieces of verbs -----------------------------------------------------------------------------


def _load_config(arguments: Sequence[str], prog: str, extra: str = "") -> "Config":
    from textdiff.config import load

    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: {prog} CONFIG {extra}[--section.key VALUE ...]")
        print("Give a config file before --help to see every option with its current value.")
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(
            f"no config file given: {prog} CONFIG, for example configs/quickstart.yaml"
        )
    return load(arguments[0], arguments[1:], prog=f"{prog} {arguments[0]} {extra}".strip())


def _take_option(words: list[str], name: str, default: str) -> tuple[list[str], str]:
    for index, word in enumerate(words):
        if word.startswith(f"{name}="):
            return words[:index] + words[index + 1 :], word.split("=", 1)[1]
        if word == name:
            if index + 1 == len(words):
                raise ConfigError(f"{name} needs a value: auto, never or the path of a checkpoint")
            return words[:index] + words[index + 2 :], words[index + 1]
    return words, default


def _set_aside(directory: Path, tell: Callable[[str], None]) -> None:
    """Moves an earlier run out of the way instead of deleting it."""
    if not (directory / "checkpoints").exists() and not (directory / "metrics.jsonl").exists():
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}.old-{number}")).exists():
        number += 1
    directory.rename(aside)
    tell(f"moved the earlier run to {aside}")


def _show_result(console: Any, config: "Config", trainer: Any) -> None:
    from textdiff.view import describe_bound

    directory = Path(config.run.dir)
    console.print(f"\nvalidation: {describe_bound(trainer.bound)}", highlight=False, soft_wrap=True)
    model = trainer.exported
    with trainer.ema.applied(model.model):
        if config.sample.num_samples:
            if console.is_terminal:
                _watch(console, model, "", config.sample.num_samples, config.run.seed, {})
            else:
                drawn = model.generate(
                    "", num_samples=config.sample.num_samples, seed=config.run.seed
                )
                print("\n" + "\n\n---\n\n".join(drawn.texts))
    export = str(directory / "export")
    prompt = " ".join(trainer.corpus.validation[0].split()[:3])
    commands = [
        ["textdiff", "generate", export, prompt, "--watch"],
        ["textdiff", "generate", export, "--num-samples", "4", "--json"],
        ["textdiff", "perplexity", export, str(directory / "validation.jsonl")],
    ]
    print(f"\nThe model is in {export}. Try next:")
    for command in commands:
        print(f"  {shlex.join(command)}")


def _watch(
    console: Any,
    model: "TextDiffusion",
    prompt: str,
    num_samples: int,
    seed: int,
    options: dict[str, Any],
) -> int:
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


def _read_texts(names: Sequence[str], text_column: str) -> list[str]:
    from textdiff.data import read_texts
    from textdiff.errors import DataError

    texts: list[str] = []
    for name in names:
        if name != "-":
            texts += read_texts([name], text_column)
            continue
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 text (byte {error.start})") from None
        if not text.strip():
            raise DataError("standard input is empty; pipe a text into it")
        texts.append(text)
    return texts


def _fraction(words: str) -> float:
    try:
        value = float(words.removesuffix("%")) / (100.0 if words.endswith("%") else 1.0)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise ConfigError(f"--precision {words}: give a share such as 0.5% or 0.005")
    return value


def _device(name: str | None) -> str | None:
    if name is None:
        return None
    import torch

    try:
        torch.empty(0, device=name)
    except Exception as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def _console() -> Any:
    from rich.console import Console

    return Console()


def _close(view: Any) -> None:
    if hasattr(view, "close"):
        view.close()


class _progress:
    """A progress bar on standard error while entered; silent where that is no terminal."""

    def __init__(self, title: str):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.bar = Progress(console=console, disable=not console.is_terminal, transient=True)
        self.task = self.bar.add_task(title, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self.bar.start()
        return lambda done, total: self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def _quiet_libraries() -> None:
    """One voice on the screen: the libraries' own bars and warnings are off."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
