"""Conversations: `textdiff chat`, `textdiff generate --messages` and `TextDiffusion.chat`."""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import build
from refusals import refused
from terminals import in_a_terminal

from textdiff.cli import main
from textdiff.commands.chatting import ChatSession
from textdiff.commands.sampling import Sampling
from textdiff.data.conversations import Message
from textdiff.errors import ConfigError, DataError
from textdiff.pipeline import TextDiffusion
from textdiff.view.display import TextPrinter
from textdiff.view.progress import make_console

PLAIN = (
    "{% for m in messages %}{{ m.role[0] + m.content + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
FLAGS = ["--max-new-tokens", "6", "--steps", "3"]
OPTIONS = {"max_new_tokens": 6, "steps": 3}


def stop_now():
    raise KeyboardInterrupt


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Exports that follow a chat template: `full`, and `blocks` of 4."""
    folder = tmp_path_factory.mktemp("chat")
    for name, block_size in (("full", None), ("blocks", 4)):
        held = build("byte", 2, block_size)
        held.tokenizer.chat_template = PLAIN
        held.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module", params=["full", "blocks"])
def held(folder, request):
    return TextDiffusion.from_pretrained(folder / request.param)


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """Pipes lines into a conversation; gives exit code, standard output and standard error."""

    def run(*lines: str, name: str = "full", more: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code = main(["chat", str(folder / name), *FLAGS, *more])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run


# --- Python ---------------------------------------------------------------------------------------


def test_chat_is_generate_from_the_rendered_prompt(held):
    messages = [{"role": "system", "content": "s"}, user("c")]
    plain = held.generate("ss|uc|a", **OPTIONS)
    answer = held.chat(messages, **OPTIONS)
    assert answer == plain
    both = held.chat([messages, [Message("user", "c")]], num_samples=2, **OPTIONS)
    assert both.completions[0] == plain.completions[0]
    assert len(both.completions) == 4
    *_, last = held.stream(held.chat_prompts(messages), **OPTIONS)
    assert last.canvas[0, : len(plain.sequences[0])].tolist() == plain.sequences[0]


def favour(token: int):
    def hook(context, log_x0: torch.Tensor) -> torch.Tensor:
        pushed = log_x0.clone()
        pushed[:, token] += 40.0
        return pushed

    return hook


def test_an_answer_ends_at_the_template_s_own_end_token():
    held = build("byte", 0)
    held.tokenizer.add_tokens(["<|pad|>"], special_tokens=True)
    held.tokenizer.chat_template = PLAIN.replace("'|'", "'<|pad|>'")
    pad = held.tokenizer.pad_token_id
    clean = held.family.process.vocabulary.clean.clone()
    clean[pad] = True  # as of checkpoints that may predict every token
    held.family.process.vocabulary.clean.copy_(clean)
    options = {"hooks": [favour(pad)], "min_new_tokens": 2, "max_new_tokens": 6, "steps": 6}
    (prompt,) = held.chat_prompts([user("c")])
    sequence = held.generate([prompt], **options).sequences[0]
    start = len(prompt.tokens)
    assert sequence[start : start + 2].count(pad) == 0
    assert sequence[start + 2] == pad
    assert held.generate([prompt], **options).completions == [
        held.decode(sequence[start : start + 2])
    ]


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([], "no_messages"),
        ("hello", "not_a_conversation"),
        ([[user("a")], []], "no_messages"),
        ([user("a"), {"role": "assistant", "content": "b"}], "nothing_to_answer"),
        ([{"role": "system", "content": "b"}], "nothing_to_answer"),
    ],
)
def test_conversations_without_a_question_are_refused(held, messages, code):
    with refused(DataError, code):
        held.chat(messages)


def test_models_without_a_template_and_suffixes_are_refused(held):
    with refused(DataError, "no_chat_template"):
        build("byte", 0).chat([user("a")])
    with refused(ConfigError, "not_a_conversation_alone"):
        held.chat([user("a")], suffix="b")
    with refused(ConfigError, "no_room"):
        build_full = build("byte", 0)
        build_full.tokenizer.chat_template = PLAIN
        build_full.chat([user("a" * 30)])


def test_characters_that_the_tokenizer_was_not_trained_on_are_refused():
    held = build("char", 0)
    held.tokenizer.chat_template = "{{ messages[-1].content }}"
    with refused(DataError, "foreign_characters"):
        held.chat([user("a§")])


# --- generate --messages --------------------------------------------------------------------------


def test_generate_answers_the_conversations_of_a_file(folder, tmp_path, capsys):
    file = tmp_path / "talks.json"
    talks = [[user("c")], [user("d")]]
    file.write_text(json.dumps(talks))
    held = TextDiffusion.from_pretrained(folder / "full")
    expected = held.chat(talks, num_samples=2, **OPTIONS).completions
    words = ["generate", str(folder / "full"), "--messages", str(file), "--num-samples", "2"]
    assert main([*words, *FLAGS]) == 0
    printed = capsys.readouterr().out
    assert printed == "\n\n---\n\n".join(text.strip() for text in expected) + "\n"
    assert main([*words, *FLAGS, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["messages"] == talks
    assert [sample["completion"] for sample in record["samples"]] == expected
    assert [sample["conversation"] for sample in record["samples"]] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("content", "words", "code", "said"),
    [
        ("[", [], 1, "is not JSON"),
        ("[NaN]", [], 1, "is not JSON"),
        ('[{"role": "tool", "content": "x"}]', [], 1, "[0]: role 'tool' is not known"),
        ('[{"role": "user", "content": "x"}]', ["the"], 2, "leave PROMPT"),
        ('[{"role": "user", "content": "x"}]', ["--input", "a", "--output", "b"], 2, "exclude"),
    ],
)
def test_files_that_cannot_be_answered_give_a_sentence(
    folder, tmp_path, capsys, content, words, code, said
):
    file = tmp_path / "talk.json"
    file.write_text(content)
    given = ["generate", str(folder / "full"), *words, "--messages", str(file)]
    assert main(given) == code
    shown = capsys.readouterr().err
    assert shown.startswith("textdiff: error: ")
    assert said in shown
    assert shown.count("\n") == 1


def test_the_examples_of_the_page_run(root, folder, tmp_path, monkeypatch, capsys):
    page = (root / "docs" / "chat.md").read_text()
    blocks = dict(re.findall(r"^```(\w+)\n(.+?)^```", page, flags=re.S | re.M))
    held = build("byte", 2, block_size=4)
    held.tokenizer.chat_template = "{{ messages[-1].content[-5:] }}"
    held.defaults = held.defaults.merge(**OPTIONS)
    monkeypatch.chdir(tmp_path)
    held.save_pretrained("runs/quickstart/export")
    Path("talk.json").write_text(blocks["json"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    commands = [shlex.split(line)[1:] for line in blocks["bash"].splitlines()]
    assert [main(words) for words in commands] == [0] * 3
    capsys.readouterr()
    exec(compile(blocks["python"], "docs/chat.md", "exec"), {})
    assert capsys.readouterr().out


# --- the session ----------------------------------------------------------------------------------


def test_a_session_is_one_conversation(folder, talk, tmp_path):
    saved = tmp_path / "talk.json"
    lines = ("c", "//d", f"/save {saved}", "/undo", "/again", "/reset", "c")
    code, out, err = talk(*lines, more=("--system", "s", "--max-new-tokens", "2"), name="blocks")
    assert (code, err) == (0, "")
    short = {"max_new_tokens": 2, "steps": 3}
    held = TextDiffusion.from_pretrained(folder / "blocks")
    messages = [{"role": "system", "content": "s"}]
    for content in ("c", "/d"):
        messages.append(user(content))
        answer = held.chat(messages, **short).completions[0].strip()
        messages.append({"role": "assistant", "content": answer})
    assert json.loads(saved.read_text()) == messages
    again = held.chat(messages[:2], seed=1, **short).completions[0].strip()
    assert out == (
        f"{messages[2]['content']}\n{messages[4]['content']}\n5 messages written to {saved}\n"
        f"2 messages are left\n{again}\na new conversation\n"
        + held.chat(messages[:2], seed=1, **short).completions[0].strip()
        + "\n"
    )


def test_the_oldest_turns_of_a_long_conversation_are_left_out(talk, tmp_path, monkeypatch):
    """A prompt has 18 of the 24 tokens of the context; system message and question stay."""
    asked = []
    plain = TextDiffusion.generate

    def generate(self, prompts="", **options):
        asked.append(self.tokenizer.decode([*prompts[0].tokens]))
        return plain(self, prompts, **options)

    monkeypatch.setattr(TextDiffusion, "generate", generate)
    code, out, _ = talk("ccc", "ddd", "eee", "fff", more=("--system", "s"))
    assert code == 0
    assert [text[-5:] for text in asked] == [f"{x * 3}|a"[-5:] for x in "cdef"]
    assert all(text.startswith("ss|u") for text in asked)
    assert max(map(len, asked)) <= 18
    assert out.count("does not see its oldest messages") == 1


def test_a_stopped_answer_is_kept_as_far_as_it_is_written(folder, monkeypatch):
    held = TextDiffusion.from_pretrained(folder / "blocks")
    sampling = Sampling(max_new_tokens=16, steps=2)
    whole = held.chat([user("c")], max_new_tokens=16, steps=2).completions[0]
    step, seen = TextPrinter.step, []

    def stop(self, taken):
        step(self, taken)
        seen.append(taken)
        if len(seen) == 5:  # the third block
            raise KeyboardInterrupt

    monkeypatch.setattr(TextPrinter, "step", stop)
    session = ChatSession(held, "m", sampling, make_console(), "")
    with pytest.raises(KeyboardInterrupt):
        session.answer("c")
    question, answer = session.turns
    assert question == Message("user", "c")
    assert 0 < len(answer.content) < len(whole)
    assert whole.strip().startswith(answer.content.rstrip("\ufffd"))
    seen.clear()
    monkeypatch.setattr(TextPrinter, "step", lambda *_: stop_now())
    with pytest.raises(KeyboardInterrupt):
        session.answer("d")  # nothing is written yet
    assert session.turns == [question, answer]


def test_wrong_lines_give_sentences_and_the_conversation_goes_on(talk):
    code, _, err = talk("/undo", "/again", "/save x.json", "/set suffix b", "/nope", "c" * 30)
    lines = err.splitlines()
    assert code == 1
    assert all(line.startswith("textdiff: error: ") for line in lines)
    said = ["no message yet"] * 3 + ["no suffix", "unknown command", "context of 24 tokens"]
    for line, words in zip(lines, said, strict=True):
        assert words in line


@pytest.mark.slow
def test_a_conversation_in_a_terminal_survives_ctrl_c(folder, tmp_path):
    saved = tmp_path / "s.json"
    words = ["chat", str(folder / "blocks"), "--max-new-tokens", "100000", "--steps", "4"]
    typed = [
        ("you> ", "the\n"),
        (r"call \d\d", "^C"),  # a fast model skips numbers: not every call is drawn
        ("stopped", f"/save {saved}\n"),
        ("2 messages written", "/quit\n"),
    ]
    shown = in_a_terminal(words, typed, TERM="xterm-256color")
    assert "Type a message, or /help." in shown
    assert "Traceback" not in shown
    question, answer = json.loads(saved.read_text())
    assert question == user("the")
    assert answer["content"]
