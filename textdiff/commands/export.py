"""`textdiff export`: a model as a folder for other programs."""

import os
from pathlib import Path
from typing import Literal

from textdiff.commands.arguments import Dtype, Loading, given_text
from textdiff.errors import ConfigError
from textdiff.view.progress import quiet_libraries


def export(
    model: str,
    output: str,
    /,
    format: Literal["textdiff", "sdar"] = "textdiff",
    block_size: int | None = None,
    dtype: Dtype = "float32",
) -> int:
    """Write a model as a folder that other programs load.

    Args:
        model: export directory, run directory or hub id.
        output: folder to write, which does not exist yet.
        format: textdiff: an export, for networks of transformers an ordinary folder of their
            architecture; sdar: what SGLang serves as SDARForCausalLM.
        block_size: tokens per block, of those that the model was trained in; the default is the
            first of them.
        dtype: of the weights that are written.
    """
    folder = _new_folder(given_text("OUTPUT", output))
    quiet_libraries()
    from textdiff.export.sdar import serving_notes
    from textdiff.storage import whole_folder

    held = Loading(block_size, "cpu", dtype).load(model)
    with whole_folder(folder, "nothing was written") as scratch:
        held.save_pretrained(scratch, format)
    print(f"{output}: {format} export of {model}, {dtype}")
    for line in serving_notes(output, held.model.config) if format == "sdar" else ():
        print(line)
    return 0


def _new_folder(output: str) -> Path:
    """Return a folder that can be made.

    Raises:
        ConfigError: it exists, or its place cannot be written.
    """
    folder = Path(os.path.expanduser(output))
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        message = f"{output} exists and is not an empty folder; name a new folder"
        raise ConfigError(message, code="output_exists")
    parent = next((place for place in folder.absolute().parents if place.exists()), folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        message = f"{output} cannot be written; name a new folder where you may write"
        raise ConfigError(message, code="output_not_writable")
    return folder
