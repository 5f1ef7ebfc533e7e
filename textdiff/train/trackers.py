"""Programs beside `metrics.jsonl` that show the metrics of a run while it trains."""

import importlib.util
import json
import secrets
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import (
    GeneralTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

from textdiff.config import Config
from textdiff.errors import ConfigError, first_line

PROJECT = "textdiff"
ID_FILE = "trackers.json"
"""Id of the run in its folder, which no other run has: a resumed run continues under it."""


def check_trackers(config: Config) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ConfigError: with the command that installs it.
    """
    for name in config.train.trackers:
        spec = importlib.util.find_spec(name)
        # A folder of that name, such as the one that wandb writes to, can be imported as well.
        if spec is None or (spec.origin is None and spec.submodule_search_locations is not None):
            raise ConfigError(
                f"train.log_with: {name} is not installed; pip install 'textdiff[{name}]', or set "
                "log_with: tensorboard",
                code="missing_tracker",
            )


def start_trackers(accelerator: Accelerator, config: Config, resumed: bool) -> None:
    """Start the trackers of a run, which its main process does.

    Args:
        accelerator: receives them.
        config: the run's config, which is logged.
        resumed: whether they continue a run.

    Raises:
        ConfigError: one cannot start, as without a login or a network.
    """
    directory, names = Path(config.run.dir), config.train.trackers
    run = "" if set(names) <= {"tensorboard"} else _run_id(directory / ID_FILE, resumed)
    try:
        accelerator.log_with = [_tracker(name, directory, run) for name in names]
        accelerator.init_trackers(PROJECT)
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # its form of a config is one more folder
                tracker.store_init_configuration(config.model_dump(mode="json"))
    except OSError:
        raise
    except Exception as error:  # each has its own
        raise ConfigError(
            f"train.log_with: {', '.join(names)} cannot start ({first_line(error)}); log in, let "
            "it work offline (WANDB_MODE=offline), or set log_with: tensorboard",
            code="tracker_failed",
        ) from error


def _run_id(path: Path, resumed: bool) -> str:
    """Return the id that a file holds for a run that is continued, or write another one."""
    if resumed and path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    run = secrets.token_hex(4)
    path.write_text(json.dumps({"project": PROJECT, "id": run}) + "\n", encoding="utf-8")
    return run


def _tracker(name: str, directory: Path, run: str) -> GeneralTracker:
    """Return a tracker whose run is called like its folder.

    Args:
        name: one of `train.log_with`.
        directory: the run's.
        run: its id.
    """
    called = directory.resolve().name
    if name == "wandb":
        return WandBTracker(PROJECT, name=called, id=run, resume="allow", dir=str(directory))
    if name == "trackio":  # a name is all that its runs have
        return TrackioTracker(PROJECT, name=f"{called}-{run}", resume="allow")
    return TensorBoardTracker(name, str(directory))


def finish_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write what they hold.

    Not by accelerate's `end_training`: it would leave the groups to the gradients' reducer, whose
    end joins gloo's threads under the interpreter's lock, which these may be waiting for.
    """
    for tracker in accelerator.trackers:
        tracker.finish()
