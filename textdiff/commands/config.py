"""`textdiff config show`: a config with every default filled in."""

from collections.abc import Sequence

from textdiff.commands.arguments import load_config


def show_config(arguments: Sequence[str]) -> int:
    """Run `textdiff config show FILE [--section.key VALUE ...]`."""
    from textdiff.config.reading import to_yaml

    print(to_yaml(load_config(arguments, "textdiff config show")), end="")
    return 0
