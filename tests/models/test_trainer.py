"""The network in transformers' own tools: labels, Trainer, resizing, checkpoints with code."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from textdiff.data.sections import ByteTokenizer
from textdiff.data.tokenizer import train_tokenizer
from textdiff.models import TextDiffusionConfig, TextDiffusionModel


def tiny(**options) -> TextDiffusionModel:
    torch.manual_seed(0)
    settings = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "mask_token_id": 10}
    settings |= {"num_attention_heads": 2, "max_position_embeddings": 12}
    return TextDiffusionModel(TextDiffusionConfig(**(settings | options))).double().eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 11, (3, 7))
    labels = torch.where(torch.rand(3, 7) < 0.4, torch.randint(0, 10, (3, 7)), -100)
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("options", [{}, {"adaln": True, "mlp": "swiglu"}])
def test_labels_are_cross_entropy_where_they_are_not_ignored(batch, options):
    model = tiny(**options)
    found = model(**batch)
    assert torch.equal(found.logits, model(batch["input_ids"]).logits)
    chosen = batch["labels"] != -100
    expected = cross_entropy(found.logits[chosen], batch["labels"][chosen])
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    by_items = model(**batch, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(by_items, expected * chosen.sum() / 50, rtol=1e-12, atol=0)
    torch.testing.assert_close(model(**batch, num_items_in_batch=50).loss, by_items)
    found.loss.backward()
    assert all(p.grad is not None for p in model.output_layer.linear.parameters())


def test_labels_at_positions(batch):
    model, at = tiny(), torch.tensor([0, 3, 9, 20])
    logits = model(batch["input_ids"]).logits.flatten(0, 1)[at]
    labels = torch.tensor([1, -100, 2, 3])
    expected = cross_entropy(logits, labels)
    whole = torch.full((21,), -100)
    whole[at] = labels
    for given in (labels, whole.view(3, 7)):
        loss = model(batch["input_ids"], positions=at, labels=given).loss
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_a_batch_without_labels_costs_nothing(batch):
    model = tiny()
    loss = model(batch["input_ids"], labels=torch.full((3, 7), -100)).loss
    assert loss.item() == 0.0
    loss.backward()
    assert not model.output_layer.linear.weight.grad.any()


def test_half_precision_is_normalised_in_float32(batch):
    found = tiny().bfloat16()(**batch)
    assert found.logits.dtype == torch.bfloat16
    expected = cross_entropy(found.logits.float().flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(found.loss, expected)


def test_tuples_and_options_of_other_models(batch):
    model = tiny()
    loss, logits = model(**batch, return_dict=False)
    assert torch.equal(loss, model(**batch).loss)
    (alone,) = model(batch["input_ids"], return_dict=False)
    assert torch.equal(alone, logits)
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)
    assert model(**batch, return_dict=True).logits.equal(logits)
    quiet = dict.fromkeys(("inputs_embeds", "output_attentions", "output_hidden_states"))
    types = torch.ones_like(batch["input_ids"])
    assert model(batch["input_ids"], token_type_ids=types, **quiet)[0].equal(logits)
    for name, value in {"inputs_embeds": torch.zeros(3, 7, 16), "output_attentions": True}.items():
        with pytest.raises(ValueError, match=f"^{name} is not supported; "):
            model(batch["input_ids"], **{name: value})
    with pytest.raises(ValueError, match="input_ids are missing"):
        model(labels=batch["labels"])
    with pytest.raises(TypeError, match="no argument 'lables'"):
        model(batch["input_ids"], lables=batch["labels"])
    with pytest.raises(ValueError, match=r"\(3, 6\) do not fit"):
        model(batch["input_ids"], labels=batch["labels"][:, 1:])


# --- Trainer -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(ByteTokenizer(), ["abc"])


def trainer(tokenizer, folder, model=None, **options) -> Trainer:
    torch.manual_seed(0)
    texts = ["the cat sat", "on a mat", "and a dog", "ran over the hill", "so far", "away"] * 4
    rows = [{**tokenizer(text), "token_type_ids": [0] * len(tokenizer(text)["input_ids"])}
            for text in texts]  # fmt: skip
    if model is None:
        config = TextDiffusionConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            mask_token_id=tokenizer.mask_token_id, pad_token_id=tokenizer.pad_token_id, dropout=0.1,
        )  # fmt: skip
        model = TextDiffusionModel(config)
    settings = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "max_steps": 12,
        "learning_rate": 3e-3, "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 0,
        "disable_tqdm": True, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant",
        "save_strategy": "no",
    }  # fmt: skip
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **(settings | options)),
        train_dataset=rows,
        eval_dataset=rows[:5],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4, seed=0),
        processing_class=tokenizer,
    )


def test_trainer_trains_evaluates_saves_and_resumes(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path / "a", save_strategy="steps", save_steps=6,
                  eval_strategy="steps", eval_steps=6)  # fmt: skip
    before = run.evaluate()["eval_loss"]
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert run.evaluate()["eval_loss"] < before
    predicted = run.predict(run.eval_dataset)
    assert predicted.predictions.shape[::2] == (5, len(tokenizer))
    run.save_model(tmp_path / "saved")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    again = trainer(tokenizer, tmp_path / "a", max_steps=14)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-12"))
    assert again.state.global_step == 14


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}, {"bf16": True}],
    ids=str,
)
def test_trainers_other_ways(tokenizer, tmp_path, options):
    run = trainer(tokenizer, tmp_path, max_steps=2, **options)
    run.train()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    if "gradient_checkpointing" in options:
        assert run.model.gradient_checkpointing


def test_accumulation_is_the_whole_batch(tokenizer, tmp_path):
    """Losses are divided by the labels of the whole accumulated batch, not piece by piece."""
    weights = []
    for size, pieces in ((8, 1), (2, 4)):
        run = trainer(tokenizer, tmp_path / str(size), per_device_train_batch_size=size,
                      gradient_accumulation_steps=pieces, max_steps=1, optim="sgd",
                      learning_rate=1.0)  # fmt: skip
        run.model.double()
        run.model.config.dropout = 0.0
        for block in run.model.blocks:
            block.dropout = 0.0
        rows = run.data_collator(run.train_dataset[:8])  # the same masks for both
        run.train_dataset = [{k: v[i] for k, v in rows.items()} for i in range(8)]
        run.data_collator = lambda items: {k: torch.stack([i[k] for i in items]) for k in items[0]}
        run.train()
        weights.append(run.model.output_layer.linear.weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


# --- resizing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("mean", [True, False])
def test_resizing_keeps_what_there_is(tmp_path, learned, mean):
    schedule = {"kind": "learned", "exponent": 1.0} if learned else {"kind": "loglinear"}
    model = tiny(diffusion={"schedule": schedule}, excluded_token_ids=[9])
    ids = torch.randint(0, 11, (2, 5))
    before = model(ids).logits
    embedding = model.resize_token_embeddings(14, mean_resizing=mean)
    assert embedding is model.get_input_embeddings()
    assert model.config.vocab_size == len(embedding.embedding) == 14
    after = model(ids).logits
    torch.testing.assert_close(after[..., :11], before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after[..., 11], before.mean(-1), rtol=1e-9, atol=1e-9)
    assert torch.isfinite(model(torch.tensor([[11, 12, 13]])).logits).all()
    if learned:
        torch.testing.assert_close(model.exponents(), torch.ones(14, dtype=torch.float64))
    model.save_pretrained(tmp_path)
    loaded = TextDiffusionModel.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(ids).logits, after, rtol=1e-12, atol=1e-12)
    model(ids, labels=ids).loss.backward()
    assert model.vocab_embed.embedding.grad is not None
    model.resize_token_embeddings(11)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-12, atol=1e-12)
    assert model.config.excluded_token_ids == [9]


def test_rows_that_only_fill_up_are_never_predicted():
    model = tiny(excluded_token_ids=[9])
    model.resize_token_embeddings(12, pad_to_multiple_of=8)
    assert (model.config.vocab_size, model.config.excluded_token_ids) == (16, [9, 12, 13, 14, 15])
    assert model.resize_token_embeddings() is model.vocab_embed
    assert model.config.vocab_size == 16


def test_special_tokens_are_not_cut_off():
    with pytest.raises(
        ValueError, match="10 tokens would cut off a special token; give at least 11"
    ):
        tiny().resize_token_embeddings(10)


# --- a checkpoint's code -------------------------------------------------------------------------


def test_card_and_readme_name_the_oldest_version(root):
    from textdiff.config import Config
    from textdiff.export.records import model_card
    from textdiff.models.configuration import NEEDED

    words = f"transformers {'.'.join(map(str, NEEDED))} or newer"
    state = {"parameters": 1, "vocabulary": 2, "step": 3, "tokens": 4, "corpus": {}}
    assert words in model_card(Config(), state, None)
    assert words in (root / "README.md").read_text()
