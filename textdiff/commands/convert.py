"""`textdiff convert`: a published checkpoint as a textdiff export."""

from typing import Annotated

from textdiff.commands.arguments import given_text
from textdiff.commands.flags import Named
from textdiff.view.progress import quiet_libraries


def convert(
    source: str,
    target: str,
    /,
    family: Annotated[str | None, Named("from")] = None,
    tokenizer: str | None = None,
) -> int:
    """Write a published checkpoint as an export, which needs no conversion any more.

    Other verbs take published checkpoints directly and convert them in memory. docs/published.md
    lists the families, their ids and the figures that they should give.

    Args:
        source: folder of a published checkpoint, file of its weights (.safetensors, .bin, .pt,
            .pth, .ckpt), or hub id, also with a revision: owner/name@branch.
        target: folder to write, which must not exist.
        family: name of its family, which is recognised by default; an unknown name lists all.
        tokenizer: folder or hub id of its tokenizer; by default that of the folder, else the one
            that it was published with.
    """
    from pathlib import Path

    quiet_libraries()
    place = Path(given_text("TARGET", target)).expanduser()
    from textdiff.export.conversion import write_converted

    published = write_converted(given_text("SOURCE", source), place, tokenizer, family)
    kind, config = published.family.kind, published.converted.config
    print(
        f"{target}: {source} as family {kind}, {config.num_hidden_layers} blocks of width "
        f"{config.hidden_size}, {config.vocab_size:,} ids. Try next:\n  textdiff generate {target}"
    )
    return 0
