"""The command line `textdiff VERB …`: the table of verbs, and their exit codes.

Exit codes: 0 done, 1 an error, 2 wrong usage or config, 130 interrupted by Ctrl-C, 143 by SIGTERM
and 129 by SIGHUP with everything saved. Heavy imports wait until a verb needs them.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence

from textdiff import __version__
from textdiff.commands.chat import chat
from textdiff.commands.compare import compare
from textdiff.commands.convert import convert
from textdiff.commands.data import inspect_data, prepare_data, show_config
from textdiff.commands.doctor import doctor
from textdiff.commands.evaluate import evaluate
from textdiff.commands.export import export
from textdiff.commands.flags import parse_verb
from textdiff.commands.generate import generate
from textdiff.commands.parallel import spin_briefly
from textdiff.commands.perplexity import perplexity
from textdiff.commands.plan import plan
from textdiff.commands.play import play
from textdiff.commands.tokenizer import train_tokenizer
from textdiff.commands.train import train
from textdiff.errors import ConfigError, LostProcessError, TextDiffError
from textdiff.signals import exit_code, interruptible
from textdiff.view.streams import check_written, safe_streams

USAGE = """\
usage: textdiff VERB ...

discrete text-diffusion language models

  train CONFIG [--section.key VALUE]  pretrain on a corpus (resumes by itself)
  perplexity MODEL TEXT...            bound the perplexity of text files
  compare MODEL_A MODEL_B TEXT...     which model a text prefers, how surely
  evaluate MODEL --judge LM           how good its texts are, beside real ones
  evaluate MODEL --tasks NAMES        tasks of lm-evaluation-harness
  generate MODEL [PROMPT]             generate text; --watch shows how
  play MODEL                          type prompts and settings, watch texts
  chat MODEL                          talk to a model by its chat template
  convert SOURCE TARGET               published checkpoint to an export
  export MODEL FOLDER [--format sdar] write a model for other programs
  data prepare CONFIG                 tokenise the corpus ahead of training
  data inspect CONFIG                 what the corpus holds, and its tokens
  tokenizer train OUTPUT TEXT...      train a tokenizer on text files
  config show CONFIG                  print the resolved config
  plan CONFIG [--memory 80GB]         memory and time of a run, before it
  doctor                              what can run here; for bug reports

Every verb explains itself with --help.
--debug shows tracebacks, --version the version.
"""


VERBS: dict[tuple[str, ...], Callable[..., int]] = {
    ("train",): train,
    ("perplexity",): perplexity,
    ("compare",): compare,
    ("evaluate",): evaluate,
    ("generate",): generate,
    ("play",): play,
    ("chat",): chat,
    ("convert",): convert,
    ("export",): export,
    ("data", "prepare"): prepare_data,
    ("data", "inspect"): inspect_data,
    ("tokenizer", "train"): train_tokenizer,
    ("config", "show"): show_config,
    ("plan",): plan,
    ("doctor",): doctor,
}

_READ_CONFIGS = {train, prepare_data, inspect_data, show_config, plan}
"""Verbs that take their command line as it is: its flags are those of a config."""

_WRITES_FILES = {("train",), ("convert",), ("export",), ("data", "prepare"), ("tokenizer", "train")}
"""Verbs whose result is not what they print."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and turns the user's errors into one sentence on standard error.

    Returns:
        The exit code. One of several processes does not return, it ends here.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    spin_briefly()
    with safe_streams(), interruptible():
        code = _guarded([word for word in words if word != "--debug"], "--debug" in words)
        _leave_others(code)
    return code


def _guarded(words: list[str], debug: bool) -> int:
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        if code == 0 and not {tuple(words[:1]), tuple(words[:2])} & _WRITES_FILES:
            check_written(sys.stdout)
        return code
    except TextDiffError as error:
        if debug:
            raise
        _say(f"textdiff: error: {error}", everywhere=isinstance(error, LostProcessError))
        return error.exit_code
    except OSError as error:
        if debug:
            raise
        _say(f"textdiff: error: {_refusal(error)}")
        return 1
    except UnicodeEncodeError as error:
        if debug or not any("\ud800" <= character <= "\udfff" for character in error.object):
            raise
        _say(f"textdiff: error: {error.object[:80]!a} holds bytes that are not UTF-8; rename it")
        return 1
    except Exception as error:
        limit = _limit_of_torch(error)
        if debug or limit is None:
            raise
        _say(f"textdiff: error: {limit}", everywhere=True)
        return 1
    except KeyboardInterrupt as stop:
        _say("textdiff: interrupted")
        return exit_code(stop)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2


def _refusal(error: OSError) -> str:
    """Return what the system refused, in words: the file first."""
    if not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def _limit_of_torch(error: Exception) -> str | None:
    """Return what to do about a limit of the GPU's memory or of compilation; None: it is none."""
    torch, compiler = (sys.modules.get(name) for name in ("torch", "torch._dynamo.exc"))
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        what = str(error).partition(". GPU")[0].splitlines()[0]
        return (
            f"{what}; use fewer rows at a time (train.micro_batch_size, which a resumed run may "
            "change; --batch-size) or model.gradient_checkpointing: true; textdiff plan counts "
            "memory"
        )
    if compiler is not None and isinstance(error, compiler.FailOnRecompileLimitHit):
        return (
            "torch.compile has made more variants of a block than are allowed, and would compute "
            "the next one slowly; set train.compile: false or model.attn_implementation: sdpa, and "
            "report it"
        )
    return None


def _leave_others(code: int) -> None:
    """End a process that shares its job with others, without taking the interpreter down.

    Gloo's threads release the tensors of the last exchange at a time of their own, and need the
    interpreter's lock for that. If the groups are destroyed before, under that lock, or the
    interpreter ends, the process hangs or aborts, and its launcher waits for it.
    """
    torch = sys.modules.get("torch.distributed")
    if torch is None or not (torch.is_available() and torch.is_initialized()):
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _say(message: str, everywhere: bool = False) -> None:
    """Print one line on standard error, from the first process alone unless `everywhere`."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"textdiff {__version__}")
        return 0
    for length in (2, 1):
        verb = tuple(words[:length])
        if verb in VERBS:
            function, rest = VERBS[verb], words[length:]
            if function in _READ_CONFIGS:
                return function(rest)
            return parse_verb(function, f"textdiff {' '.join(verb)}", rest)()
    names = [" ".join(verb) for verb in VERBS]
    near = ["plan"] if words[0] == "estimate" else []  # its name in earlier checkouts
    near = near or difflib.get_close_matches(" ".join(words[:2]), names, n=1, cutoff=0.4)
    near = near or difflib.get_close_matches(words[0], names, n=1, cutoff=0.4)
    hint = f"did you mean `textdiff {near[0]}`?" if near else f"there are: {', '.join(names)}"
    raise ConfigError(f"unknown command `{' '.join(words[:2])}`; {hint}")


if __name__ == "__main__":
    sys.exit(main())
