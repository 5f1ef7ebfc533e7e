"""Reading and writing a config: YAML, command-line flags over it, errors that name the key.

`load` reads YAML and applies flags; `to_yaml` writes the resolved config back. An unknown key is
answered with the nearest known name.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from textdiff.config.explain import explain
from textdiff.config.overrides import merge, read_flags
from textdiff.config.schema import Config
from textdiff.data.plain_data import read_yaml
from textdiff.errors import ConfigError


def load(
    path: str | Path, flags: Sequence[str] = (), prog: str = "textdiff train CONFIG"
) -> Config:
    """Read a YAML file and apply flags over it.

    Args:
        path: the YAML file; absent sections and keys take their defaults.
        flags: `--section.key value` pairs, or `section.key=value`.
        prog: the command, for what a refusal recommends; its own options follow ` [`.

    Raises:
        ConfigError: the file cannot be read, or a key or a value is wrong.
    """
    raw = _read(Path(path).expanduser())
    command, _, usage = prog.partition(" [")
    try:
        given = read_flags(flags, own=re.findall(r"--[\w-]+", usage))
    except ConfigError as error:
        more = "" if str(error).endswith("?") else f"; see {command} --help"
        raise ConfigError(f"{error}{more}") from None
    merge(raw, given)
    return validate(raw, str(path), {flag.path: flag.name for flag in given})


def validate(
    raw: Mapping[str, Any],
    where: str = "config",
    flags: Mapping[tuple[str, ...], str] | None = None,
) -> Config:
    """Check plain data against the schema.

    Args:
        raw: sections and keys.
        where: what holds them.
        flags: which flag set a key, by the key's path.

    Raises:
        ConfigError: with one clause for each wrong key.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, raw, where, flags or {})) from None


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def _read(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise ConfigError(f"{path}: no such config file; see configs/ for complete ones")
    raw = read_yaml(path, str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as `train:`, found {raw!r:.60}")
    return raw
