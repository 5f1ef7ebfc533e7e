"""The config of a run: its schema, its reading from YAML and flags, its errors and its help.

Imports neither torch nor transformers, so that `--help` stays quick.
"""

from textdiff.config.schema import Config, SampleConfig, TrainConfig
from textdiff.data.sections import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    DataConfig,
    PretrainedTokenizer,
    Source,
)

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Config",
    "DataConfig",
    "PretrainedTokenizer",
    "SampleConfig",
    "Source",
    "TrainConfig",
]
