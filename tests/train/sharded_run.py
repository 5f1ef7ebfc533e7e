"""Trains with FSDP2 on CPUs: what the tests launch by `configs/accelerate/fsdp2.yaml`.

Accelerate leaves its FSDP plugin aside without an accelerator, and refuses a mesh there.
Here both are put back as it reads them from the file.

    accelerate launch --config_file FILE sharded_run.py CONFIG [--section.key VALUE ...]
"""

import os
import sys

from accelerate import ParallelismConfig, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from textdiff.cli import main
from textdiff.train import distributed

make_unsharded = distributed.make_accelerator


def make_sharded(config):
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    has_mesh = os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", None)
    accelerator = make_unsharded(config)
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
    if has_mesh:
        mesh = ParallelismConfig()
        AcceleratorState._shared_state["parallelism_config"] = mesh
        AcceleratorState._shared_state["device_mesh"] = mesh.get_device_mesh("cpu")
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


distributed.make_accelerator = make_sharded
if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:], "--debug"]))
