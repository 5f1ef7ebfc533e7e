"""The schema of a run: one YAML file, nine sections, every key checked.

Models are frozen; unknown keys are refused; ranges are checked here and nowhere below.
`reading` reads and writes them. This module does not import torch.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from textdiff.data.settings import BpeTokenizer, DataConfig, Tokenizer
from textdiff.sampling.settings import SamplingConfig
from textdiff.section import Number, PathText, Section, Whole

# --- run -----------------------------------------------------------------------------------------


class RunConfig(Section):
    """Where the run lives and what seeds it."""

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


class LogLinear(Section):
    """alpha(t) = 1 - (1 - eps) t; eps = 0 is the linear schedule."""

    kind: Literal["loglinear"] = "loglinear"
    eps: Number = Field(0.0, ge=0.0, lt=1.0, description="survival probability left at t = 1")


class Cosine(Section):
    """alpha(t) = 1 - cos(pi (1 - t) / 2)."""

    kind: Literal["cosine"] = "cosine"


class Polynomial(Section):
    """alpha(t) = 1 - t ** exponent."""

    kind: Literal["polynomial"] = "polynomial"
    exponent: Number = Field(2.0, gt=0.0, description="power of t")


class Geometric(Section):
    """sigma(t) = sigma_min ** (1 - t) * sigma_max ** t, alpha = exp(-sigma)."""

    kind: Literal["geometric"] = "geometric"
    sigma_min: Number = Field(1e-4, gt=0.0, description="total noise at t = 0")
    sigma_max: Number = Field(20.0, gt=0.0, description="total noise at t = 1")

    @model_validator(mode="after")
    def _ordered(self) -> "Geometric":
        if self.sigma_min >= self.sigma_max:
            raise ValueError("sigma_min must be smaller than sigma_max")
        return self


class Hybrid(Section):
    """The schedule of hybrid noise (arXiv:2503.04482)."""

    kind: Literal["hybrid"] = "hybrid"
    uniform: Number = Field(
        0.1, gt=0.0, lt=1.0, description="largest share of uniform noise, at t = 1/2"
    )


class Learned(Section):
    """alpha(t) = 1 - t ** w, one learned w per token (arXiv:2406.04329)."""

    kind: Literal["learned"] = "learned"
    exponent: Number = Field(1.0, gt=0.0, description="w of every token before training")


Schedule = Annotated[
    LogLinear | Cosine | Polynomial | Geometric | Hybrid | Learned, Field(discriminator="kind")
]


class Mdlm(Section):
    """Masked diffusion with the SUBS parameterisation (arXiv:2406.07524)."""

    kind: Literal["mdlm"] = "mdlm"
    loss_weight: Literal["elbo", "ce", "clipped"] = Field(
        "elbo",
        description="training weights: the bound's own, plain cross-entropy, or the bound's own up "
        "to 2",
    )


class D3pm(Section):
    """Diffusion in T steps with exact posteriors (arXiv:2107.03006)."""

    kind: Literal["d3pm"] = "d3pm"
    parameterization: Literal["mixture", "plugged"] = Field(
        "mixture",
        description="average posteriors over the predicted token, or plug its distribution in",
    )
    auxiliary: Number = Field(
        0.0, ge=0.0, description="weight of the cross-entropy that training adds"
    )


class Sedd(Section):
    """Score entropy: the network predicts log ratios (arXiv:2310.16834)."""

    kind: Literal["sedd"] = "sedd"


class Udlm(Section):
    """Uniform noise in continuous time (arXiv:2412.10193)."""

    kind: Literal["udlm"] = "udlm"


class Gidd(Section):
    """Masks and uniform noise at once (arXiv:2503.04482)."""

    kind: Literal["gidd"] = "gidd"
    loss_weight: Literal["elbo", "clipped", "dynamic"] = Field(
        "elbo", description="training weights: the bound's own, up to 2, or by kind of token"
    )


class Ar(Section):
    """Left to right: blocks of one token and a causal network."""

    kind: Literal["ar"] = "ar"


Objective = Annotated[Mdlm | D3pm | Sedd | Udlm | Gidd | Ar, Field(discriminator="kind")]

# What each objective is defined for: forward processes, and whether in steps or continuous time.
_PROCESSES = {
    "mdlm": ("absorbing",),
    "d3pm": ("absorbing", "uniform"),
    "sedd": ("absorbing", "uniform"),
    "udlm": ("uniform",),
    "gidd": ("hybrid",),
    "ar": ("absorbing",),
}


class NoiseConfig(Section):
    """How training noise is drawn."""

    draw: Literal["count", "time"] = Field(
        "count", description="draw the number of masked tokens, or a time"
    )
    range: tuple[Number, Number] | Literal["search"] = Field(
        (0.0, 1.0),
        description="mask rates that training draws from, or `search`: at each evaluation those of "
        "smallest variance",
    )
    prompts: Number = Field(
        0.0, ge=0.0, le=1.0, description="share of the rows whose beginning is given, free of noise"
    )
    prompt_dropout: Number = Field(
        0.0, ge=0.0, le=1.0, description="share of those whose prompt is hidden behind masks"
    )

    @model_validator(mode="after")
    def _given(self) -> "NoiseConfig":
        if self.prompt_dropout and not self.prompts:
            raise ValueError(
                f"prompt_dropout {self.prompt_dropout} hides prompts, and there are none: set "
                "prompts, the share of rows that have one, for example 0.5"
            )
        return self

    @model_validator(mode="after")
    def _ordered(self) -> "NoiseConfig":
        if self.range == "search":
            return self
        low, high = self.range
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"range {low} {high}: needs 0 <= low < high <= 1")
        return self


class DiffusionConfig(Section):
    """Forward process, schedule, objective and block size: the five choices without the rule."""

    process: Literal["absorbing", "uniform", "hybrid"] = Field(
        "absorbing", description="forward process"
    )
    schedule: Schedule = LogLinear()
    objective: Objective = Mdlm()
    noise: NoiseConfig = NoiseConfig()
    block_size: Whole | tuple[Whole | None, ...] | None = Field(
        None,
        description="tokens per block; null: the whole sequence is one block; a list: one of them "
        "at random in every step, the first being the default of the trained model",
    )
    timesteps: Whole | None = Field(
        None, ge=1, description="steps of discrete time; null: continuous time"
    )

    @property
    def block_sizes(self) -> tuple[int | None, ...]:
        """Every size that training uses; the first is the trained model's default."""
        return self.block_size if isinstance(self.block_size, tuple) else (self.block_size,)

    @model_validator(mode="after")
    def _consistent(self) -> "DiffusionConfig":
        problem = (
            self._sizes_problem()
            or self._process_problem()
            or self._time_problem()
            or self._order_problem()
            or self._learned_problem()
            or self._search_problem()
            or self._prompt_problem()
        )
        if problem:
            raise ValueError(problem)
        return self

    def _sizes_problem(self) -> str | None:
        sizes = self.block_sizes
        if not sizes:
            return "block_size is an empty list: name at least one size"
        small = [size for size in sizes if size is not None and size < 1]
        if small:
            return f"block_size {small[0]}: a block has at least one token"
        twice = [size for size in sizes if sizes.count(size) > 1]
        return f"block_size lists {twice[0]} twice" if twice else None

    def _search_problem(self) -> str | None:
        if self.noise.range != "search":
            return None
        if getattr(self.objective, "loss_weight", "elbo") != "elbo":
            return (
                "a range is searched by the variance of the bound's own terms: set "
                "objective.loss_weight: elbo, or a fixed noise.range"
            )
        return None

    def _prompt_problem(self) -> str | None:
        if not self.noise.prompts:
            return None
        if self.schedule.kind == "learned":
            return "noise.prompts: a learned schedule is trained on whole texts; set it to 0"
        if set(self.block_sizes) == {1}:
            return (
                "noise.prompts: in blocks of one token all that comes before is given anyway; set "
                "it to 0"
            )
        return None

    def _process_problem(self) -> str | None:
        kind = self.objective.kind
        if self.process not in _PROCESSES[kind]:
            reason = {
                "mdlm": "cross-entropy at masked positions needs masks; udlm, sedd and d3pm do "
                "without",
                "sedd": "its score entropy is written for noise of one kind; gidd takes both",
                "d3pm": "its posteriors are written for noise of one kind; gidd takes both",
                "udlm": "its bound is that of uniform noise; mdlm is the masked one",
                "gidd": "its bound is that of masks and uniform noise at once",
                "ar": "it predicts one wholly masked token after the other",
            }[kind]
            return (
                f"objective {kind} does not go with process {self.process} ({reason}); set "
                f"process: {' or '.join(_PROCESSES[kind])}"
            )
        if (self.process == "hybrid") != (self.schedule.kind == "hybrid"):
            return (
                "the hybrid process and the hybrid schedule need each other: the share of uniform "
                "noise and the noise level are one function of time"
            )
        return None

    def _time_problem(self) -> str | None:
        kind = self.objective.kind
        if kind == "d3pm" and self.timesteps is None:
            return "objective d3pm is diffusion in steps: set timesteps, for example 1000"
        if self.timesteps is None:
            return None
        if self.timesteps == 1:
            return (
                "timesteps: 1 draws all tokens at once from pure noise, independently of each "
                "other: there is nothing to learn but their frequencies; set timesteps: 2 or more"
            )
        if kind not in ("d3pm", "mdlm"):
            return f"objective {kind} is in continuous time: set timesteps: null"
        if self.noise.draw != "time" or self.noise.range != (0.0, 1.0):
            return (
                "with timesteps noise is drawn at the steps' own times: set noise.draw: time and "
                "noise.range: [0.0, 1.0]"
            )
        return None

    def _order_problem(self) -> str | None:
        if self.objective.kind != "ar":
            return None
        if self.block_size != 1:
            return "objective ar predicts token after token: set block_size: 1"
        if self.noise.draw != "count" or self.noise.range != (0.0, 1.0):
            return "objective ar masks every token: set noise.draw: count, noise.range: [0.0, 1.0]"
        return None

    def _learned_problem(self) -> str | None:
        if self.schedule.kind != "learned":
            return None
        if self.objective.kind != "mdlm" or self.objective.loss_weight != "elbo":
            return (
                "a learned schedule is trained on the bound of masked diffusion: set "
                "objective: {kind: mdlm, loss_weight: elbo}"
            )
        if self.timesteps is not None:
            return "a learned schedule is in continuous time: set timesteps: null"
        if self.noise.draw != "time" or self.noise.range != (0.0, 1.0):
            return (
                "a learned schedule compares two masks of one time, over all times: set "
                "noise.draw: time and noise.range: [0.0, 1.0]"
            )
        return None


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
                f"global_batch_size {self.global_batch_size} is no multiple of micro_batch_size "
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
        kind, process = self.diffusion.objective.kind, self.diffusion.process
        if process != "absorbing" and not self.model.time_conditioning:
            raise ValueError(
                f"process {process} needs model.time_conditioning: true (and adaln: true): without "
                "masks in sight a network cannot tell how noisy its input is"
            )
        if kind == "ar" and self.model.time_conditioning:
            raise ValueError("objective ar has no noise level: set model.time_conditioning: false")
        return self
