"""One counter-based hash, from which every random number of textdiff comes.

A uniform is a pure function of what it is for: (seed, stream, row, block, step, position). Nothing
depends on the batch a row happens to sit in, on the rank that computes it, or on numbers drawn
before. So runs resume, rows batch and networks shard without changing a single draw. The hash
chains the 64-bit finaliser of Steele et al. (SplitMix64, OOPSLA 2014, Fig. 16) once per key, in
integer operations that give the same bits on every device.

On the CPU they are operations of numpy: on few numbers, those of torch take five times as long.
"""

import operator
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Index = int | Tensor
Words = int | NDArray[np.int64] | Tensor


class Stream(IntEnum):
    """Uses of uniforms; different streams never share numbers."""

    STRATA = 1  # which stratum a row or block lives in
    JITTER = 2  # where in its stratum
    POSITION = 3  # which positions are corrupted, and in which order
    TOKEN = 4  # which token a position becomes
    DROPOUT = 5  # seeds of dropout
    EPOCH = 6  # order and phase of the data
    PRIOR = 7  # tokens that sampling starts from
    PAIR = 8  # which positions are masked in the second mask of a pair
    BLOCK_SIZE = 9  # which block size a step trains
    RANGE = 10  # seeds of the draws that a search of mask rates measures
    PROMPT = 11  # whether a training row begins with a prompt, whether it is hidden, its length
    FIRST_PASS = 12  # whether a training row is conditioned on a first prediction of itself


def _wrap(value: int) -> int:
    """Return a 64-bit pattern as the signed integer that torch stores it in."""
    return value - (1 << 64) if value >= 1 << 63 else value


def signed(seed: int) -> int:
    """Return a seed of any size as the 64-bit integer that a tensor of seeds holds."""
    return _wrap(operator.index(seed) % (1 << 64))


_GOLDEN = _wrap(0x9E3779B97F4A7C15)
_MIX_1 = _wrap(0xBF58476D1CE4E5B9)
_MIX_2 = _wrap(0x94D049BB133111EB)


def _words(key: Index) -> Words:
    """Return a key as a number, as an array if it is on the CPU, or as it is."""
    if not isinstance(key, Tensor):
        return operator.index(key)
    key = key.to(torch.int64)
    if key.device.type != "cpu":
        return key
    return key.numpy() if key.ndim else int(key)


def _shift(x: Any, bits: int) -> Any:
    """Shift int64 to the right logically."""
    shifted = x >> bits
    shifted &= (1 << (64 - bits)) - 1
    return shifted


def _times(x: Any, shifted: Any, factor: int) -> Any:
    """Return (x ^ shifted) * factor in 64 bits, in the place of `shifted`."""
    shifted ^= x
    shifted *= factor
    return signed(shifted) if isinstance(shifted, int) else shifted


def _mix(x: Any) -> Any:
    x = _times(x, _shift(x, 30), _MIX_1)
    x = _times(x, _shift(x, 27), _MIX_2)
    return x ^ _shift(x, 31)


def bits(
    seed: Index,
    stream: Stream,
    row: Index = 0,
    block: Index = 0,
    step: Index = 0,
    position: Index = 0,
) -> Tensor:
    """Return 64 random bits as int64, for every element of the broadcast of the arguments.

    Keys enter one after another, smallest shapes first when the caller broadcasts `[B, 1]` rows
    against `[L]` positions. So only the last round runs on the full shape.
    """
    state = _mix((_words(seed) if isinstance(seed, Tensor) else signed(seed)) ^ _GOLDEN)
    for key in (int(stream), row, block, step, position):
        mixed = state ^ _mix(_words(key) + _GOLDEN)
        state = _mix(mixed + _GOLDEN)
    return torch.as_tensor(state)


def uniforms(
    seed: Index,
    stream: Stream,
    row: Index = 0,
    block: Index = 0,
    step: Index = 0,
    position: Index = 0,
) -> Tensor:
    """Return float64 uniforms strictly inside (0, 1), 52 random bits each.

    One bit fewer than a float64 holds: the half that keeps them off 0 takes a bit too, and with 53
    the largest would round to 1.

    Args:
        seed: the run's or the job's; a tensor of `signed` ones where rows have seeds of their own.
        stream: what the numbers decide.
        row: the sample's global index (training), the document's or the prompt's index in the job.
        block: index of the block in its sequence.
        step: the scheduled step (or replicate), counted also where its work is skipped.
        position: index in the sequence.

    Returns:
        A tensor of the broadcast shape of the arguments.
    """
    mantissa: Tensor = _shift(bits(seed, stream, row, block, step, position), 12)
    return (mantissa.to(torch.float64) + 0.5) * 2.0**-52


def stratified(strata_keys: Tensor, jitter: Tensor) -> Tensor:
    """Return low-discrepancy uniforms whose every entry is marginally uniform.

    The unit interval is cut into n strata, the strata are dealt out in random order, and each entry
    is uniform in its own. Sorting without dealing (the published low-discrepancy samplers) ties an
    entry to its stratum, which biases whatever differs between entries.

    Args:
        strata_keys: [n] float64 uniforms whose ranks deal the strata.
        jitter: [n] float64 uniforms.

    Returns:
        [n] float64 in (0, 1).
    """
    count = strata_keys.shape[-1]
    ranks = strata_keys.argsort(-1).argsort(-1)
    # A jitter next to 1 is rounded up when the rank is added.
    return ((ranks.to(torch.float64) + jitter) / count).clamp(max=1.0 - 2.0**-53)


@lru_cache(maxsize=1)
def level_uniforms(seed: int, step: int, count: int) -> Tensor:
    """Return [count] stratified uniforms of noise levels, which micro-batches of a step share."""
    entries = torch.arange(count)
    return stratified(
        uniforms(seed, Stream.STRATA, step=step, position=entries),
        uniforms(seed, Stream.JITTER, step=step, position=entries),
    )
