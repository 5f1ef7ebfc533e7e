"""`textdiff perplexity` and `textdiff compare` as a user meets them."""

import hashlib
import io
import json
import signal
import subprocess
import sys

import pytest
import torch
from children import child, finished, wait_until
from safetensors.torch import load_file, save_file
from small_tokenizers import model_of, wordpiece

from textdiff.cli import main
from textdiff.likelihood.estimators import ESTIMATORS
from textdiff.likelihood.protocols import PROTOCOLS
from textdiff.pipeline import TextDiffusion


def run(capsys, *words) -> dict:
    """The JSON that a verb prints."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys, *words) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert len(shown.strip().splitlines()) == 1, shown
    return code, shown


# --- the result ----------------------------------------------------------------------------------


def test_result_says_what_it_depends_on(exports, prose, capsys):
    words = ("perplexity", exports / "a", prose / "text.txt", "--seed", "3", "--samples", "2")
    found = run(capsys, *words)
    assert found["estimator"] == "masked_count"
    assert found["estimator_settings"] == {"samples": 2}
    assert (found["seed"], found["dtype"], found["replicates"]) == (3, "float32", 8)
    assert found["tokens"] == found["bytes"] == 147
    assert (found["protocol"], found["detokenizer"], found["stride"]) == ("none", "none", None)
    origin = found["provenance"]
    weights = (exports / "a" / "model.safetensors").read_bytes()
    tokenizer = (exports / "a" / "tokenizer.json").read_bytes()
    assert origin["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert origin["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert origin["weights"] == "unknown"
    assert {"textdiff", "commit", "source_sha256", "torch", "transformers", "python"} == set(
        origin["code"]
    )
    assert found["terms"]["diffusion"] == pytest.approx(found["mean"])


def test_patterns_and_standard_input(exports, prose, monkeypatch, capsys):
    words = ("perplexity", exports / "a")
    assert run(capsys, *words, prose / "te*.txt")["tokens"] == 147
    code, shown = error_of(capsys, *words, prose / "no*.txt")
    assert code == 1
    assert "no text file matches this pattern" in shown
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("text é".encode())))
    assert run(capsys, *words, "-")["bytes"] == 7


def test_output_for_people(exports, prose, capsys):
    assert main(["perplexity", str(exports / "a"), str(prose / "text.txt")]) == 0
    shown = capsys.readouterr().out
    for part in ("perplexity ≤", "95 % interval", "diffusion", "an upper bound", "--stride"):
        assert part in shown


@pytest.mark.parametrize("name", ["a", "d"])
def test_ends_are_a_term_of_their_own_and_no_token(exports, prose, name, tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    words = ("perplexity", exports / name, prose / "rows.jsonl")
    alone, ended = (
        run(capsys, *words, *more) for more in ((), ("--end-of-text", "--per-document", lines))
    )
    assert alone["tokens"] == ended["tokens"] == 5 * len(" words of row 0.")
    assert (alone["end_of_text"], ended["end_of_text"]) == (False, True)
    assert alone["after_the_end"] == {"a": "nothing", "d": "masked"}[name]
    assert ended["after_the_end"] == "masked"
    assert sum(ended["terms"].values()) == pytest.approx(ended["mean"])
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {row["after_the_end"] for row in rows} == {"masked"}
    for key, total in (
        ("end_of_text_nats", ended["terms"]["end_of_text"]),
        ("nats", ended["mean"]),
    ):
        assert sum(row[key] for row in rows) == pytest.approx(total * ended["tokens"])
    assert ended["terms"]["end_of_text"] * ended["tokens"] > 5 * 2.0


def test_enumeration_lies_within_the_interval_and_is_offered(exports, prose, capsys):
    words = ("perplexity", exports / "d", prose / "rows.jsonl", "--end-of-text")
    low, high = run(capsys, *words, "--replicates", "32")["interval_95"]
    exact = run(capsys, *words, "--estimator", "exact")
    assert low < exact["mean"] < high
    assert (exact["stderr"], exact["replicates"]) == (0.0, 1)
    assert main([str(word) for word in words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "blocks of 4: --estimator exact has no Monte-Carlo error, at 15 network row(s)" in shown
    assert "end of every document is scored" in shown


def test_two_models_are_compared_with_their_ends(exports, prose, capsys):
    words = ("compare", exports / "a", exports / "d", prose / "rows.jsonl")
    found = run(capsys, *words, "--end-of-text")
    means = [record["mean"] for record in found["models"]]
    assert all("end_of_text" in record["terms"] for record in found["models"])
    assert found["difference"]["mean"] == pytest.approx(means[0] - means[1])


def test_result_does_not_depend_on_how_it_was_asked_for(exports, prose, capsys):
    words = ("perplexity", exports / "a", prose / "text.txt")
    found = run(capsys, *words, "--batch-tokens", "48")
    bound = TextDiffusion.from_pretrained(exports / "a").estimate(
        [(prose / "text.txt").read_text()]
    )
    assert found["mean"] == pytest.approx(bound.bound().mean, rel=1e-6)


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"exact", "finite_t"}))
def test_every_estimator(exports, prose, name, capsys):
    words = ("perplexity", exports / "a", prose / "rows.jsonl", "--estimator", name)
    found = run(capsys, *words)
    assert found["estimator"] == name
    assert 3.0 < found["mean"] < 9.0


def test_finite_t_needs_steps(exports, prose, capsys):
    words = ("perplexity", exports / "a", prose / "rows.jsonl", "--estimator", "finite_t")
    assert "timesteps" in error_of(capsys, *words)[1]
    assert run(capsys, *words, "--timesteps", "4")["estimator_settings"]["timesteps"] == 4


def test_windows_that_overlap_score_every_token_once(exports, prose, capsys):
    words = ("perplexity", exports / "a", prose / "text.txt")
    apart, sharing = run(capsys, *words), run(capsys, *words, "--stride", "8")
    assert apart["tokens"] == sharing["tokens"]
    assert sharing["windows"] > apart["windows"]
    assert sharing["stride"] == 8


def test_documents_and_tokens_add_up(exports, prose, tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    words = ("perplexity", exports / "a", prose / "rows.jsonl", "--per-document", lines)
    found = run(capsys, *words, "--per-token", "--max-documents", "4")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["document"] for row in rows] == [1, 2, 3, 4]
    total = sum(row["nats"] for row in rows)
    assert total == pytest.approx(found["mean"] * found["tokens"])
    assert {row["replicates"] for row in rows} == {found["replicates"]} == {32}
    for row in rows:
        assert len(row["token_nats"]) == row["tokens"]
        assert sum(row["token_nats"]) == pytest.approx(row["nats"])
        assert "".join(row["token_text"]).startswith(" words")


def test_prompts_are_given_and_not_counted(exports, prose, capsys):
    words = ("perplexity", exports / "a", prose / "rows.jsonl")
    found = run(capsys, *words, "--prompt-column", "prompt")
    assert found["tokens"] == run(capsys, *words)["tokens"] == 5 * 16
    held = TextDiffusion.from_pretrained(exports / "a")
    rows = [json.loads(line) for line in (prose / "rows.jsonl").read_text().splitlines()]
    again = held.estimate([r["text"] for r in rows], prompts=[r["prompt"] for r in rows])
    assert found["mean"] == pytest.approx(again.bound().mean, rel=1e-6)


def test_spans_are_scored_given_the_rest(exports, prose, capsys):
    words = ("perplexity", exports / "a", prose / "rows.jsonl", "--spans-column", "spans")
    found = run(capsys, *words)
    assert found["tokens"] == 5 * 8
    assert found["is_bound"]


def test_detokenizer_is_applied_and_recorded(exports, tmp_path, capsys):
    path = tmp_path / "wiki.txt"
    path.write_text("half @-@ track , twice")
    found = run(capsys, "perplexity", exports / "a", path, "--detokenizer", "wikitext")
    assert found["tokens"] == len("half-track, twice")
    assert found["detokenizer"] == "wikitext"


# --- protocols -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_protocols_name_their_biases(exports, prose, name, capsys):
    words = ("perplexity", exports / "a", prose / "text.txt", "--protocol", name)
    found = run(capsys, *words)
    assert not found["is_bound"]
    assert found["estimator"] == "time"
    assert found["estimator_settings"] == {"eps": 1e-3, "complete": False}
    assert len(found["biases"]) >= 4
    assert main([str(word) for word in words]) == 0
    shown = capsys.readouterr().out
    assert all(bias in shown for bias in found["biases"])
    assert "perplexity ≈" in shown


def test_chunks_of_a_protocol_with_an_unbiased_estimator(exports, prose, capsys):
    words = ("perplexity", exports / "a", prose / "text.txt", "--estimator", "masked_count")
    assert run(capsys, *words, "--protocol", "bd3lm")["is_bound"]
    framed = run(capsys, *words, "--protocol", "mdlm")
    assert not framed["is_bound"]
    assert "special tokens" in framed["note"]
    assert not any("times are drawn" in bias for bias in framed["biases"])


# --- two models ----------------------------------------------------------------------------------


def test_compare_in_nats_per_token(exports, prose, capsys):
    words = ("compare", exports / "a", exports / "b", prose / "rows.jsonl")
    found = run(capsys, *words)
    one, two = found["models"]
    assert found["difference"]["mean"] == pytest.approx(one["mean"] - two["mean"])
    assert found["difference"]["unit"] == "nats/token"
    assert main([str(word) for word in words]) == 0
    assert "has a lower bound" in capsys.readouterr().out


def test_compare_across_tokenizers_is_per_byte(exports, prose, capsys):
    found = run(capsys, "compare", exports / "a", exports / "c", prose / "text.txt")
    one, two = found["models"]
    assert found["difference"]["unit"] == "bits/byte"
    difference = one["bits_per_byte"] - two["bits_per_byte"]
    assert found["difference"]["mean"] == pytest.approx(difference)


def test_a_model_is_as_good_as_itself(exports, prose, capsys):
    assert main(["compare", *[str(exports / "a")] * 2, str(prose / "text.txt")]) == 0
    assert "the same" in capsys.readouterr().out


# --- interruption --------------------------------------------------------------------------------


def test_state_continues_and_refuses_another_job(exports, prose, tmp_path, capsys):
    state = tmp_path / "state"
    words = ("perplexity", exports / "a", prose / "text.txt")
    run(capsys, *words, "--state", state)
    more = run(capsys, *words, "--state", state, "--replicates", "12")
    assert more["mean"] == pytest.approx(run(capsys, *words, "--replicates", "12")["mean"])
    code, shown = error_of(capsys, *words, "--state", state, "--seed", "1")
    assert code == 1
    assert "another seed" in shown


def test_ctrl_c_says_how_to_go_on(exports, prose, tmp_path):
    state = tmp_path / "state"
    words = [sys.executable, "-m", "textdiff", "perplexity", str(exports / "a")]
    words += [str(prose / "text.txt"), "--replicates", "1000000000", "--state", str(state)]
    with child(words, stdout=subprocess.DEVNULL) as process:
        wait_until(process, state.exists)
        process.send_signal(signal.SIGINT)
        shown = process.stderr.read()
        assert process.wait() == 130, shown
    assert f"kept in {state}" in shown
    assert len(shown.splitlines()) == 3  # neither a warning of an import nor a traceback
    assert len(load_file(state)["shares"]) >= 1


@pytest.mark.slow
def test_two_processes_find_the_number_of_one(exports, prose, capsys):
    words = ("perplexity", exports / "a", prose / "rows.jsonl")
    one = run(capsys, *words)
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launcher += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    done = finished([sys.executable, *launcher, "-m", "textdiff", *words, "--json"])
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # one process prints
    assert two["mean"] == pytest.approx(one["mean"], rel=1e-6)
    assert two["stderr"] == pytest.approx(one["stderr"], rel=1e-4)
    assert two["provenance"]["processes"] == 2


# --- precision -----------------------------------------------------------------------------------


def test_bfloat16_agrees_with_float32(exports, prose, capsys):
    words = ("perplexity", exports / "a", prose / "text.txt", "--replicates", "32")
    wide, narrow = run(capsys, *words), run(capsys, *words, "--dtype", "bfloat16")
    assert narrow["dtype"] == "bfloat16"
    assert narrow["mean"] == pytest.approx(wide["mean"], rel=5e-4)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--estimator", "mask_count"], 2, "did you mean 'masked_count'"),
        (["--estimator", "exact"], 2, "2 ** 24 sets"),
        (["--eps", "0.1"], 2, "no option 'eps'"),
        (["--protocol", "mdln"], 2, "did you mean 'mdlm'"),
        (["--protocol", "sedd", "--stride", "4"], 2, "fixes its chunks"),
        (["--detokenizer", "wikitxt"], 2, "did you mean 'wikitext'"),
        (["--protocol", "sedd", "--end-of-text"], 2, "fixes its chunks"),
        (["--stride", "25"], 2, "1 to 24"),
        (["--per-token"], 2, "--per-document"),
        (["--per-document", "nowhere/lines.jsonl"], 2, "a folder that exists"),
        (["--prompt-column", "prompt"], 1, "from .jsonl files only"),
        (["--max-documents", "0"], 2, "at least 1"),
        (["--samples", "0"], 2, "greater than or equal to 1"),
        (["--state", "."], 2, "is a folder"),
    ],
)
def test_wrong_usage(exports, prose, words, code, said, capsys):
    found, shown = error_of(capsys, "perplexity", exports / "a", prose / "text.txt", *words)
    assert found == code
    assert said in shown


@pytest.mark.parametrize(
    ("row", "words", "said"),
    [
        ('{"text": "fine"', [], "line 2"),
        ('{"text": "fine"}', ["--prompt-column", "prompt"], "no key 'prompt'"),
        ('{"text": "fine", "prompt": 3}', ["--prompt-column", "prompt"], "'prompt' holds int"),
        ('{"text": "fine", "prompt": [[2, 9]]}', ["--spans-column", "prompt"], "must be in order"),
        ('{"text": "fine", "prompt": [2]}', ["--spans-column", "prompt"], "[start, end]"),
        ('{"text": "fine", "prompt": []}', ["--spans-column", "prompt"], "no token to score"),
    ],
)
def test_bad_rows(exports, tmp_path, row, words, said, capsys):
    path = tmp_path / "bad.jsonl"
    spans = "--spans-column" in words
    path.write_text(json.dumps({"text": "good", "prompt": [] if spans else "p"}) + f"\n{row}\n")
    code, shown = error_of(capsys, "perplexity", exports / "a", path, *words)
    assert code == 1
    assert said in shown


def test_prompt_that_later_windows_would_not_see(exports, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "p" * 20, "text": "t" * 20}) + "\n")
    words = ("perplexity", exports / "a", path, "--prompt-column", "prompt")
    code, shown = error_of(capsys, *words)
    assert code == 1
    assert "give a stride" in shown
    assert run(capsys, *words, "--stride", "4")["tokens"] == 20


def test_characters_that_the_tokenizer_lacks(exports, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("a Text")
    code, shown = error_of(capsys, "perplexity", exports / "c", path)
    assert code == 1
    assert "not trained on" in " ".join(shown.split())


def test_texts_that_the_tokens_do_not_give_back(exports, tmp_path, capsys):
    model_of(wordpiece()).save_pretrained(tmp_path / "words")
    rows = ["the cat sat", "The cat", "a" * 4_000]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    lines = tmp_path / "lines.jsonl"
    found = run(capsys, "perplexity", tmp_path / "words", path, "--per-document", lines)
    assert (found["is_bound"], found["bits_per_byte"]) == (False, None)
    assert found["lossy_documents"] == [2, 3]
    read = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["is_bound"] for line in read] == [True, False, False]
    assert (read[0]["bits_per_byte"] > 0, read[1]["bits_per_byte"]) == (True, None)
    found = run(capsys, "compare", exports / "a", tmp_path / "words", path)["difference"]
    assert (found["documents"], found["left_out"]) == (1, 2)
    path.write_text(json.dumps({"text": rows[2]}) + "\n")
    code, shown = error_of(capsys, "perplexity", tmp_path / "words", path)
    assert code == 1
    assert "unknown" in shown


def test_protocol_needs_a_whole_chunk(exports, tmp_path, capsys):
    path = tmp_path / "short.txt"
    path.write_text("Short.")
    code, shown = error_of(capsys, "perplexity", exports / "a", path, "--protocol", "mdlm")
    assert code == 1
    assert "whole chunks of 24 tokens" in shown


def test_damaged_weights(exports, prose, tmp_path, capsys):
    broken = tmp_path / "broken"
    held = TextDiffusion.from_pretrained(exports / "a")
    held.save_pretrained(broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name, value in tensors.items() if value.ndim == 2)
    tensors[name][:] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, shown = error_of(capsys, "perplexity", broken, prose / "text.txt")
    assert code == 1
    assert "weights are damaged" in shown
