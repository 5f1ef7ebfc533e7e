"""The exact likelihood of a decoding rule: of the texts that it writes, as it writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from textdiff.errors import ConfigError
from textdiff.likelihood.estimators.estimator import Estimator, WindowBatch
from textdiff.likelihood.estimators.orders import ChainRule
from textdiff.sampling.rules import RULES, build_rule, check_likelihood
from textdiff.sampling.settings import SamplingConfig
from textdiff.section import torch

if TYPE_CHECKING:
    from textdiff.diffusion.family import Family
    from textdiff.likelihood.estimators.estimator import Parts
    from textdiff.likelihood.scorer import Scorer
    from textdiff.likelihood.windows import Windows
    from textdiff.models import Denoiser
    from textdiff.sampling.request import Request

SHARED = (
    *("knobs", "steps", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("guidance", "regex", "ban", "force"),
)
"""Options of a generation that change what a rule writes; a text's length is fixed."""

_OPTIONS: dict[str, Any] = {
    name: (SamplingConfig.model_fields[name].annotation, SamplingConfig.model_fields[name])
    for name in SHARED
}
_Options: Any = create_model("_Options", __base__=Estimator, **_OPTIONS)


class Policy(_Options):
    """Exact log-likelihood of what a decoding rule writes, of `--rule` and its options.

    Rules that pick positions from predictions alone write a text in one way (arXiv:2603.01367);
    the engine of generation writes it, a network call per step (`sampling.teacher_forcing`).
    """

    kind: Literal["policy"] = "policy"
    rule: str = Field("confidence", description="decoding rule, as of textdiff generate")

    exact: ClassVar[bool] = True
    writes: ClassVar[bool] = True

    @model_validator(mode="after")
    def _has_likelihood(self) -> Self:
        """Refuse rules without an exact likelihood, and knobs that do not exist."""
        try:
            check_likelihood(RULES.build(self.config.rule, self.config.knobs))
        except ConfigError as error:
            code = error.code or "value_error"
            raise PydanticCustomError(code, "{error}", {"error": str(error)}) from None
        return self

    @property
    def config(self) -> SamplingConfig:
        """The options of a generation."""
        return SamplingConfig().merge(**self.options())

    def check(self, denoiser: Denoiser, family: Family, windows: Windows) -> None:
        super().check(denoiser, family, windows)
        build_rule(self.rule, family, self.config.knobs)
        if family.process.replaces_tokens:
            raise ConfigError(
                f"a text has no exact likelihood under {family.process.name} noise: rules write "
                "tokens over others there, so that many ways lead to one text; use another "
                "estimator, or a model of absorbing noise",
                code="no_exact_likelihood",
            )
        if windows.ends is not None and family.block_size != 1:
            raise ConfigError(
                "estimator policy scores texts of a fixed length: what a rule would write behind "
                "the end takes part in its choice of positions, and would have to be summed over; "
                "leave end_of_text (--end-of-text) out",
                code="end_of_text_of_policy",
            )

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        request = self._request(batch, scorer)
        one_by_one = batch.family.block_size == 1 and not scorer.denoiser.time_conditioning
        # A rule's first call of a block reads no earlier prediction; a bound's is its second.
        one_by_one = one_by_one and scorer.denoiser.self_conditioning is None
        if one_by_one and request.controls.neutral and not request.config.guidance:
            # A block of one token leaves nothing to choose, so that all tokens fit into one call.
            scorer.calls += int(batch.scorable.sum())
            return ChainRule().score(batch, scorer)
        from textdiff.sampling.teacher_forcing import ForcedEngine

        engine = ForcedEngine(scorer.denoiser, scorer.family, request, batch.x0)
        with torch.no_grad():
            log_p = engine.log_likelihoods().cpu()  # [B, W]
        scorer.calls += engine.predictor.rows
        scorer.rows += engine.predictor.rows
        nats = batch.zeros()
        width = min(nats.shape[1], log_p.shape[1])
        nats[:, :width] = -log_p[:, :width]
        return {"diffusion": nats}

    def _request(self, batch: WindowBatch, scorer: Scorer) -> Request:
        """Return the request to write the scored tokens of windows.

        Raises:
            ConfigError: options that do not fit the model, or that need a tokenizer.
        """
        from textdiff.sampling.request import Request
        from textdiff.sampling.teacher_forcing import rewriting

        text = batch.x0 != batch.family.process.vocabulary.mask_token_id  # [B, L]
        job = rewriting(batch.x0, batch.scorable, text.sum(1))
        if scorer.preparer is not None:
            return scorer.preparer.request(job, self.config)
        config = self.config
        if config.regex is not None or config.ban or config.force:
            raise ConfigError(
                "patterns, bans and forced strings need a tokenizer; score through TextDiffusion",
                code="needs_tokenizer",
            )
        return Request(job, config)
