"""Trains several configs in these processes, each copied and then sharded, one after another.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml architectures_run.py FOLDER...

Each folder holds a `c.yaml`; its runs are `copied` and `sharded` beside it.
"""

import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState
from sharded_run import make_sharded, make_unsharded

from textdiff.config.reading import load
from textdiff.data.corpus import prepare_corpus
from textdiff.train.reporter import Reporter
from textdiff.train.trainer import Trainer

WAYS = {"copied": make_unsharded, "sharded": make_sharded}


def train(folder: Path, way: str) -> None:
    words = [f"--run.dir={folder / way}", "--train.micro-batch-size=2"]
    config = load(folder / "c.yaml", words)
    corpus = prepare_corpus(config.data, config.tokenizer, config.run.seed)
    # What a sharded run before this one has put there.
    for state in (AcceleratorState, PartialState):
        state._shared_state.clear()
    accelerator = WAYS[way](config)
    Trainer(config, corpus, accelerator, Reporter(), "never").run()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for chosen in WAYS:
            train(Path(name), chosen)
    sys.stdout.flush()
    os._exit(0)  # as the command: groups of processes do not end in order
