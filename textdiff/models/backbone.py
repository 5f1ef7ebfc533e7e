"""Networks of transformers as denoisers: causal or masked language models built on attention.

`BackboneProbe` refuses networks for which our attention is not exact.

Shapes: B rows, L positions, T = L or 2L inputs, H hidden, N selected positions, V vocabulary.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .attention import Attention, prepare, unavailable
from .backbone_attention import NAME
from .cache import CacheSlice, KVCache
from .configuration import initial_exponent
from .devices import to_device, uncompiled
from .interface import Denoiser
from .layers import NoiseEmbedding, StepEmbedding, TokenExponents
from .layout import FULL, Layout, Places, flat_places, noise_levels
from .probe import BackboneProbe
from .stock import (
    STORED,
    BackboneHead,
    build_network,
    first_position,
    load_network,
    network_class,
    without_bars,
)

EXTRA_FILE = "diffusion.safetensors"
"""Weights of an export that its architecture does not have."""


def noise_embedding(diffusion: Mapping[str, Any], size: int) -> nn.Module | None:
    """Return the module that embeds noise levels, whose output starts at zero; None: none does.

    Args:
        diffusion: the `diffusion` section of a configuration.
        size: C, its channels.
    """
    if not diffusion.get("noise_embedding"):
        return None
    if diffusion.get("time_input") == "step":
        table = StepEmbedding(diffusion["timesteps"], size)
        nn.init.zeros_(table.weight)
        return table
    embedding = NoiseEmbedding(size)
    nn.init.zeros_(embedding.mlp[-1].weight)
    nn.init.zeros_(embedding.mlp[-1].bias)
    return embedding


class TransformersDenoiser(Denoiser):
    """Causal or masked language model of transformers as a denoiser.

    Its dropout is off: an adapted network sees little data more than once.

    Args:
        config: configuration of the network, with `diffusion`, `mask_token_id` and
            `excluded_token_ids` as further attributes. It is copied.
        network: the network; None: one with random weights.

    Attributes:
        network: the network.
        noise_embedding: embedding of the noise level that is added to those of tokens; None: the
            network does not read it.

    Raises:
        ValueError: the network mixes positions outside attention, or attends inexactly.
    """

    cuda_graphs = False  # networks of transformers may ask the device

    def __init__(self, config: PreTrainedConfig, network: PreTrainedModel | None = None):
        super().__init__()
        backend = (config if network is None else network.config)._attn_implementation
        self.attn_implementation = "sdpa" if backend in (None, NAME) else str(backend)
        if network is None:
            network = build_network(config)
        given, config = network.config, copy.deepcopy(network.config)
        for module in network.modules():  # one object: some versions change attention in it alone
            if getattr(module, "config", None) is given:
                module.config = config
        network.set_attn_implementation(NAME)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.config = network.config
        self.network = network
        self.self_conditioning = None
        diffusion = getattr(self.config, "diffusion", None) or {}
        size = network.get_input_embeddings().weight.shape[1]
        self.noise_embedding = noise_embedding(diffusion, size)
        exponent = initial_exponent(self.config)
        rows = self.config.vocab_size
        self.exponents = None if exponent is None else TokenExponents(rows, exponent)
        probe = BackboneProbe(network)
        self.layers, self.key_heads, self.head_dim = probe.layers, probe.key_heads, probe.head_dim
        self._first_position = first_position(network)
        if self.context > self.config.max_position_embeddings - self._first_position:
            raise ValueError(
                f"sequences of {self.context} tokens do not fit its "
                f"{self.config.max_position_embeddings} positions, which count from "
                f"{self._first_position}"
            )
        # Not registered: they are parts of the network, whose parameters would have two names.
        self.__dict__["blocks"] = network.get_submodule(probe.blocks)
        self.attach_head()

    def attach_head(self) -> None:
        """Take the head from the network, again after its modules were replaced."""
        self.__dict__["output_layer"] = BackboneHead(self.network)

    @property
    def context(self) -> int:
        """Tokens that it was trained to see at once, as many as its positions reach."""
        diffusion = getattr(self.config, "diffusion", None) or {}
        longest = self.config.max_position_embeddings - self._first_position
        return int(diffusion.get("sequence_length") or longest)

    @property
    def time_conditioning(self) -> bool:
        """True where the noise level enters."""
        return self.noise_embedding is not None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.network.parameters()).dtype

    def forward(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        layout: Layout = FULL,
        positions: Tensor | None = None,
        cache: CacheSlice | None = None,
        return_dict: bool = True,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Return raw logits [N, V], or [B, L, V]; arguments as for `hidden`."""
        x, _ = self.hidden(input_ids, context_ids, sigma, layout, positions, cache)
        output = MaskedLMOutput(logits=self.output_layer(x))
        return output if return_dict else output.to_tuple()

    def hidden(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        layout: Layout = FULL,
        positions: Places = None,
        cache: CacheSlice | None = None,
        context_positions: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Return hidden states for the head; see `Denoiser.hidden`.

        Raises:
            ValueError: the attention backend cannot run here, or a stream is missing.
        """
        reason = unavailable(
            self.attn_implementation, input_ids.device, gradients=torch.is_grad_enabled()
        )
        if reason:
            raise ValueError(reason)
        if (context_ids is not None) != (layout.streams == 2):
            raise ValueError(f"the {layout.kind} layout takes {layout.streams} stream(s) of tokens")
        batch, length = input_ids.shape
        tokens = input_ids if context_ids is None else torch.cat([input_ids, context_ids], dim=1)
        attention = self._prepare(layout, tokens, cache)
        at = torch.arange(length, device=tokens.device).repeat(layout.streams).unsqueeze(0)
        if cache is not None:
            at = to_device(cache.positions, tokens.device).view(-1, tokens.shape[1])
        compiled = self.blocks[0]._compiled_call_impl is not None
        with uncompiled(compiled and cache is not None):  # shapes of these calls always differ
            x = self._run(
                position_ids=at + self._first_position,  # [1 or B, T]
                **self._embed(tokens, sigma, layout, batch, length),
                **{NAME: attention},
            )
        x = x if context_positions is not None else x[:, :length]
        at = flat_places(positions, context_positions, length)
        return (x if at is None else x.flatten(0, 1)[at]), None

    def _prepare(self, layout: Layout, tokens: Tensor, cache: CacheSlice | None) -> Attention:
        compiled = self.blocks[0]._compiled_call_impl is not None
        backend = self.attn_implementation
        return prepare(backend, layout, tokens, cache, compiled, self.compute_dtype)

    def _run(self, **inputs: Any) -> Tensor:
        """Return [B, T, H] final hidden states of the base model."""
        output = self.network.base_model(use_cache=False, **inputs)
        hidden: Tensor = output[0]
        return hidden

    def _embed(
        self, tokens: Tensor, sigma: Tensor | None, layout: Layout, batch: int, length: int
    ) -> dict[str, Tensor]:
        """Return the base model's input: tokens, or embeddings that include the noise level."""
        if self.noise_embedding is None:
            return {"input_ids": tokens}
        if sigma is None:
            sigma = torch.zeros(batch, device=tokens.device)
        levels, index = noise_levels(sigma.view(batch, -1), layout, length)
        level = self.noise_embedding(levels)  # [B, S, H]
        if index is not None:
            level = level[:, index]  # [B, T, H]
        embedded = self.network.get_input_embeddings()(tokens)
        return {"inputs_embeds": embedded + level.to(embedded.dtype)}

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """Return an empty cache; keys and values are stored once per key/value head."""
        shape = self.layers, 2, slots, self.key_heads, capacity, self.head_dim
        return KVCache(shape, self.compute_dtype, self.device)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute blocks in the backward pass."""
        self.network.gradient_checkpointing_enable({"use_reentrant": False})

    def tie_weights(self) -> None:
        """Make tied embeddings one tensor again, after a state was assigned."""
        self.network.tie_weights()

    # --- files ---

    def save_pretrained(self, folder: Path) -> None:
        """Write an ordinary folder of the architecture, and `diffusion.safetensors` if needed."""
        with without_bars():
            self.network.save_pretrained(folder)
        self.save_extra(folder)

    def save_extra(self, folder: Path) -> None:
        """Write the weights that the architecture does not have, if there are any."""
        extra = {name: p.detach().contiguous() for name, p in self.extra().items()}
        if extra:
            save_file(extra, folder / EXTRA_FILE)

    def load_extra(self, folder: Path) -> None:
        """Read what `save_extra` wrote."""
        extra = self.extra()
        stored = load_file(folder / EXTRA_FILE) if extra else {}
        for name, parameter in extra.items():
            parameter.data.copy_(stored[name])

    def extra(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the architecture does not have, by name."""
        named = self.named_parameters()
        return {name: p for name, p in named if not name.startswith("network.")}

    @classmethod
    def from_pretrained(
        cls, folder: Path, config: PreTrainedConfig, dtype: torch.dtype
    ) -> tuple["TransformersDenoiser", dict[str, Any]]:
        """Return a network with the weights of a folder, and transformers' account of their names.

        Args:
            folder: of an export or of a stock model; only safetensors are read, no code.
            config: its configuration.
            dtype: of the network.
        """
        network, info = load_network(network_class(config), folder, config, dtype, **STORED)
        denoiser = cls(config, network)
        denoiser.load_extra(folder)
        return denoiser.to(dtype).eval(), info
