"""The block loop: prompts become canvases, and a decoding rule fills them block by block.

A full-sequence model has one block. Rows of different length share a batch; what a row becomes does
not depend on the batch: its uniforms are keyed by its index in the job, and padding is invisible.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.errors import ConfigError
from textdiff.models import CAUSAL, Layout, TextDiffusionModel, late, sampling_layout
from textdiff.sampling.controls import Controls
from textdiff.sampling.rules import RULES, Step, Uniforms


@dataclass(frozen=True)
class Job:
    """Rows to generate.

    Attributes:
        prompts: token ids of each row's prompt (may be empty).
        new_tokens: tokens to generate for each row.
        first_row: index of the first row in a larger job; seeds depend on it, batches do not.
        seed: seed of the job.
    """

    prompts: Sequence[Sequence[int]]
    new_tokens: Sequence[int]
    first_row: int = 0
    seed: int = 0

    @property
    def lengths(self) -> Tensor:
        """[R] tokens of each finished row."""
        return torch.tensor(
            [len(p) + n for p, n in zip(self.prompts, self.new_tokens, strict=True)]
        )


class Denoiser:
    """A network and its objective as a rule sees them: a canvas in, predictions out.

    Args:
        model: the network.
        family: process, schedule, objective and block size.
        lengths: [R] tokens of each row; what lies beyond is padding.
    """

    def __init__(self, model: TextDiffusionModel, family: Family, lengths: Tensor):
        self.model = model
        self.family = family
        self.lengths = lengths
        self.shifted = family.objective.shifted
        self.layout: Layout = CAUSAL if self.shifted else sampling_layout(family.block_size)
        self.block = 0

    def __call__(self, canvas: Tensor, t: Tensor, positions: Tensor) -> Prediction:
        """Predicts [N] flat host positions of canvas [R, L] at times t [R]."""
        width = canvas.shape[1]
        device = canvas.device
        rows, where = torch.unique(positions // width, return_inverse=True)
        end = min(self.family.blocks(width).span(self.block).stop, int(self.lengths[rows].max()))
        at = (where * end + positions % width).to(device)
        xs = canvas[rows.to(device), :end] if len(rows) < len(canvas) else canvas[:, :end]
        alpha = self.family.known_alpha(self.family.schedule.alpha(t[rows]))
        logits = self.model(
            late(xs, self.family.process.mask_token_id) if self.shifted else xs,
            sigma=self._sigma(alpha, end).to(device),
            layout=self.layout.within(self._documents(self.lengths[rows], end, device)),
            positions=at,
        ).logits
        return self.family.objective.predict(logits, xs.flatten()[at], alpha[where].to(device))

    def _sigma(self, alpha: Tensor, end: int) -> Tensor:
        """[r, 1], or [r, blocks] with zero noise in the finished ones."""
        sigma = -torch.log(alpha).float().unsqueeze(1)
        if self.family.block_size is None:
            return sigma
        levels = torch.zeros(len(alpha), self.family.blocks(end).count)
        levels[:, self.block] = sigma.squeeze(1)
        return levels

    @staticmethod
    def _documents(lengths: Tensor, end: int, device: torch.device) -> Tensor | None:
        if int(lengths.min()) >= end:
            return None
        real = torch.arange(end) < lengths[:, None]
        return (real.to(torch.int64) - 1).to(device)


@torch.no_grad()
def generate(
    model: TextDiffusionModel,
    family: Family,
    job: Job,
    *,
    rule: str,
    steps: int,
    controls: Controls,
) -> Iterator[Step]:
    """Generates rows, yielding the canvas after every network call.

    Args:
        model: the network, in evaluation mode.
        family: process, schedule, objective and block size.
        job: prompts, lengths and seed.
        rule: name of a decoding rule.
        steps: denoising steps per block.
        controls: temperature and truncation.

    Raises:
        ConfigError: unknown rule, no step, or a row longer than the model's context.
    """
    if rule not in RULES:
        raise ConfigError(f"unknown decoding rule {rule!r}; one of {', '.join(RULES)}")
    if steps < 1:
        raise ConfigError(f"{steps} denoising steps: give at least 1")
    canvas, open_positions = _canvas(model, family, job)
    denoise = Denoiser(model, family, job.lengths)
    blocks = family.blocks(canvas.shape[1])
    inside = blocks.index()
    calls = 0
    for block in range(blocks.count):
        here = open_positions & (inside == block)
        if not bool(here.any()):
            continue
        denoise.block = block
        done = calls
        for step in RULES[rule](
            denoise,
            family.process,
            family.schedule,
            canvas,
            steps=steps,
            frozen=~here,
            uniforms=_uniforms(job, block, canvas.shape[1]),
            controls=controls,
        ):
            canvas, calls = step.canvas, done + step.calls
            yield replace(step, index=done + step.index, calls=calls)


def _uniforms(job: Job, block: int, width: int) -> Uniforms:
    """The numbers of one block, keyed by what each is for."""
    rows = (torch.arange(len(job.prompts)) + job.first_row)[:, None]
    positions = torch.arange(width)

    def draw(stream: Stream, step: int) -> Tensor:
        return uniforms(job.seed, stream, row=rows, block=block, step=step, position=positions)

    return draw


def _canvas(model: TextDiffusionModel, family: Family, job: Job) -> tuple[Tensor, Tensor]:
    """[R, L] prompts followed by the prior, and which positions are open (on the host)."""
    lengths = job.lengths
    context = model.config.max_position_embeddings
    if int(lengths.max()) > context:
        row = int(lengths.argmax())
        raise ConfigError(
            f"prompt of {len(job.prompts[row])} tokens and {job.new_tokens[row]} new tokens do "
            f"not fit the model's context of {context} tokens; shorten the prompt or ask for fewer "
            "tokens"
        )
    width = int(lengths.max())
    rows = (torch.arange(len(lengths)) + job.first_row)[:, None]
    u = uniforms(job.seed, Stream.PRIOR, row=rows, position=torch.arange(width))
    canvas = family.host.process.prior((len(lengths), width), u)
    for row, prompt in enumerate(job.prompts):
        canvas[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    at = torch.arange(width)
    starts = torch.tensor([len(prompt) for prompt in job.prompts])[:, None]
    return canvas.to(model.device), (at >= starts) & (at < lengths[:, None])
