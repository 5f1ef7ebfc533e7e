"""Checks that a network of transformers can be a denoiser exactly, by a few tokens.

Layers are found by their calls of the attention function. Then two properties are measured. A token
that attends to itself alone does not change others: nothing but attention mixes positions. Under
its own mask the network computes what it does without textdiff.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .attention import Attention
from .backbone_attention import NAME
from .layout import CAUSAL, FULL
from .shapes import ShapesOnly

TOKENS = 6
SAME = 1e-3  # of the largest hidden state; experts round differently with every batch
LONGEST_WINDOW = 512
"""Sliding windows up to so many tokens are checked from outside as well as inside."""


class BackboneProbe:
    """Shape of a network's attention, measured by running it.

    Args:
        network: under our attention function; on the meta device only its calls are checked.

    Attributes:
        layers: number of attention layers.
        key_heads: key/value heads of each.
        head_dim: D, channels of a head.
        blocks: qualified name of the list of its Transformer blocks.

    Raises:
        ValueError: it mixes positions outside attention, or differs under our attention.
    """

    def __init__(self, network: PreTrainedModel):
        self.network = network
        self.kind = type(network).__name__
        self.window = 0
        self.causal = self.kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        modules, shapes = self._calls()
        self.layers, self.key_heads, self.head_dim = len(modules), shapes[0][1], shapes[0][3]
        names = {module: name for name, module in network.named_modules()}
        parts = names[modules[0]].split(".")
        digit = next((i for i, step in enumerate(parts) if step.isdigit()), None)
        if digit is None:
            raise ValueError(f"{self.kind}: its layers are not in a list, which is not supported")
        self.blocks = ".".join(parts[:digit])
        self._count(modules, shapes)
        if not next(network.parameters()).is_meta:
            self._check_mixing()
            self._check_equality()

    def _calls(self) -> tuple[list[nn.Module], list[torch.Size]]:
        """Return the attention modules that a forward pass calls, in order, and shapes of keys."""
        modules: list[nn.Module] = []
        shapes: list[torch.Size] = []

        def record(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: Any
        ) -> Tensor:
            if key.shape != value.shape:
                raise ValueError(f"{self.kind}: its keys and values differ in width")
            module.textdiff_layer = len(modules)
            module.textdiff_causal = self.causal = bool(getattr(module, "is_causal", self.causal))
            self.window = max(self.window, int(window or 0))
            modules.append(module)
            shapes.append(key.shape)
            return torch.zeros_like(query)

        self._forward(self._ids(TOKENS), record)
        if not modules:
            raise ValueError(
                f"{self.kind} never calls transformers' attention functions: its positions are "
                "mixed in another way, which is not supported"
            )
        return modules, shapes

    def _count(self, modules: list[nn.Module], shapes: list[torch.Size]) -> None:
        """Refuse shared layers, layers without attention and layers of different shapes."""
        layers = len(self.network.get_submodule(self.blocks))
        if len(set(map(id, modules))) < len(modules):
            raise ValueError(f"{self.kind} calls one attention layer several times")
        if len(modules) != layers:
            raise ValueError(
                f"{self.kind}: {len(modules)} of its {layers} layers call attention; the others "
                "mix positions by convolution or recurrence, through which two streams would leak"
            )
        if len(set(shapes)) > 1:
            raise ValueError(f"{self.kind}: its layers differ in their key/value heads")

    def _check_mixing(self) -> None:
        """Refuse a network in which a token changes others that do not attend to it."""
        ids = self._ids(TOKENS)
        mask = torch.eye(TOKENS, dtype=torch.bool, device=ids.device)
        alone = Attention("eager", mask, layout=FULL, total=TOKENS, device=ids.device)
        changed = ids.clone()
        changed[:, 2] = ids[:, 3]
        before, after = self._forward(ids, alone), self._forward(changed, alone)
        others = [i for i in range(TOKENS) if i != 2]
        difference = (before[:, others] - after[:, others]).abs().max() / before.abs().max()
        if not difference < SAME:
            raise ValueError(
                f"{self.kind} mixes positions outside attention, through which two streams would "
                "leak"
            )

    def _check_equality(self) -> None:
        """Refuse a network that computes something else under its own mask than by itself."""
        dtype = next(self.network.parameters()).dtype
        if dtype not in (torch.float32, torch.float64):
            return  # rounding would hide a difference
        for tokens in {TOKENS, self.window + 2 if self.window <= LONGEST_WINDOW else TOKENS}:
            ids = self._ids(tokens)
            layout = CAUSAL if self.causal else FULL
            mask = layout.mask(tokens, ids.device)
            ours = self._forward(
                ids, Attention("eager", mask, layout=layout, total=tokens, device=ids.device)
            )
            self.network.set_attn_implementation("eager")
            try:
                with torch.no_grad():
                    theirs = self.network.base_model(ids, use_cache=False)[0]
            finally:
                self.network.set_attn_implementation(NAME)
            difference = float((ours - theirs).abs().max() / theirs.abs().max())
            if not difference < SAME:
                raise ValueError(
                    f"{self.kind} attends in a way that textdiff does not reproduce (hidden states "
                    f"differ by {difference:.0e} of the largest)"
                )

    def _ids(self, tokens: int) -> Tensor:
        """Return [1, tokens] different ids, none of them the padding."""
        rows = self.network.get_input_embeddings().weight.shape[0]
        pad = getattr(self.network.config, "pad_token_id", None)
        usable = [i for i in range(min(rows, tokens + 2)) if i != pad]
        ids = torch.tensor([usable[i % len(usable)] for i in range(tokens)])
        return ids.unsqueeze(0).to(next(self.network.parameters()).device)

    def _forward(self, ids: Tensor, attention: Any) -> Tensor:
        training = self.network.training
        self.network.eval()
        # Some models look for padding among ids, which without storage they have none of.
        given = {"input_ids": ids}
        if ids.is_meta:
            given = {"inputs_embeds": self.network.get_input_embeddings()(ids)}
        try:
            with torch.no_grad(), ShapesOnly() if ids.is_meta else nullcontext():
                output = self.network.base_model(**given, use_cache=False, **{NAME: attention})
        except (RuntimeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{self.kind} does not run under another attention ({str(error).splitlines()[0]})"
            ) from error
        finally:
            self.network.train(training)
        hidden: Tensor = output[0]
        return hidden
