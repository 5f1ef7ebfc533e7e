"""`textdiff play`: a prompt that keeps the model loaded.

A line is a prompt; it is denoised on the spot, with the settings of the session. A line that begins
with a slash is a command, with two slashes a prompt that begins with one.
"""

import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING

from textdiff.commands.arguments import Loading, given_text
from textdiff.commands.sampling import Sampling
from textdiff.errors import TextDiffError
from textdiff.signals import Interruption
from textdiff.view.progress import make_console, quiet_libraries

if TYPE_CHECKING:
    from textdiff.commands.session import Session

_PROMPT = "textdiff> "


def play(
    model: str = "demo",
    /,
    *,
    sampling: Sampling,
    loading: Loading,
) -> int:
    """Try a model: type prompts, change settings, watch texts being denoised.

    /help lists the commands. Ctrl-C stops a text, Ctrl-D ends the session. Lines can be piped in:
    the exit code is then 1 if one of them was an error.

    Args:
        model: export or run directory, published checkpoint, or hub id.
        sampling: how text is drawn, to begin with.
        loading: how the model is loaded.
    """
    sampling.options()
    quiet_libraries()
    held = loading.load(model)
    from textdiff.commands.session import Session

    session = Session(held, model, sampling, make_console())
    session.check()
    by_hand = sys.stdin.isatty()
    if by_hand:
        _use_readline(session)
        print(session.greeting())
    elif isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")  # as files are read, whatever the locale says
    return _loop(session, by_hand)


def _loop(session: "Session", by_hand: bool) -> int:
    """Run lines until there are no more, or the session is over."""
    failed = False
    while not session.over:
        try:
            line = input(_PROMPT if by_hand else "")
        except (EOFError, OSError):  # an error: the terminal is gone
            if by_hand:
                print()
            break
        except Interruption:
            raise
        except KeyboardInterrupt:  # what was typed is dropped, as in a shell
            print()
            if by_hand:
                continue
            raise
        except UnicodeDecodeError:
            print("textdiff: error: the line is not UTF-8", file=sys.stderr)
            failed = True
            continue
        try:
            session.take(given_text("the line", line))
        except TextDiffError as error:
            print(f"textdiff: error: {error}", file=sys.stderr, flush=True)
            failed = True
        except Interruption:
            raise
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr, flush=True)
            if not by_hand:
                raise
    return 1 if failed and not by_hand else 0


def _use_readline(session: "Session") -> None:
    """Set up history and completion of commands and names, where Python has readline."""
    try:
        import readline
    except ImportError:
        return
    readline.set_completer_delims(" ")
    line = readline.get_line_buffer
    readline.set_completer(lambda word, number: session.completion(line(), number))
    backwards = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if backwards else "tab: complete")
