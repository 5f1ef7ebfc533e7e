"""The verbs of the command line, one file each; `textdiff.cli` is the table of them."""
