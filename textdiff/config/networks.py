"""Sections of a config that name the network: our own Transformer, or one of transformers.

Imports neither torch nor transformers until a network is built, so that `--help` stays quick.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from textdiff.errors import ConfigError
from textdiff.registry import OneOf, Registry
from textdiff.section import Number, PathText, Section, Whole, expanded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from textdiff.models import Denoiser

STOCK_PREFIX = "hf:"
"""Prefix of `train.init_from` where a causal or masked language model gives the weights."""


def stock_source(init_from: str | None) -> str | None:
    """Return the folder or hub id of the language model that weights come from; None: of none."""
    if init_from is None or not init_from.startswith(STOCK_PREFIX):
        return None
    return init_from.removeprefix(STOCK_PREFIX)


def _expanded_source(init_from: str) -> str:
    source = stock_source(init_from)
    return expanded(init_from) if source is None else STOCK_PREFIX + expanded(source)


WeightSource = Annotated[str, AfterValidator(_expanded_source)]
Attention = Annotated[
    Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2"],
    Field(
        description="attention backend, by its transformers name; auto: on a GPU flex_attention "
        "for blocks and flash_attention_2 for the rest in half precision, else sdpa"
    ),
]
Recomputed = Annotated[bool, Field(description="recompute blocks in the backward pass")]


class Network(Section):
    """One kind of network, with its options.

    Attributes:
        noise_key: key that feeds the noise level to the network.
        noise_setting: settings that do, in words.
    """

    kind: str
    noise_key: ClassVar[str]
    noise_setting: ClassVar[str]

    if TYPE_CHECKING:  # keys of every kind; each declares them itself, after those of its own
        attn_implementation: str
        gradient_checkpointing: bool

    @property
    def backend(self) -> str:
        """Attention backend of a network that is built; training may choose another for `auto`."""
        return "sdpa" if self.attn_implementation == "auto" else self.attn_implementation

    @property
    def sees_noise(self) -> bool:
        """True where the noise level enters the network."""
        raise NotImplementedError

    @property
    def drops(self) -> bool:
        """True where a training step may draw dropout masks."""
        raise NotImplementedError

    @property
    def conditions_itself(self) -> bool:
        """True where the network reads its own earlier prediction."""
        return False

    def configuration(
        self, vocabulary: int, length: int, diffusion: Mapping[str, Any], **special_ids: Any
    ) -> "PreTrainedConfig":
        """Return the configuration of the network.

        Args:
            vocabulary: ids of the tokenizer, mask included.
            length: tokens per sequence.
            diffusion: the family as plain data.
            **special_ids: the tokenizer's special ids, by their names in the configuration.
        """
        raise NotImplementedError

    def build(self, configuration: "PreTrainedConfig") -> "Denoiser":
        """Return the network with random weights."""
        raise NotImplementedError


NETWORKS: Registry[Network] = Registry("network")


@NETWORKS.register
class TextDiffNetwork(Network):
    """The Transformer denoiser."""

    kind: Literal["textdiff"] = "textdiff"
    noise_key: ClassVar[str] = "time_conditioning"
    noise_setting: ClassVar[str] = "model.time_conditioning: true (and adaln: true)"

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
    self_conditioning: bool = Field(
        False, description="read the network's own earlier prediction: half of the rows in training"
    )
    pad_vocab_to_multiple_of: Whole = Field(
        1, ge=1, description="rows of embedding and head are a multiple of it; 128 suits GPUs"
    )
    attn_implementation: Attention = "sdpa"
    gradient_checkpointing: Recomputed = False

    @model_validator(mode="after")
    def _consistent(self) -> "TextDiffNetwork":
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must be an even "
                "whole number (rotary positions turn pairs of channels)"
            )
        if self.time_conditioning and not self.adaln:
            raise ValueError("time_conditioning enters through adaln: set adaln: true as well")
        return self

    @property
    def sees_noise(self) -> bool:
        """See `Network`."""
        return self.time_conditioning

    @property
    def drops(self) -> bool:
        """See `Network`."""
        return self.dropout > 0.0

    @property
    def conditions_itself(self) -> bool:
        """See `Network`."""
        return self.self_conditioning

    def configuration(
        self, vocabulary: int, length: int, diffusion: Mapping[str, Any], **special_ids: Any
    ) -> "PreTrainedConfig":
        """See `Network`; rows beyond the tokenizer are excluded ids, of probability zero."""
        from textdiff.models import TextDiffusionConfig

        multiple = self.pad_vocab_to_multiple_of
        rows = -(-vocabulary // multiple) * multiple
        if rows > vocabulary:
            excluded = special_ids.get("excluded_token_ids") or []
            special_ids["excluded_token_ids"] = [*excluded, *range(vocabulary, rows)]
        names = (
            *("hidden_size", "mlp", "norm", "qk_norm", "dropout", "adaln", "time_conditioning"),
            "self_conditioning",
        )
        built = TextDiffusionConfig(
            vocab_size=rows,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            max_position_embeddings=length,
            **{name: getattr(self, name) for name in names},
            diffusion=dict(diffusion),
            **special_ids,
        )
        # Not an argument: transformers would check the package before we can say why not.
        built._attn_implementation = self.backend
        return built

    def build(self, configuration: "PreTrainedConfig") -> "Denoiser":
        """See `Network`."""
        from textdiff.models import TextDiffusionModel

        return TextDiffusionModel(configuration)


@NETWORKS.register
class TransformersNetwork(Network):
    """A causal or masked language model of transformers, with attention of our layouts."""

    kind: Literal["transformers"] = "transformers"
    noise_key: ClassVar[str] = "noise_embedding"
    noise_setting: ClassVar[str] = "model.noise_embedding: true"

    path: PathText = Field(
        description="folder or hub id whose config.json names the architecture; its weights are "
        "not read, train.init_from: hf:PATH does that"
    )
    noise_embedding: bool = Field(
        False, description="add an embedding of the noise level to those of the tokens"
    )
    attn_implementation: Attention = "sdpa"
    gradient_checkpointing: Recomputed = False

    @model_validator(mode="before")
    @classmethod
    def _without_self_conditioning(cls, raw: Any) -> Any:
        """Refuse an option of our own network, with the reason."""
        if isinstance(raw, Mapping) and raw.get("self_conditioning"):
            raise ValueError(
                "self_conditioning needs kind: textdiff; an export of kind transformers is an "
                "ordinary folder of its architecture, which has no second input"
            )
        return raw

    @property
    def sees_noise(self) -> bool:
        """See `Network`."""
        return self.noise_embedding

    @property
    def drops(self) -> bool:
        """See `Network`: an architecture may draw some by functions of its own."""
        return True

    def configuration(
        self, vocabulary: int, length: int, diffusion: Mapping[str, Any], **special_ids: Any
    ) -> "PreTrainedConfig":
        """See `Network`; embeddings that have more rows than the tokenizer keep them.

        Raises:
            CheckpointError: `path` names no language model that can be used.
            ConfigError: it was made for shorter sequences.
        """
        from textdiff.pretrained import pretrained_configuration

        config = pretrained_configuration(self.path)
        longest = getattr(config, "max_position_embeddings", None) or length
        if length > longest:
            raise ConfigError(
                f"data.sequence_length {length} is longer than the {longest} positions that "
                f"{self.path} was made for; set it to {longest} or less",
                code="too_long",
            )
        rows = max(vocabulary, config.vocab_size)
        excluded = {*(special_ids.pop("excluded_token_ids", None) or ()), *range(vocabulary, rows)}
        facts = {
            **special_ids,
            "vocab_size": rows,
            "excluded_token_ids": sorted(excluded),
            "diffusion": {
                **diffusion,
                "sequence_length": length,
                "noise_embedding": self.noise_embedding,
            },
            "dtype": "float32",  # of the weights that are trained, whatever the files hold
        }
        for name, value in facts.items():
            setattr(config, name, value)
        config._attn_implementation = self.backend
        return config

    def build(self, configuration: "PreTrainedConfig") -> "Denoiser":
        """See `Network`.

        Raises:
            ConfigError: the network cannot be a denoiser exactly.
        """
        return self.around(configuration, None)

    def around(
        self, configuration: "PreTrainedConfig", network: "PreTrainedModel | None"
    ) -> "Denoiser":
        """Return the denoiser of a language model; None: of one with random weights.

        Raises:
            ConfigError: the network cannot be a denoiser exactly.
        """
        from textdiff.models.backbone import TransformersDenoiser

        try:
            return TransformersDenoiser(configuration, network)
        except ValueError as error:
            raise ConfigError(
                f"model.path {self.path}: {error}", code="unsupported_network"
            ) from None


NetworkSection = Annotated[Network, OneOf(NETWORKS, default="textdiff")]
