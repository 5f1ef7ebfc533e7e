"""Schema of a run: one YAML file, nine sections, every key checked.

Sections are frozen; unknown keys are refused. Those of a package stand in the package. Nothing here
imports torch.
"""

from typing import Literal

from pydantic import Field, model_validator

from textdiff.data.sections import BpeTokenizer, DataConfig, Tokenizer
from textdiff.diffusion import PROCESSES, DiffusionConfig
from textdiff.sampling.settings import SamplingConfig
from textdiff.section import Number, PathText, Section, Whole

# --- run -----------------------------------------------------------------------------------------


class RunConfig(Section):
    """Folder and seed of a run."""

    dir: PathText = Field(
        "runs/run", description="directory the run writes to: new, empty or an earlier run's"
    )
    seed: Whole = Field(0, ge=0, lt=2**31, description="seed of every random number of the run")


# --- model, diffusion ----------------------------------------------------------------------------


class ModelConfig(Section):
    """The Transformer denoiser."""

    hidden_size: Whole = Field(256, ge=2, description="width of the residual stream")
    num_layers: Whole = Field(6, ge=1, description="Transformer blocks")
    num_heads: Whole = Field(4, ge=1, description="attention heads; must divide hidden_size")
    mlp: Literal["gelu", "swiglu"] = Field("gelu", description="MLP of a block (4x or 8/3x wide)")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="pre-normalisation")
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys per head")
    dropout: Number = Field(0.0, ge=0.0, lt=1.0, description="dropout on both residual branches")
    adaln: bool = Field(False, description="adaptive layer norm: modulation by the noise level")
    time_conditioning: bool = Field(
        False, description="feed the noise level through adaln (off: adaln sees zero)"
    )
    attn_implementation: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] = Field(
        "sdpa", description="attention backend, by its transformers name"
    )
    gradient_checkpointing: bool = Field(False, description="recompute blocks in the backward pass")

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must be an even "
                "whole number (rotary positions turn pairs of channels)"
            )
        if self.time_conditioning and not self.adaln:
            raise ValueError("time_conditioning enters through adaln: set adaln: true as well")
        return self


# --- train, evaluate, sample ---------------------------------------------------------------------


class TrainConfig(Section):
    """Optimisation."""

    steps: Whole = Field(1000, ge=1, description="optimizer steps")
    global_batch_size: Whole = Field(16, ge=1, description="sequences per optimizer step")
    micro_batch_size: Whole = Field(16, ge=1, description="sequences per process and forward pass")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw, or muon on the blocks' matrices and adamw on the rest"
    )
    learning_rate: Number = Field(1e-3, gt=0.0, description="peak learning rate of AdamW")
    muon_learning_rate: Number = Field(0.02, gt=0.0, description="peak learning rate of Muon")
    betas: tuple[Number, Number] = Field((0.9, 0.999), description="AdamW's decay rates")
    warmup_steps: Whole = Field(100, ge=0, description="steps of linear warm-up")
    lr_schedule: Literal["constant", "cosine", "trapezoidal"] = Field(
        "cosine", description="after warm-up: constant, cosine to zero, or constant then linear"
    )
    decay_fraction: Number = Field(
        0.4, gt=0.0, le=1.0, description="last part of the run that `trapezoidal` decays over"
    )
    weight_decay: Number = Field(0.0, ge=0.0, description="decoupled decay, on matrices only")
    grad_clip: Number = Field(1.0, ge=0.0, description="largest gradient norm; 0 does not clip")
    ema_decay: Number = Field(
        0.999, ge=0.0, lt=1.0, description="decay of the averaged weights (warms up); 0: none"
    )
    mixed_precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 where the device computes it natively"
    )
    compile: bool = Field(False, description="torch.compile the Transformer blocks")
    init_from: PathText | None = Field(
        None, description="export directory to take the weights from"
    )
    log_every: Whole = Field(10, ge=1, description="steps between log lines")
    checkpoint_every: Whole = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: Whole = Field(2, ge=1, description="checkpoints kept")

    @model_validator(mode="after")
    def _divides(self) -> "TrainConfig":
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        return self


class EvaluateConfig(Section):
    """The validation bound during and after training."""

    every: Whole = Field(500, ge=1, description="steps between evaluations")
    replicates: Whole = Field(8, ge=8, description="independent estimates the error comes from")
    max_documents: Whole | None = Field(
        None, ge=1, description="validation documents used; null: all"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the network")


class SampleConfig(SamplingConfig):
    """Text drawn during training, and the defaults that the export carries."""

    num_samples: Whole = Field(2, ge=0, description="samples per evaluation; 0: none")


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    tokenizer: Tokenizer = BpeTokenizer()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        length = self.data.sequence_length
        for block in self.diffusion.block_sizes:
            if block is not None and length % block:
                how = "is longer than" if block > length else "does not divide"
                near = max(size for size in range(1, min(block, length) + 1) if not length % size)
                raise ValueError(
                    f"diffusion.block_size {block} {how} data.sequence_length {length}: give a "
                    f"divisor of it such as {near}, or null for the whole sequence"
                )
        process, objective = self.diffusion.process, self.diffusion.objective
        if PROCESSES[process].replaces_tokens and not self.model.time_conditioning:
            raise ValueError(
                f"process {process} needs model.time_conditioning: true (and adaln: true): where "
                "tokens are replaced, masks do not show a network how noisy its input is"
            )
        if objective.shifted and self.model.time_conditioning:
            raise ValueError(
                f"objective {objective.kind} has no noise level: set model.time_conditioning: false"
            )
        return self
