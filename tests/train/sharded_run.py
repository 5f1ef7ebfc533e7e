"""Trains with FSDP2 on CPUs: what the tests launch by `configs/accelerate/fsdp2.yaml`.

Accelerate leaves its FSDP plugin aside where there is no accelerator. Here the plugin that it read
from the file is put back, and from there on everything is its own code: wrapping, switching the
optimizers' parameters, accumulation, clipping.

    accelerate launch --config_file FILE sharded_run.py CONFIG [--section.key VALUE ...]
"""

import os
import sys

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from textdiff.cli import main
from textdiff.train import distributed

make_unsharded = distributed.make_accelerator


def make_sharded(config):
    accelerator = make_unsharded(config)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


distributed.make_accelerator = make_sharded
if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:], "--debug"]))
