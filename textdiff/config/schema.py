"""Schema of a run: one YAML file, nine sections, every key checked.

Sections are frozen; unknown keys are refused. Those of a package stand in the package. Nothing here
imports torch.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from textdiff.config.conversation_rules import check_conversations
from textdiff.config.lora import LoraConfig
from textdiff.config.networks import NetworkSection, TextDiffNetwork, WeightSource, stock_source
from textdiff.data.sections import BpeTokenizer, DataConfig, Tokenizer, TrainedTokenizer
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


# --- train, evaluate, sample ---------------------------------------------------------------------


Tracker = Literal["tensorboard", "wandb", "trackio"]


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
    sync_each_batch: bool = Field(
        True,
        description="under FSDP2, exchange gradients after every micro-batch, so that none are "
        "whole; false: once per step",
    )
    deterministic: bool = Field(
        False,
        description="resume bit for bit on a GPU too, by slower kernels; on a CPU all are",
    )
    init_from: WeightSource | None = Field(
        None,
        description="export directory to take the weights from, or hf:PATH for those of a causal "
        "or masked language model in a folder or on the hub",
    )
    lora: LoraConfig | None = Field(
        None,
        description="low-rank adapters on frozen weights, such as {rank: 16, alpha: 32, "
        "dropout: 0.0, targets: all-linear, base_bits: null, merge: true}; null: train all weights",
    )
    log_every: Whole = Field(10, ge=1, description="steps between log lines")
    log_with: Tracker | tuple[Tracker, ...] = Field(
        "tensorboard",
        description="tensorboard, wandb, trackio or a list: what shows metrics besides "
        "metrics.jsonl",
    )
    profile: Whole | None = Field(
        None, ge=1, description="steps to profile after three others; null: none"
    )
    checkpoint_every: Whole = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: Whole = Field(2, ge=1, description="checkpoints kept")

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """The trackers as a list, each of them once."""
        given = (self.log_with,) if isinstance(self.log_with, str) else self.log_with
        return tuple(dict.fromkeys(given))

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
    model: NetworkSection = TextDiffNetwork()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, raw: Any) -> Any:
        """Take architecture and tokenizer from the model that gives the weights, where not set."""
        train = raw.get("train") if isinstance(raw, Mapping) else None
        start = train.get("init_from") if isinstance(train, Mapping) else None
        source = stock_source(start) if isinstance(start, str) else None
        if source is None:
            return raw
        kinds, filled = {"model": "transformers", "tokenizer": "pretrained"}, dict(raw)
        for name, kind in kinds.items():
            section = raw.get(name, {"kind": kind})
            if isinstance(section, Mapping) and section.get("kind") == kind:
                filled[name] = {**section, "path": section.get("path") or source}
        return filled

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
        checks = self._without_noise_level, self._without_its_tokens, self._without_base
        problem = next(filter(None, (check() for check in (*checks, self._without_flash))), None)
        if problem:
            raise ValueError(problem)
        check_conversations(self)
        return self

    def _without_noise_level(self) -> str | None:
        """Return why the network cannot do with, or without, the noise level; None: it can."""
        network, process = self.model, self.diffusion.process
        if PROCESSES[process].replaces_tokens and not network.sees_noise:
            return (
                f"process {process} needs {network.noise_setting}: where tokens are replaced, "
                "masks do not show a network how noisy its input is"
            )
        if self.diffusion.objective.shifted and network.sees_noise:
            return (
                f"objective {self.diffusion.objective.kind} has no noise level: set "
                f"model.{network.noise_key}: false"
            )
        if self.diffusion.objective.shifted and network.conditions_itself:
            return (
                f"objective {self.diffusion.objective.kind} predicts every token once, and has no "
                "earlier prediction of it: set model.self_conditioning: false"
            )
        return None

    def _without_its_tokens(self) -> str | None:
        """Return why weights of another language model cannot be used here; None: they can."""
        start = self.train.init_from
        if stock_source(start) is None:
            return None
        if self.model.kind != "transformers":
            return f"train.init_from {start} needs model.kind: transformers"
        if isinstance(self.tokenizer, TrainedTokenizer):
            return (
                f"train.init_from {start} needs the tokens that its weights were trained on: set "
                f"tokenizer: {{kind: pretrained, path: {stock_source(start)}}}"
            )
        return None

    def _without_base(self) -> str | None:
        """Return why adapters cannot be trained here; None: they can, or there are none."""
        lora = self.train.lora
        if lora is None:
            return None
        if self.train.init_from is None:
            return (
                "train.lora freezes the weights that train.init_from names, and there are none: "
                "name an export or hf:PATH, or set lora: null to train random weights"
            )
        if self.train.optimizer == "muon":
            return (
                "train.lora needs train.optimizer: adamw; muon makes the update of a whole matrix "
                "orthogonal, and that of its low-rank factors is another one"
            )
        if lora.base_bits and stock_source(self.train.init_from) is None:
            return "train.lora.base_bits needs a language model, train.init_from: hf:PATH"
        if lora.base_bits and lora.merge:
            return (
                "train.lora.base_bits needs merge: false; rounded weights cannot hold what "
                "adapters add"
            )
        return None

    def _without_flash(self) -> str | None:
        """Return why FlashAttention cannot train here; None: it can, or another backend does."""
        if self.model.attn_implementation != "flash_attention_2":
            return None
        other = "model.attn_implementation: flash_attention_2 "
        if self.train.mixed_precision == "fp32":
            return other + "computes in half precision: set train.mixed_precision: bf16, or sdpa"
        if self.trains_in_blocks:
            return other + "has no masks for blocks; set flex_attention (auto chooses it)"
        return None

    @property
    def trains_in_blocks(self) -> bool:
        """True where attention has two streams, one of them noisy, in some steps."""
        blocks = any(size is not None for size in self.diffusion.block_sizes)
        return blocks and not self.diffusion.objective.shifted

    @property
    def drops(self) -> bool:
        """True where a training step may draw dropout masks."""
        return self.model.drops or (self.train.lora is not None and self.train.lora.dropout > 0.0)
