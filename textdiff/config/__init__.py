"""Config of a run: `schema` checks it, `reading` reads and writes it, `keys` describes it."""

from textdiff.config.schema import Config, SampleConfig, TrainConfig

__all__ = ["Config", "SampleConfig", "TrainConfig"]
