"""The model class of lm-evaluation-harness, and exams from the command line."""

import gzip
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from children import finished
from refusals import refused
from small_tokenizers import bpe, model_of

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

import textdiff
from textdiff.cli import main
from textdiff.commands.exam import ExamOptions
from textdiff.errors import ConfigError, DataError
from textdiff.evaluate.exam import running
from textdiff.evaluate.exam.lm_eval_model import TextDiffusionLM, generation_options
from textdiff.evaluate.exam.running import LOCAL_TASKS, Exam
from textdiff.evaluate.exam.writing import AnswerWriter
from textdiff.pipeline import TextDiffusion

PAIRS = [
    ("Once upon a time, there was a", " little girl"),
    ("", "Once upon a time"),
    ("Lily went to the park. ", "She was happy."),
    ("One day", " "),
    ("She was very", " happy and sad and glad in the big park with her mom, her dad, their dog."),
    ("Lily and Tom", " always remem"),
]


def scored(*pairs):
    return [Instance("loglikelihood", {}, pair, 0, ("task", n, 1)) for n, pair in enumerate(pairs)]


def rolling(*texts):
    return [
        Instance("loglikelihood_rolling", {}, (text,), 0, ("task", n, 1))
        for n, text in enumerate(texts)
    ]


def written(context, doc_id=0, **options):
    return Instance("generate_until", {}, (context, options), 0, ("task", doc_id, 1))


@pytest.fixture(scope="module")
def lm():
    return TextDiffusionLM(model_of(bpe(), block_size=4))


@pytest.fixture(scope="module")
def demo():
    return TextDiffusionLM(str(Path(textdiff.__file__).parent / "demo"))


def test_autoregressive_models_agree_with_the_harness(data_folder):
    """The harness's own class reads the same folder through transformers."""
    from lm_eval.models.huggingface import HFLM

    folder = str(data_folder / "stories260K")
    ours, theirs = TextDiffusionLM(folder), HFLM(folder, device="cpu", dtype="float32")
    with zipfile.ZipFile(data_folder / "blimp" / "BLiMP.zip") as archive:
        rows = archive.read("data/causative.jsonl").decode().splitlines()[:20]
    sentences = [json.loads(row)[f"sentence_{side}"] for row in rows for side in ("good", "bad")]
    requests = [*PAIRS, *(("", sentence) for sentence in sentences)]
    a, b = (lm.loglikelihood(scored(*requests), disable_tqdm=True) for lm in (ours, theirs))
    assert [x[0] for x in a] == pytest.approx([x[0] for x in b], abs=1e-4)
    assert [x[1] for x in a] == [x[1] for x in b]
    assert {x[1] for x in a} == {True, False}
    assert all(x.exact for x in a)
    choices = [np.array([x[0] for x in y[len(PAIRS) :]]).reshape(-1, 2) for y in (a, b)]
    right = [(pair[:, 0] > pair[:, 1]).mean() for pair in choices]
    assert right[0] == right[1]
    assert 0.0 < right[0] < 1.0
    texts = rolling("Once upon a time, there was a girl named Lily.", " She", "A dog.\n")
    a, b = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (ours, theirs))
    assert a == pytest.approx(b, abs=1e-4)


def test_pairs_are_cut_as_the_harness_cuts_them(lm):
    pairs = [("a cat ", "sat"), ("a cat", " sat"), ("", "a cat"), (" \n", "cat")]
    tokens = lm.encoder.answers([lm_request(pair) for pair in pairs])
    for (context, text), answer in zip(pairs, tokens, strict=True):
        before, after = lm._encode_pair(context, text) if context else ([], lm.tok_encode(text))
        assert answer.ids.tolist() == [*before, *after]
        assert answer.start == len(before)
    assert tokens[0].key[1:] == tokens[1].key[1:]
    assert tokens[3].start == 0


def lm_request(pair):
    from textdiff.evaluate.exam.answer_tokens import AnswerRequest

    return AnswerRequest("t", 0, *pair)


