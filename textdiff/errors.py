"""The errors that a user caused and can mend: one sentence with what, where and what to do.

The command line prints the message alone and exits with `exit_code`; a traceback is for bugs.
"""


class TextDiffError(Exception):
    """Base of every error whose message is meant for the user."""

    exit_code = 1


class ConfigError(TextDiffError):
    """A config file, a flag or an argument is wrong."""

    exit_code = 2


class DataError(TextDiffError):
    """A text, a corpus or a tokenizer cannot be used."""


class CheckpointError(TextDiffError):
    """An export directory or a training checkpoint cannot be used."""
