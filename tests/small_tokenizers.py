"""Small tokenizers of every kind that model hubs hold, made here."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textdiff.config import Config
from textdiff.data.tokenizer import ensure_special_tokens
from textdiff.export.loading import family_of
from textdiff.models import TextDiffusionModel
from textdiff.pipeline import TextDiffusion
from textdiff.train.setup import model_config, sample_defaults

LETTERS = "abcdefghijklmnopqrstuvwxyzT"
SPECIALS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def unigram(
    *, byte_fallback: bool = False, scheme: str = "always", lower: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece's converters make them: special tokens are pieces of score 0."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [("▁", -2.0), ("▁the", -3.0), ("at", -3.5), ("▁cat", -4.0)]
    pieces += [(letter, -5.0) for letter in LETTERS + "<>/_.,0123456789\n"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=byte_fallback))
    if lower:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    metaspace = decoders.Metaspace(prepend_scheme=scheme)
    steps = [decoders.ByteFallback(), metaspace, decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps) if byte_fallback else metaspace
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIALS.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIALS
    )


def wordpiece(*, lower: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer as BERT's: lower case, white space collapsed, words that it lacks unknown."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", ",", ".", "[", "]"]
    names += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocab = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    specials = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    backend.add_special_tokens(list(specials.values()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def bpe(
    *, ignore_merges: bool = False, specials_by_merge: bool = False, prefix: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose vocabulary holds its special tokens as ordinary entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "at", "cat", "Ġcat", "<pad>", "</s>"]
    merges = [("a", "t"), ("c", "at"), ("Ġ", "cat")]
    if specials_by_merge:
        names += ["<p", "ad", "ad>"]
        merges += [("<", "p"), ("a", "d"), ("ad", ">"), ("<p", "ad>")]
    vocab = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<pad>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def model_of(
    tokenizer: PreTrainedTokenizerFast, *, rows: int = 0, block_size: int | None = None
) -> TextDiffusion:
    """A model of 24 tokens of context with noise for weights.

    Args:
        tokenizer: its tokenizer; it gets the special tokens that it lacks.
        rows: rows of the network besides those of the tokenizer.
        block_size: tokens per block.
    """
    torch.manual_seed(0)
    ensure_special_tokens(tokenizer)
    config = Config.model_validate(
        {
            "data": {"sequence_length": 24},
            "model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
            "diffusion": {"block_size": block_size},
        }
    )
    described = model_config(config, tokenizer)
    described.vocab_size += rows
    network = TextDiffusionModel(described).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    family = family_of(network.config, torch.device("cpu"))
    return TextDiffusion(network, tokenizer, family, sample_defaults(config))
