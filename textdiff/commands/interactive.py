"""The loop of interactive verbs: lines from a terminal or a pipe, until a session is over."""

import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING

from textdiff.commands.arguments import given_text
from textdiff.errors import TextDiffError
from textdiff.signals import Interruption

if TYPE_CHECKING:
    from textdiff.commands.session import Session


def run_session(session: "Session", prompt: str) -> int:
    """Take lines until there are no more, or the session is over.

    Args:
        session: takes the lines.
        prompt: shown where a line is typed by hand.

    Returns:
        1 if lines were piped in, and one of them was an error.

    Raises:
        ConfigError: a setting to begin with does not fit the model.
    """
    session.check()
    by_hand = sys.stdin.isatty()
    if by_hand:
        _use_readline(session)
        print(session.greeting())
    elif isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")  # as files are read, whatever the locale says
    return _loop(session, prompt if by_hand else "", by_hand)


def _loop(session: "Session", prompt: str, by_hand: bool) -> int:
    """Run lines until there are no more, or the session is over."""
    failed = False
    while not session.over:
        try:
            line = input(prompt)
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
