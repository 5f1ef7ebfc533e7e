"""Ways to divide a run that training refuses, before it reads any data."""

from types import SimpleNamespace

import pytest
from refusals import refused

from textdiff.config import Config
from textdiff.errors import ConfigError
from textdiff.train import engines
from textdiff.train.distributed import make_accelerator

ENGINES = {
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "Megatron": {"ACCELERATE_USE_MEGATRON_LM": "true"},
    "first version of FSDP": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
}


@pytest.mark.parametrize("words", ENGINES)
def test_other_engines_are_refused(words, monkeypatch):
    for name, value in ENGINES[words].items():
        monkeypatch.setenv(name, value)
    with refused(ConfigError, "unsupported_engine", words, "fsdp2.yaml"):
        make_accelerator(Config())


@pytest.mark.parametrize(
    ("flag", "code", "advice"),
    [
        ("FSDP_ACTIVATION_CHECKPOINTING", "recomputed_twice", "model.gradient_checkpointing"),
        ("FSDP_OFFLOAD_PARAMS", "offloaded_weights", "fsdp_offload_params"),
    ],
)
def test_settings_beside_fsdp2_are_refused(flag, code, advice, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(flag, "false")  # as the launcher passes it
    engines.check_engine(Config())
    monkeypatch.setenv(flag, "true")
    with refused(ConfigError, code, advice):
        make_accelerator(Config())


def test_settings_of_the_run_are_not_read_from_accelerates_file(monkeypatch):
    """Another accumulation would take steps from gradients of some micro-batches alone."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train = {"global_batch_size": 12, "micro_batch_size": 4, "mixed_precision": "fp32"}
    accelerator = make_accelerator(Config.model_validate({"train": train}))
    assert accelerator.gradient_accumulation_steps == 3
    assert accelerator.state.dynamo_plugin.backend == "NO"
    assert accelerator.mixed_precision == "no"


@pytest.mark.parametrize(
    ("name", "word"), [("TP", "tensor"), ("CP", "context"), ("SP", "sequence")]
)
def test_processes_that_share_rows_are_refused(name, word, monkeypatch):
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", "2")
    with refused(ConfigError, "unsupported_mesh", f"{word} parallelism", "hsdp.yaml"):
        make_accelerator(Config())


def test_dimensions_of_later_versions_are_refused(monkeypatch):
    mesh = SimpleNamespace(dp_replicate_size=1, dp_shard_size=2, pp_size=2)
    monkeypatch.setattr(engines, "ParallelismConfig", lambda: mesh)
    with refused(ConfigError, "unsupported_mesh", "pipeline parallelism"):
        engines.check_mesh(4)


@pytest.mark.parametrize(
    ("copies", "shards", "processes", "fits"),
    [(1, 1, 3, True), (2, 2, 4, True), (1, 4, 4, True), (2, 2, 8, False), (4, 1, 4, False)],
)
def test_a_mesh_has_as_many_processes_as_the_run(copies, shards, processes, fits, monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", str(copies))
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", str(shards))
    if fits:
        engines.check_mesh(processes)
    else:
        with refused(ConfigError, "uneven_mesh", f"{copies} x", f"{processes} processes"):
            engines.check_mesh(processes)


def test_sizes_that_accelerate_refuses(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "0")
    with refused(ConfigError, "unusable_mesh", "dp_shard_size"):
        engines.check_mesh(4)


def test_a_mesh_needs_gpus(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    engines.check_mesh(4, on_cpu=False)
    with refused(ConfigError, "mesh_on_cpus", "cpu.yaml"):
        engines.check_mesh(4, on_cpu=True)


def test_weights_that_are_copied_instead_are_reported(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (note,) = engines.sharding_notes(SimpleNamespace(is_fsdp2=False))
    assert "on GPUs alone" in note
    assert list(engines.sharding_notes(SimpleNamespace(is_fsdp2=True))) == []
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert list(engines.sharding_notes(SimpleNamespace(is_fsdp2=False))) == []
