"""Tokenizers without what they do to the beginning of a text: pieces put together are the text."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textdiff.config import Config
from textdiff.data.backend import continuation
from textdiff.data.encode import encode_documents
from textdiff.data.sections import BpeTokenizer
from textdiff.data.tokenizer import ensure_special_tokens, train_tokenizer
from textdiff.export.loading import family_of
from textdiff.models import TextDiffusionModel
from textdiff.pipeline import TextDiffusion
from textdiff.train.setup import model_config, sample_defaults
from textdiff.view.cells import Pieces

VOCABULARY = {c: i for i, c in enumerate(["<unk>", "▁", *"Thecasxt,", "▁c", "at", "▁s", "▁cat"])}
VOCABULARY_NAMES = {i: name for name, i in VOCABULARY.items()}
MERGES = [("▁", "c"), ("a", "t"), ("▁", "s"), ("▁c", "at")]


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before a text, in one of the ways in which files say so."""
    backend = Tokenizer(models.BPE(VOCABULARY, MERGES, unk_token="<unk>"))
    space = normalizers.Replace(" ", "▁")
    if kind == "prepend":  # as Llama's
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    elif kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        scheme = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.pre_tokenizer = pre_tokenizers.Sequence([scheme])
        backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("kind", ["prepend", "metaspace", "nested"])
@pytest.mark.parametrize("piece", [" cat", "cat", "  cat", "x, cat s", "s", " "])
def test_a_piece_has_its_own_spaces_and_no_other(kind, piece):
    tokenizer = sentencepiece(kind)
    onward = continuation(tokenizer)
    (ids,) = encode_documents(onward, [piece])
    assert onward.decode(ids) == piece
    first = encode_documents(tokenizer, ["The"])[0].tolist()
    assert tokenizer.decode([*first, *ids]) == f"The{piece}"
    assert "".join(VOCABULARY_NAMES[i] for i in ids) == piece.replace(" ", "▁")
    assert tokenizer.decode(encode_documents(tokenizer, [piece.strip()])[0]) == piece.strip()


def test_what_special_tokens_are_stays():
    tokenizer = sentencepiece("prepend")
    tokenizer.add_special_tokens({"mask_token": "<m>"})
    onward = continuation(tokenizer)
    assert onward.mask_token_id == tokenizer.mask_token_id
    assert onward.decode([2, tokenizer.mask_token_id, 3], skip_special_tokens=True) == "Th"


def test_tokenizers_that_treat_all_text_alike_are_themselves():
    tokenizer = train_tokenizer(BpeTokenizer(vocab_size=300), ["the cat sat on the mat"] * 3)
    assert continuation(tokenizer) is tokenizer


@pytest.fixture(scope="module", params=["prepend", "metaspace"])
def model(request) -> TextDiffusion:
    torch.manual_seed(0)
    tokenizer = ensure_special_tokens(sentencepiece(request.param))
    config = Config.model_validate(
        {
            "data": {"sequence_length": 24},
            "model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
        }
    )
    network = TextDiffusionModel(model_config(config, tokenizer)).eval()
    family = family_of(network.config, torch.device("cpu"))
    return TextDiffusion(network, tokenizer, family, sample_defaults(config))


def test_what_is_given_of_a_text_stands_in_it_and_the_rest_is_the_completion(model):
    options = {"num_samples": 8, "steps": 4}
    done = model.generate("The[MASK:3] cat,[MASK:2]s", **options)
    for text, (first, second) in zip(done.texts, done.holes, strict=True):
        assert text == f"The{first} cat,{second}s"
    assert {hole[0] for holes in done.holes for hole in holes if hole} >= {" ", "a"}
    done = model.generate("The", suffix=" cat", max_new_tokens=4, **options)
    for text, completion in zip(done.texts, done.completions, strict=True):
        assert text == f"The{completion} cat"
    done = model.generate("The", max_new_tokens=4, **options)
    assert [f"The{each}" for each in done.completions] == done.texts
    assert any(each.startswith(" ") for each in done.completions)
    done = model.generate("", max_new_tokens=4, **options)
    assert done.completions == done.texts
    assert model.generate("The x", max_new_tokens=4, seed=1).texts[0].startswith("The x")


def test_strings_of_tokens_have_their_spaces_beside_masks(model):
    mask, cat, the = model.tokenizer.mask_token_id, VOCABULARY["▁cat"], VOCABULARY["T"]
    pieces = Pieces(model.tokenizer, [mask])
    assert pieces([cat, the, cat]) == ["cat", "T", " cat"]
    assert pieces([mask, cat, mask, cat]) == ["", " cat", "", " cat"]
