"""Saving of models: the formats of folders, and repositories of the Hugging Face hub."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerFast

from textdiff.diffusion.family import Family
from textdiff.errors import CheckpointError, first_line, unknown
from textdiff.export.records import TRAINING_FILE, training_record
from textdiff.export.sdar import write_sdar
from textdiff.models import Denoiser
from textdiff.sampling.settings import SamplingConfig


class SavedModel:
    """Model that can be saved, on the disk and on the hub.

    Attributes:
        model: the network.
        tokenizer: its tokenizer.
        family: process, schedule, objective and block size.
        defaults: options that `generate` takes where none are given.
        folder: the export it was loaded from, or None.
    """

    model: Denoiser
    tokenizer: PreTrainedTokenizerFast
    family: Family
    defaults: SamplingConfig
    folder: Path | None

    def save_pretrained(self, path: str | Path, format: str = "textdiff") -> None:
        """Write weights, tokenizer and sampling defaults.

        Args:
            path: the folder.
            format: key of `FORMATS`: the layout of exports, or that of another program.

        Raises:
            ConfigError: an unknown format.
            CheckpointError: the format cannot hold the model.
        """
        if format not in FORMATS:
            raise unknown("format", format, FORMATS)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        FORMATS[format](self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        format: str = "textdiff",
        private: bool | None = None,
        commit_message: str = "Upload a model of textdiff",
    ) -> str:
        """Save the model and upload it to a repository of the hub.

        Args:
            repo_id: `OWNER/NAME`; a repository that does not exist is created.
            format: see `save_pretrained`.
            private: whether a new repository is; None: as the owner's settings say.
            commit_message: title of the commit.

        Returns:
            The address of the repository.

        Raises:
            ConfigError: an unknown format.
            CheckpointError: the format cannot hold the model, or the hub does not take it.
        """
        from huggingface_hub import HfApi

        with TemporaryDirectory() as scratch:
            self.save_pretrained(scratch, format)
            api = HfApi()
            try:
                place = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(
                    repo_id=place.repo_id, folder_path=scratch, commit_message=commit_message
                )
            except Exception as error:  # of the transport, whose kinds change with its library
                raise CheckpointError(
                    f"{repo_id} cannot be uploaded ({type(error).__name__}: {first_line(error)}); "
                    "check the name, the network and `hf auth login`, or save a folder for later",
                    code="not_uploaded",
                ) from None
        return str(place)


def _write_export(saved: SavedModel, folder: Path) -> None:
    """Write the layout that `from_pretrained` reads."""
    saved.model.save_pretrained(folder)
    write_companions(saved, folder)


def write_companions(saved: SavedModel, folder: Path) -> None:
    """Write the files of an export beside its network: tokenizer, sampling defaults, origin."""
    saved.tokenizer.save_pretrained(folder)
    settings = saved.defaults.to_export()
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if saved.folder is not None and (known := training_record(saved.folder)):
        (folder / TRAINING_FILE).write_text(json.dumps(known, indent=2) + "\n")


def _write_sdar(saved: SavedModel, folder: Path) -> None:
    """Write the layout of SDAR's published models."""
    write_sdar(folder, saved.model, saved.tokenizer, saved.family, saved.defaults)


FORMATS: dict[str, Callable[[SavedModel, Path], None]] = {
    "textdiff": _write_export,
    "sdar": _write_sdar,
}
"""Writers of a model's folder."""
