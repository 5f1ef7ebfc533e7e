"""`textdiff chat`: a conversation with a model whose tokenizer has a chat template."""

from textdiff.commands.arguments import Loading, given_text
from textdiff.commands.interactive import run_session
from textdiff.commands.sampling import Sampling
from textdiff.view.progress import make_console, quiet_libraries


def chat(
    model: str,
    /,
    *,
    system: str = "",
    sampling: Sampling,
    loading: Loading,
) -> int:
    """Talk to a model: type messages, watch its answers being denoised.

    /help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the conversation. Messages can be
    piped in, one a line: the exit code is then 1 if one of them was an error.

    Args:
        model: export or run directory, published checkpoint, or hub id.
        system: text of the system message that the conversation begins with.
        sampling: how answers are drawn, to begin with.
        loading: how the model is loaded.
    """
    sampling.options()
    system = given_text("--system", system)
    quiet_libraries()
    held = loading.load(model)
    from textdiff.commands.chatting import ChatSession

    return run_session(ChatSession(held, model, sampling, make_console(), system), "you> ")
