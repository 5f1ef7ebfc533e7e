"""Tasks of lm-evaluation-harness that read local files: a folder of data, and no hub."""