def test_greedy_answers_are_those_that_generation_writes(demo):
    context = "Once upon a time"
    (text,) = demo.generate_until([written(context, max_gen_toks=6, until=[])], disable_tqdm=True)
    pairs = [(context, text), (context, text[:-1] + "x"), (context, "x" + text)]
    answers = demo.loglikelihood(scored(*pairs), disable_tqdm=True)
    assert [answer[1] for answer in answers] == [True, False, False]


def test_whole_texts_are_the_bounds_of_perplexity(lm):
    text = "a cat sat on a rat " * 5  # four windows
    (ours,) = lm.loglikelihood_rolling(rolling(text), disable_tqdm=True)
    bound = lm.held.estimate([text], estimator="exact").bound()
    assert -ours == pytest.approx(bound.mean * bound.tokens, rel=1e-6)
    assert ours.exact


def test_stop_strings_and_lengths_are_kept(demo):
    long, stopped = (written("Once upon", max_gen_toks=9, until=until) for until in ([], ["wa"]))
    whole, text = demo.generate_until([long, stopped], disable_tqdm=True)
    both, before = (len(demo.tok_encode(text)) for text in ("Once upon" + whole, "Once upon"))
    assert 1 < both - before <= 9
    assert text == whole[: whole.index("wa")]
    crowded = written("a cat sat " * 90, max_gen_toks=200, until=[])
    (text,) = demo.generate_until([crowded], disable_tqdm=True)
    assert (text.truncated, text.shortened) == (True, True)
    assert (whole.truncated, whole.shortened) == (False, False)


def test_network_calls_of_written_answers_are_counted():
    """One per token, however the answers are batched: rows of other lengths do not count."""
    lm = TextDiffusionLM(model_of(bpe()), batch_size=2, rule="first_hitting")
    lengths = (3, 5, 5, 2)
    requests = [written("a cat", n, max_gen_toks=k, until=[]) for n, k in enumerate(lengths)]
    answers = lm.generate_until(requests, disable_tqdm=True)
    assert sum(answer.calls for answer in answers) == sum(lengths)


def test_long_contexts_are_counted(demo):
    pairs = [("Lily sat. " * 90, "She"), ("Lily sat. ", "She")]
    answers = demo.loglikelihood(scored(*pairs), disable_tqdm=True)
    assert [answer.truncated for answer in answers] == [True, False]
    assert all(answer[0] < 0.0 for answer in answers)


def test_repeats_of_a_sampled_request_differ_and_return(lm):
    request = written("a cat", max_gen_toks=9, until=[], do_sample=True, temperature=1.0)
    first = lm.generate_until([request, request], disable_tqdm=True)
    assert first[0] != first[1]
    assert lm.generate_until([request, request], disable_tqdm=True) == first


def test_generation_options_of_tasks():
    assert generation_options({"until": "a", "max_gen_toks": 7})[0] == 7
    options = {"until": ["a", ""], "temperature": 0.7, "num_beams": 2}
    assert generation_options(options | {"do_sample": False}) == (
        256,
        {"temperature": 0.0, "stop": ("a",)},
    )
    sampled = generation_options(options | {"do_sample": True, "top_p": 0.9})[1]
    assert sampled == {"temperature": 0.7, "top_p": 0.9, "stop": ("a",)}


def test_the_command_lines_options_come_before_a_tasks():
    lm = TextDiffusionLM(model_of(bpe()), rule="entropy_bound", temperature=0.5)
    config = lm.writer.config({"temperature": 0.0, "stop": ("a",)})
    assert (config.rule, config.temperature, config.stop) == ("entropy_bound", 0.5, ("a",))
    with refused(ConfigError, "unknown_option"):
        TextDiffusionLM(model_of(bpe()), beams=3)
    with refused(ConfigError, "unsuitable_rule"):
        TextDiffusionLM(model_of(bpe()), rule="predictor_corrector")


def test_cached_answers_keep_their_error(lm, tmp_path):
    pytest.importorskip("sqlitedict")
    cached = CachingLM(lm, str(tmp_path / "answers.db"))
    requests = scored(("a", " cat"))
    (first,) = cached.loglikelihood(requests)
    (again,) = cached.loglikelihood(requests)
    assert again == first
    assert again.exact
    assert np.array_equal(again.draws, first.draws)


