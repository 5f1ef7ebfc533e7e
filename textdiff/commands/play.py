"""`textdiff play`: a prompt that keeps the model loaded.

A line is a prompt; it is denoised on the spot, with the settings of the session. A line that begins
with a slash is a command, with two slashes a prompt that begins with one.
"""

from textdiff.commands.arguments import Loading
from textdiff.commands.interactive import run_session
from textdiff.commands.sampling import Sampling
from textdiff.view.progress import make_console, quiet_libraries


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
    from textdiff.commands.prompting import PromptSession

    return run_session(PromptSession(held, model, sampling, make_console()), "textdiff> ")
