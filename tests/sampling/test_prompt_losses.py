"""Prompts that the tokenizer loses are reported; texts begin and end with what was written."""

import json

import pytest
import torch
from small_tokenizers import bpe, model_of, unigram, wordpiece

from textdiff.batch.lines import LineDefaults, read_rows
from textdiff.commands.sampling import read_template
from textdiff.errors import DataError
from textdiff.pipeline import TextDiffusion
from textdiff.view.cells import Pieces


@pytest.fixture(scope="module")
def words():
    return model_of(wordpiece())


def test_a_prompt_that_is_changed_is_reported(words, caplog):
    done = words.generate("The cat", max_new_tokens=2)
    assert len(done.lost) == len(caplog.records) == 1
    assert "'The cat'" in caplog.text
    caplog.clear()
    assert words.generate("the cat", max_new_tokens=2).lost == ()
    assert not caplog.records
    next(words.stream("the ☃ cat", max_new_tokens=2))
    assert "1 unknown" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "options", "lost"),
    [
        ("the [MASK:2] Cat", {}, 2),
        ("[MASK:2] cat ☃", {}, 1),
        ("the[MASK:2]cat", {}, 0),
        ("the", {"suffix": "Cat", "max_new_tokens": 2}, 1),
        (["The", "Cat", "the"], {"num_samples": 3, "max_new_tokens": 2}, 2),
    ],
)
def test_templates_suffixes_and_several_prompts(words, prompt, options, lost):
    assert len(words.generate(prompt, **options).lost) == lost


@pytest.mark.parametrize("options", [{"prompts": "☃☃ ☃"}, {"prompts": "  "}, {"suffix": "☃"}])
def test_a_prompt_of_which_nothing_is_left_is_refused(words, options):
    with pytest.raises(DataError) as error:
        words.generate(**options)
    assert error.value.code == "nothing_left_of_prompt"


def test_lines_of_a_file(words):
    prompts = ["The cat", "☃", "the"]
    lines = "".join(json.dumps({"prompt": p, "max_new_tokens": 2}) + "\n" for p in prompts)
    job = LineDefaults(1, 0, {}, read_template)
    cased, unknown, clean = read_rows(words, lines.encode(), "lines", job)
    assert len(cased.request.lost) == 1
    assert "nothing is left" in unknown.error
    assert clean.request.lost == ()
    assert words.run(cased.request).texts[0].startswith("the cat")


@pytest.mark.parametrize("make", [lambda: bpe(prefix=True), unigram])
def test_texts_do_not_begin_with_a_space_that_nobody_wrote(make):
    held = model_of(make())
    done = held.generate("the", num_samples=6, max_new_tokens=4)
    for text, completion in zip(done.texts, done.completions, strict=True):
        assert text == f"the{completion}"
    space = "Ġ" if make is not unigram else "▁"
    ids = held.tokenizer.convert_tokens_to_ids([space, "c", space, "a"])
    assert held.decode(ids) == held.finished([ids], [0])[0] == "c a"
    assert "".join(Pieces(held.tokenizer, [])(ids)) == "c a"
    assert held._reader.piece(ids, 1, 4) == "c a"
    assert held._reader.piece(ids, 2, 4) == " a"


def test_rows_without_a_token_are_never_drawn(tmp_path):
    held = model_of(bpe(), rows=400)
    named = len(held.tokenizer)
    with torch.no_grad():  # the network would put nearly everything on them
        held.model.get_output_embeddings().weight[named:] *= 30
    held.save_pretrained(tmp_path)
    for model in (held, TextDiffusion.from_pretrained(tmp_path, device="cpu")):
        clean = model.family.process.vocabulary.clean
        assert not clean[named:].any()
        assert clean.sum() == named - 2  # the mask and the padding
        done = model.generate("", num_samples=4, max_new_tokens=8)
        assert max(max(row) for row in done.sequences) < named
