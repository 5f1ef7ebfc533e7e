"""Conversations of a few tokens, as rows."""

import numpy as np

from textdiff.data.answer_rows import AnswerSequences
from textdiff.data.conversations import Turn
from textdiff.data.sections import Conversations
from textdiff.data.shards import Shard, describe_shards
from textdiff.data.token_stream import TokenStream

END, PAD = 3, 10


def turn(prompt: list[int], answer: list[int]) -> Turn:
    return Turn(np.array(prompt, np.int32), np.array([*answer, END], np.int32), len(answer))


def sequences(
    folder, talks, length, *, packing="padded", block_sizes=(None,), pad=PAD
) -> AnswerSequences:
    folder.mkdir(exist_ok=True)
    with Shard(folder, 0, None, 2**16) as shard:
        for talk in talks:
            pieces = [ids for turn in talk for ids in (turn.prompt, turn.answer)]
            shard.write([(ids, at + 1 == len(pieces)) for at, ids in enumerate(pieces)])
    describe_shards(folder, {0: shard.description()}, END)
    stream = TokenStream(folder)
    settings = Conversations(packing=packing)
    return AnswerSequences(stream, length, 0, settings, block_sizes, (END, pad))
