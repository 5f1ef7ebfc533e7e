"""Ways to divide a run among processes: those that training cannot continue exactly are refused.

Accelerate passes what its config file says in the environment, and reads it there.
"""

from collections.abc import Iterator

from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import parse_choice_from_env, parse_flag_from_env

from textdiff.config import Config
from textdiff.errors import ConfigError, first_line

_USE = "ACCELERATE_USE_"
_ENGINES = {
    "DEEPSPEED": "DeepSpeed keeps weights and optimizer state in buffers and pickles of its own, "
    "which averages, clipping and exact resumption cannot reach",
    "MEGATRON_LM": "Megatron-LM brings a training loop of its own",
}
_FIRST_FSDP = "the first version of FSDP flattens parameters, which the optimizer groups tell apart"
# Settings beside FSDP2: a flag in the environment, the sentence that refuses it, and its code.
_SETTINGS = [
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        "fsdp_activation_checkpointing of accelerate's file would recompute blocks a second time: "
        "set it to false, and model.gradient_checkpointing: true in the run's config",
        "recomputed_twice",
    ),
    (
        "FSDP_OFFLOAD_PARAMS",
        "fsdp_offload_params of accelerate's file would leave averaged weights on the CPU, and "
        "validation computes on the GPU: set it to false; more processes, or "
        "model.gradient_checkpointing: true in the run's config, save memory as well",
        "offloaded_weights",
    ),
]

_DIMENSIONS = {
    "tp": "tensor parallelism",
    "cp": "context parallelism",
    "sp": "sequence parallelism",
    "pp": "pipeline parallelism",
    "ep": "expert parallelism",
}


def check_engine(config: Config) -> None:
    """Refuse the engines whose state training cannot reach.

    Raises:
        ConfigError: DeepSpeed, Megatron, the first version of FSDP, or a setting beside FSDP2 that
            it does not go with.
    """
    reasons = [why for name, why in _ENGINES.items() if parse_flag_from_env(_USE + name)]
    sharded = parse_flag_from_env(_USE + "FSDP")
    if sharded and parse_choice_from_env("FSDP_VERSION", "1") != "2":
        reasons.append(_FIRST_FSDP)
    if reasons:
        raise ConfigError(
            f"{reasons[0]}; launch with configs/accelerate/fsdp2.yaml, or with zero2.yaml, "
            "zero3.yaml or hsdp.yaml beside it, which shard the same state through FSDP2",
            code="unsupported_engine",
        )
    if sharded and config.train.lora is not None and config.train.lora.base_bits:
        message = "FSDP2 does not shard quantised weights: set train.lora.base_bits: null"
        raise ConfigError(message, code="sharded_bits")
    for flag, message, code in _SETTINGS:
        if sharded and parse_flag_from_env(flag):
            raise ConfigError(message, code=code)


def sharding_notes(accelerator: Accelerator) -> Iterator[str]:
    """Yield a sentence where weights were to be sharded and accelerate copies them instead."""
    if parse_flag_from_env(_USE + "FSDP") and not accelerator.is_fsdp2:
        yield "every process holds all weights: accelerate shards them on GPUs alone"


def check_mesh(processes: int, on_cpu: bool = False) -> None:
    """Refuse meshes in which processes would share rows, and those of another size.

    Args:
        processes: their number.
        on_cpu: whether they run on CPUs, where accelerate has no meshes.

    Raises:
        ConfigError: the mesh has a dimension that is not data parallel, or does not fit.
    """
    try:
        mesh = ParallelismConfig()
    except ValueError as error:
        message = f"accelerate refuses its parallelism_config: {first_line(error)}"
        raise ConfigError(message, code="unusable_mesh") from None
    for name, what in _DIMENSIONS.items():
        if (getattr(mesh, f"{name}_size", 1) or 1) > 1:
            raise ConfigError(
                f"parallelism_config_{name}_size: {what} gives several processes the same rows, "
                "and training draws other rows for each; set it to 1 and use dp_replicate_size and "
                "dp_shard_size as configs/accelerate/hsdp.yaml does",
                code="unsupported_mesh",
            )
    replicas, shards = mesh.dp_replicate_size, mesh.dp_shard_size
    if on_cpu and shards > 1 and parse_flag_from_env(_USE + "PARALLELISM_CONFIG"):
        raise ConfigError(
            "a mesh needs GPUs, and these processes run on CPUs: launch with "
            "configs/accelerate/cpu.yaml",
            code="mesh_on_cpus",
        )
    if replicas * shards in (1, processes) and (shards > 1 or replicas == 1):
        return
    raise ConfigError(
        f"a mesh of dp_replicate_size {replicas} x dp_shard_size {shards} does not fit "
        f"{processes} processes: the product has to be their number, and dp_shard_size at least 2; "
        "copies alone are configs/accelerate/ddp.yaml",
        code="uneven_mesh",
    )
