"""Prompt–answer runs of the real command: resumption, accumulation, processes; what is refused."""

import json

import pytest
from refusals import refused
from training_runs import Runs, assert_same_curve

from textdiff.cli import main
from textdiff.config.reading import validate
from textdiff.data.answer_layout import RowLayout
from textdiff.data.answers import TurnEncoder
from textdiff.data.conversations import ConversationEncoder, checked_messages
from textdiff.data.corpus import prepare_corpus
from textdiff.data.sections import ByteTokenizer
from textdiff.errors import ConfigError, DataError

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}={% else %};{% endif %}"
    "{% endfor %}"
)
USER, REPLY = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}


@pytest.fixture(scope="module")
def answers(runs) -> Runs:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{a}+{b}"},
                {"role": "assistant", "content": f"{a + b}"},
                {"role": "user", "content": "+1"},
                {"role": "assistant", "content": f"{a + b + 1}"},
            ]
        }
        for a in range(10)
        for b in range(9)
    ]
    (runs / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return runs


def flags(runs: Runs, block: str = "4", packing: str = "packed") -> list[str]:
    settings = json.dumps({"template": TEMPLATE, "packing": packing})
    return [
        f"--data.sources=[{{source: {runs / 'talks.jsonl'}}}]",
        f"--data.conversations={settings}",
        f"--diffusion.block_size={block}",
        "--train.lr_schedule=constant",
        "--evaluate.max_documents=3",
        "--sample={num_samples: 2, max_new_tokens: 8, steps: 4}",
        "--train.steps=12",
        "--train.checkpoint_every=6",
    ]


@pytest.fixture(scope="module")
def talks(answers) -> list[dict]:
    return answers.train("talks", *flags(answers))


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(answers, talks):
    answers.train("resumed", *flags(answers), "--train.steps=6")
    found = answers.train("resumed", *flags(answers))
    losses = [[line["loss"] for line in run if "loss" in line] for run in (found, talks)]
    assert losses[0] == losses[1]
    weights = [
        (answers / n / "export" / "model.safetensors").read_bytes() for n in ("resumed", "talks")
    ]
    assert weights[0] == weights[1]


def test_accumulation_changes_no_loss(answers, talks):
    found = answers.train("talks-accumulated", *flags(answers), "--train.micro-batch-size=2")
    assert_same_curve(found, talks)


def test_conversations_go_on_from_the_weights_of_another_run(answers, talks):
    """One step that changes next to nothing: the validation is that of the export."""
    start = f"--train.init-from={answers / 'talks' / 'export'}"
    still = ["--train.steps=1", "--train.learning-rate=1e-12", "--train.warmup-steps=0"]
    found = answers.train("talks-on", *flags(answers), start, *still)
    assert found[-1]["bound_nats"] == pytest.approx(talks[-1]["bound_nats"], rel=1e-5)
    assert found[-1]["bound_nats"] < 0.95 * talks[0]["loss"]


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_are_one(answers, talks):
    found = answers.launch("talks-cpu", "cpu", *flags(answers), "--train.micro-batch-size=4")
    assert_same_curve(found, talks)


def test_the_bound_of_validation_is_that_of_perplexity(answers, talks, capsys):
    """Held-out conversations are written as they are, and read by their columns."""
    held = answers / "talks" / "validation.jsonl"
    assert set(json.loads(held.read_text().splitlines()[0])) == {"messages"}
    capsys.readouterr()
    export = str(answers / "talks" / "export")
    assert main(["perplexity", export, str(held), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["mean"] == pytest.approx(talks[-1]["bound_nats"], rel=1e-5)
    assert main(["compare", export, export, str(held), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["difference"]["mean"] == 0.0
    assert [model["mean"] for model in compared["models"]] == [record["mean"]] * 2


def corpus(tmp_path, rows: list, conversations: dict | None = None, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "data": {
            "sources": [{"source": str(path)}],
            "cache_dir": str(tmp_path / "cache"),
            "sequence_length": 16,
            "conversations": conversations or {},
            **data,
        },
        "tokenizer": {"kind": "byte"},
    }
    config = validate(raw)
    return prepare_corpus(config.data, config.tokenizer, 0, block_sizes=(4,))


@pytest.mark.parametrize("unit", [1, 4])
def test_the_prompt_of_a_later_turn_is_what_training_showed_before_it(unit):
    tokenizer = ByteTokenizer().prepare(())
    tokenizer.chat_template = TEMPLATE
    talk = checked_messages([USER, REPLY, {"role": "user", "content": "+1"}, REPLY])
    encoded = TurnEncoder(tokenizer)(json.dumps({"messages": [vars(m) for m in talk]}), "talk")
    pairs = [(turn.prompt, turn.answer) for turn in encoded]
    row = RowLayout(32, unit, tokenizer.eos_token_id).write(pairs, last_only=True)
    prompt = ConversationEncoder(tokenizer, unit).prompt(talk[:3])
    assert prompt.tolist() == row.tokens[: row.scored.argmax()].tolist()
    assert (len(prompt) - len(pairs[1][0])) % unit == 0


GOOD = [{"question": f"{n}+1=", "answer": f"{n + 1}"} for n in range(30)]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": [USER, REPLY]}, "no_chat_template"),
        ({"messages": [USER]}, "no_answer"),
        ({"messages": [{"role": "robot", "content": "2"}]}, "unknown_role"),
        ({"prompt": "1", "completion": " "}, "empty_answer"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "blank_content"),
        ({"text": "1+1=2"}, "no_conversation_columns"),
        ({"prompt": "1", "completion": "2", "question": "1", "answer": "2"}, "mixed_columns"),
        ({"question": "1+1=", "answer": "2" * 40}, "answer_too_long"),
        ({"question": "1" * 40, "answer": "2"}, "conversation_too_long"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_with_their_place(tmp_path, row, code):
    with refused(DataError, code):
        corpus(tmp_path, [*GOOD, *[row] * 30], validation=0.02)  # too many to be held out


def test_bad_rows_and_long_ones_are_left_out_on_request_and_counted(tmp_path):
    long = [{"question": "1" * 40, "answer": str(n)} for n in range(4)]
    cut = [{"question": "12", "answer": f"{n}" * 30} for n in range(4)]
    rows = [*GOOD, {"text": "no"}, *long, *cut]
    made = corpus(tmp_path, rows, {"too_long": "cut"}, on_bad_rows="skip", validation=0.05)
    assert any("1 bad row" in note for note in made.notes)
    dropped, shortened = made.train.dropped, made.train.shortened
    assert len(made.train) == made.train.stream.num_documents - dropped
    assert 2 <= dropped <= 4
    assert 2 <= shortened <= 4
    assert sum("longer than a sequence" in note for note in made.notes) == 2
    kept = corpus(tmp_path, rows, {"too_long": "drop"}, on_bad_rows="skip", validation=0.05)
    assert kept.train.dropped == dropped + shortened


@pytest.mark.parametrize(
    ("sections", "code"),
    [
        ({"data": {"conversations": {"packing": "packed"}}}, "packed_full_sequence"),
        (
            {"diffusion": {"schedule": {"kind": "learned"}, "noise": {"draw": "time"}}},
            "conversations_with_learned_schedule",
        ),
        ({"diffusion": {"noise": {"prompts": 0.5}}}, "conversations_with_random_prompts"),
        ({"diffusion": {"noise": {"range": "search"}}}, "conversations_with_searched_range"),
    ],
)
def test_choices_that_are_not_exact_are_refused(sections, code):
    with refused(ConfigError, code):
        validate({"data": {"conversations": {}}, **sections})