def test_a_second_start_answers_from_the_cache(tmp_path, monkeypatch):
    model, path = model_of(bpe()), tmp_path / "answers"
    asked = scored(("a", " rubbish"), ("a", " cabbages"), ("b", " rubbish"))
    sampled = written("a cat", max_gen_toks=9, until=[], do_sample=True, temperature=1.0)

    def answered(lm):
        texts = lm.generate_until([sampled, sampled], disable_tqdm=True)
        whole = lm.loglikelihood_rolling(rolling("a cat sat " * 5), disable_tqdm=True)
        return lm.loglikelihood(asked, disable_tqdm=True), whole, texts

    first = answered(TextDiffusionLM(model, cache=path))
    assert first[2][0] != first[2][1]
    for name in ("score_answers", "greedy_matches"):
        monkeypatch.setattr(f"textdiff.evaluate.exam.lm_eval_model.{name}", None)
    monkeypatch.setattr(AnswerWriter, "write", None)
    lm = TextDiffusionLM(model, cache=path)
    again = answered(lm)
    assert again == first
    assert lm.shared.reused == 6
    assert [a.stderr for a in again[0]] == [a.stderr for a in first[0]]
    assert min(a.stderr for a in again[0]) > 0.0
    assert [a.exact for a in again[1]] == [a.exact for a in first[1]]


def test_questions_with_equal_answers_keep_their_noise_in_the_cache(tmp_path):
    """The harness's own cache has one answer to both."""
    one, two = (
        Instance("loglikelihood", {}, ("a", " rubbish"), 0, ("task", doc, 1)) for doc in (0, 1)
    )
    for _ in range(2):
        lm = TextDiffusionLM(model_of(bpe()), cache=tmp_path / "answers")
        a, b = lm.loglikelihood([one, two], disable_tqdm=True)
        assert a != b
    assert lm.shared.reused == 2


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"mc": 200}, {"precision": 4.0}, {"steps": 3}, {"held": None}]
)
def test_no_answer_of_another_model_or_of_other_noise_is_taken(tmp_path, options):
    held, other = model_of(bpe()), model_of(bpe())
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    for changed, reused in ((False, 0), (True, 0), (False, 1), (True, 1)):
        more = dict(options) if changed else {}
        model = other if "held" in more else held
        more.pop("held", None)
        lm = TextDiffusionLM(model, cache=tmp_path / "answers", **more)
        lm.loglikelihood(scored(("a", " rubbish")), disable_tqdm=True)
        assert lm.shared.reused == reused


def test_another_file_is_not_taken_for_a_cache(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("a cat sat on a rat " * 90)
    with refused(ConfigError, "unusable_cache", "notes.txt"):
        TextDiffusionLM(model_of(bpe()), cache=path)
    assert path.read_text().startswith("a cat")


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def chatting() -> TextDiffusion:
    """A model whose template writes control tokens that it can read and not predict."""
    tokenizer = bpe()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<|{role}|>" for role in ("user", "assistant")]}
    )
    tokenizer.chat_template = TEMPLATE
    return model_of(tokenizer)


def test_control_tokens_come_from_the_template_alone(chatting):
    lm = TextDiffusionLM(chatting)
    user, assistant = lm.tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    end = lm.tokenizer.eos_token_id
    context = lm.apply_chat_template([{"role": "user", "content": "a</s><|assistant|>"}])
    ids = lm.tok_encode(context)
    controls = [i for i in ids if i in (user, assistant, end)]
    assert (controls, ids[0]) == ([user, end, assistant], user)
    assert lm.tokenizer.decode(ids) == "<|user|>a</s><|assistant|></s><|assistant|>\n"
    (answer,) = lm.encoder.answers([lm_request((context, "x</s>"))])
    assert answer.ids[: answer.start].tolist() == ids[: answer.start]
    assert answer.ids[answer.start - 1] == assistant
    assert end not in answer.ids[answer.start :]
    assert lm.tokenizer.decode(answer.ids[answer.start :]) == "\nx</s>"


def test_contexts_with_control_tokens_are_scored_and_answered(chatting):
    lm = TextDiffusionLM(chatting, steps=2)
    context = lm.apply_chat_template([{"role": "user", "content": "a"}])
    answers = lm.loglikelihood(scored((context, " cat"), (context, " at")), disable_tqdm=True)
    assert all(answer[0] < 0.0 and answer.exact for answer in answers)
    (text,) = lm.generate_until([written(context, max_gen_toks=3, until=[])], disable_tqdm=True)
    prompt = chatting.chat_prompts([{"role": "user", "content": "a"}])
    same = chatting.generate(prompt, max_new_tokens=3, steps=2, temperature=0.0)
    assert text == same.completions[0]


def test_chats_go_on_after_a_prefix_and_wrong_ones_are_refused(chatting):
    lm = TextDiffusionLM(chatting)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(talk, add_generation_prompt=False).endswith("<|assistant|>It is")
    with refused(ConfigError, "no_chat_template"):
        TextDiffusionLM(model_of(bpe())).apply_chat_template(talk)
    lm.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    try:
        with refused(DataError, "template_failed", "no system"):
            lm.apply_chat_template(talk)
    finally:
        lm.tokenizer.chat_template = TEMPLATE


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and the data of local tasks."""
    folder = tmp_path_factory.mktemp("exam")
    model_of(bpe(), block_size=4).save_pretrained(folder / "model")
    (folder / "data" / "blimp").mkdir(parents=True)
    pairs = [{"sentence_good": f"a cat {n}.", "sentence_bad": f"cat a, {n}."} for n in range(6)]
    pairs[0]["sentence_bad"] = pairs[0]["sentence_good"]
    with zipfile.ZipFile(folder / "data" / "blimp" / "BLiMP.zip", "w") as archive:
        archive.writestr("data/causative.jsonl", "\n".join(map(json.dumps, pairs)))
    (folder / "data" / "lambada").mkdir()
    passages = [json.dumps({"text": f"a cat sat on a rat {n}, a cat"}) for n in range(3)]
    with gzip.open(folder / "data" / "lambada" / "lambada_test.jsonl.gz", "wt") as file:
        file.write("\n".join(passages))
    (folder / "qa.jsonl").write_text('{"question": "a", "answer": "7"}\n')
    return folder


@pytest.fixture
def few(tmp_path, monkeypatch):
    """The harness with a single task of its own, on the hub: to read all of them takes seconds."""
    (tmp_path / "task.yaml").write_text(
        "task: hub_task\ndataset_path: nobody/no-such-data\noutput_type: loglikelihood\n"
        'test_split: test\ndoc_to_text: ""\ndoc_to_target: ""\n'
    )
    monkeypatch.setattr(running, "harness_tasks", lambda: tmp_path)


@pytest.fixture
def local(place, few, monkeypatch):
    monkeypatch.setenv("TEXTDIFF_DATA", str(place / "data"))
    monkeypatch.chdir(place)
    return place


def test_an_exam_from_the_command_line(local, capsys):
    words = ["evaluate", "model", "--tasks", "blimp_causative,lambada,qa", "--qa", "qa.jsonl"]
    assert main([*words, "--steps", "4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["n-samples"]["blimp_causative"]["effective"] == 6
    certainty = record["certainty"]["blimp_causative"]
    assert certainty["questions"] == 6
    assert certainty["undecided"] == 1  # the pair of equal sentences
    assert certainty["acc"] == record["results"]["blimp_causative"]["acc,none"]
    counts = record["answers"]
    assert (counts["scored"], counts["exact"], counts["written"]) == (15, 15, 1)
    assert counts["truncated"] == 0
    assert record["sampling"] == {"steps": 4}
    assert record["provenance"]["model_sha256"]
    assert main(["evaluate", "model", "--tasks", "blimp_causative", "--limit", "3"]) == 0
    shown = capsys.readouterr().out
    assert "of 3 questions undecided" in shown
    assert "6 of 6 log-likelihoods exact" in shown


def test_a_cache_is_used_and_only_the_result_is_printed(local, tmp_path, capfd):
    """Bars are hidden in pipes, and git is quiet outside a checkout."""
    words = ["evaluate", "model", "--tasks", "blimp_causative,lambada", "--limit", "2", "--json"]
    words += ["--use-cache", str(tmp_path / "answers")]
    records = []
    for _ in range(2):
        assert main(words) == 0
        shown = capfd.readouterr()
        records.append(json.loads(shown.out))
        assert "fatal" not in shown.err
        assert "scoring" not in shown.err
    first, again = records
    assert (first["answers"].pop("reused"), again["answers"].pop("reused")) == (0, 6)
    assert again == first


def numbers(results) -> dict[tuple[str, str], float]:
    return {
        (task, name): value
        for task, figures in results.items()
        for name, value in figures.items()
        if isinstance(value, float)
    }


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_answer_as_one(local, tmp_path):
    """Also where there are fewer questions than processes, and with a cache of the other count."""
    root = Path(__file__).resolve().parents[2]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(root / "configs" / "accelerate" / "cpu.yaml"), "-m", "textdiff"]
    words = ["evaluate", "model", "--tasks", "blimp_causative,lambada,qa", "--qa", "qa.jsonl"]
    cache = ["--use-cache", str(tmp_path / "answers")]
    alone = [sys.executable, "-m", "textdiff", *words]
    records = []
    shared = [*launch, *words, *cache]
    for command in (alone, shared, [*alone, *cache], shared):
        done = finished([*command, "--limit", "3", "--json"])
        assert done.returncode == 0, done.stderr
        assert "it/s" not in done.stderr
        records.append(json.loads(done.stdout))
    one, two, kept, both = records
    for other, reused in ((two, 0), (kept, 10), (both, 10)):
        assert other["answers"].pop("reused") == reused
        assert other["answers"].pop("largest_stderr") == 0.0
        assert numbers(other["results"]) == pytest.approx(numbers(one["results"]), rel=1e-6)
        assert other["certainty"] == one["certainty"]
    done = finished([*launch, *words, "--limit", "1"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|Version|") == 1


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        (["--tasks", "blimpp"], ConfigError, "unknown_task"),
        (["--tasks", ","], ConfigError, "no_tasks"),
        (["--tasks", "qa"], ConfigError, "no_qa_file"),
        (["--tasks", "qa", "--qa", "none.jsonl"], DataError, "no_such_file"),
        (["--tasks", "gsm8k"], DataError, "task_data_missing"),
        (["--tasks", "lambada", "--mc", "8"], ConfigError, "too_few_draws"),
        (["--tasks", "lambada", "--limit", "1.5"], ConfigError, "limit_out_of_range"),
        (["--tasks", "lambada", "--fewshot", "-1"], ConfigError, "negative_fewshot"),
        (["--tasks", "lambada", "--rule", "predictor_corrector"], ConfigError, "unsuitable_rule"),
    ],
)
def test_bad_exams_are_refused_in_a_sentence(local, words, kind, code, capsys):
    with refused(kind, code):
        main(["--debug", "evaluate", "model", *words])
    assert main(["evaluate", "model", *words]) == kind.exit_code
    assert capsys.readouterr().err.startswith("textdiff: error: ")


def test_local_tasks_need_their_folder(place, few, monkeypatch):
    monkeypatch.delenv("TEXTDIFF_DATA", raising=False)
    monkeypatch.chdir(place)
    with refused(ConfigError, "no_data_folder", "TEXTDIFF_DATA"):
        main(["--debug", "evaluate", "model", "--tasks", "sudoku"])


def test_tasks_of_the_hub_are_refused_without_a_network(few):
    with refused(DataError, "task_not_loaded", "hub_task"):
        Exam(["hub_task"]).run(model_of(bpe()))


def test_a_missing_harness_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with refused(ConfigError, "lm_eval_missing", "textdiff[eval]"):
        ExamOptions(tasks="blimp").exam({}, 0, 16, 8192)


def test_every_paradigm_has_a_task():
    names = [path.stem for path in (LOCAL_TASKS / "blimp").glob("*.yaml")]
    assert len(names) == 68  # 67 and the group
