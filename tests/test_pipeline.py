"""`TextDiffusion` as Python users hold it."""

import re
from dataclasses import replace

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from transformers import AutoTokenizer, TextDiffusionStreamer

from textdiff.config import Config
from textdiff.data.sections import ByteTokenizer
from textdiff.data.tokenizer import train_tokenizer
from textdiff.errors import CheckpointError, ConfigError, DataError
from textdiff.export.loading import family_of
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.callbacks import Callback
from textdiff.sampling.constraints.pattern import build_pattern
from textdiff.sampling.request import Request
from textdiff.sampling.settings import SamplingConfig
from textdiff.train.setup import model_config, sample_defaults


def build(block_size: int | None = None, **model_options) -> TextDiffusion:
    from textdiff.models import TextDiffusionModel

    torch.manual_seed(0)
    config = Config.model_validate(
        {
            "data": {"sequence_length": 24},
            "tokenizer": {"kind": "byte"},
            "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, **model_options},
            "diffusion": {"block_size": block_size},
            "sample": {"steps": 6, "max_new_tokens": 20},
        }
    )
    tokenizer = train_tokenizer(ByteTokenizer(), [])
    model = TextDiffusionModel(model_config(config, tokenizer)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return TextDiffusion(
        model, tokenizer, family_of(model.config, torch.device("cpu")), sample_defaults(config)
    )


@pytest.fixture(scope="module", params=[None, 4], ids=["full", "blocks"])
def held(request) -> TextDiffusion:
    return build(request.param)


@pytest.fixture(scope="module")
def full() -> TextDiffusion:
    return build()


@pytest.fixture(scope="module")
def blocks() -> TextDiffusion:
    return build(4)


class Puts:
    """A streamer that remembers what it was given."""

    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


class Recorder(Puts):
    """One that takes drafts, too."""

    def __init__(self):
        super().__init__()
        self.drafts = []

    def put_draft(self, value):
        self.drafts.append(value.tolist())


def test_streamer_gets_drafts_then_the_text_once(full):
    streamer = Recorder()
    done = full.generate("ab", streamer=streamer, max_new_tokens=10)
    assert streamer.puts == [list(b"ab"), done.sequences[0][2:]]
    assert len(streamer.drafts) == done.calls
    assert streamer.drafts[-1] == done.sequences[0][2:]
    assert streamer.ended
    assert not any(full.model.config.mask_token_id in draft for draft in streamer.drafts)


def test_transformers_streamer_leaves_the_text_on_the_screen(held, capsys):
    """The class of transformers takes drafts back from where the cursor was saved."""
    held.generate(
        "ab",
        streamer=TextDiffusionStreamer(held.tokenizer, errors="replace"),
        max_new_tokens=10,
        temperature=0.0,
    )
    printed = capsys.readouterr().out
    done = held.generate("ab", max_new_tokens=10, temperature=0.0)
    left, drafts = re.subn(r"\x1b7.*?\x1b8\x1b\[J", "", printed, flags=re.DOTALL)
    assert left == held.tokenizer.decode(done.sequences[0]) + "\n"
    assert drafts >= done.calls
    assert "<|mask|>" not in printed


def test_a_streamer_without_drafts_gets_the_text(held):
    streamer = Puts()
    done = held.generate("ab", streamer=streamer, max_new_tokens=10)
    assert [token for put in streamer.puts for token in put] == done.sequences[0]
    assert streamer.ended


class Notes(Callback):
    """Writes down what it is told."""

    parts = ("draft", "confidence", "entropy")

    def __init__(self):
        self.jobs, self.steps, self.rows = [], [], {}

    def begin(self, job):
        self.jobs.append(job)

    def step(self, step):
        self.steps.append(step)

    def finished(self, row, result):
        self.rows[result.index] = (len(self.steps), result)


def test_watching_changes_no_token_and_says_when_rows_are_done(held):
    prompts, options = ["a", "a longer one", "", "xy"], {"max_new_tokens": 11, "seed": 4}
    notes = Notes()
    plain = held.generate(prompts, num_samples=9, batch_size=2, **options)
    watched = held.generate(prompts, num_samples=9, batch_size=2, callbacks=[notes], **options)
    assert watched == plain
    assert [len(job.prompts) for job in notes.jobs] == [32, 4]
    assert [notes.rows[i][1].text for i in range(36)] == plain.texts
    assert [notes.rows[i][1].tokens for i in range(36)] == plain.sequences
    assert (
        len({when for when, _ in notes.rows.values()}) >= 18
    )  # two rows at a time, not at the end
    for step in notes.steps:
        assert step.draft.shape == step.canvas.shape
        assert len(step.confidence) == len(step.entropy) == len(step.changed)
        assert (step.final <= step.ends).all()
        row, position = step.changed // step.canvas.shape[1], step.changed % step.canvas.shape[1]
        assert (step.final[row] <= position).all()
        assert (position < step.ends[row]).all()
        assert not step.done[row].any()


def test_orders_joined_are_those_apart(held):
    """Rows of any seed and number share batches, and become what they become alone."""
    one = held.prepare("a", num_samples=2, seed=7, max_new_tokens=9)
    two = held.prepare("xyz", num_samples=1, seed=-3, first_row=5, max_new_tokens=4)
    joined = held.run(Request.joined([one, two, one]))
    apart = [held.run(order, batch_size=1).sequences for order in (one, two, one)]
    assert joined.sequences == [row for rows in apart for row in rows]
    assert apart[0] == held.generate("a", num_samples=2, seed=7, max_new_tokens=9).sequences
    six = held.generate("xyz", num_samples=6, seed=-3, max_new_tokens=4)
    assert apart[1] == six.sequences[5:]


def test_streamer_refuses_a_batch(held):
    with pytest.raises(ConfigError) as error:
        held.generate("ab", num_samples=2, streamer=Recorder())
    assert error.value.code == "several_rows"


def test_stream_ends_where_generate_does(held):
    steps = list(held.stream("ab", num_samples=3, seed=5))
    done = held.generate("ab", num_samples=3, seed=5)
    assert steps[-1].canvas.tolist() == done.sequences
    assert [step.calls for step in steps] == list(range(1, done.calls + 1))
    assert sum(len(step.changed) for step in steps) == 3 * 20


def test_steps_do_not_alias(held):
    steps = list(held.stream("", max_new_tokens=12))
    mask = held.model.config.mask_token_id
    left = [(step.canvas == mask).sum().item() for step in steps]
    assert left[0] > left[-1] == 0


def test_samples_do_not_depend_on_the_batch(held):
    prompts = ["a", "", "a longer one", "xyz"]
    together = held.generate(prompts, max_new_tokens=9, seed=3)
    apart = held.generate(prompts, max_new_tokens=9, seed=3, batch_size=1)
    assert together.sequences == apart.sequences


def test_default_length_shrinks_to_the_context_and_an_explicit_one_does_not(full):
    prompt = "x" * 20
    assert len(full.generate(prompt).sequences[0]) == 24
    assert len(full.generate(prompt, max_new_tokens=50).sequences[0]) == 70
    with pytest.raises(ConfigError) as error:
        full.generate("x" * 24)
    assert error.value.code == "no_room"
    assert len(full.generate("x" * 30, stride=8, max_new_tokens=9).sequences[0]) == 39


def test_a_full_sequence_model_keeps_what_is_finished_when_asked_to(full):
    options = {"max_new_tokens": 40, "num_samples": 16, "stride": 8}
    kept = full.generate("a prompt", cache="approximate", **options)
    assert kept != full.generate("a prompt", **options)
    one = full.generate("a prompt", cache="approximate", **options | {"num_samples": 1})
    assert one.sequences == kept.sequences[:1]


def test_blocks_write_beyond_the_context_and_see_long_prompts(blocks):
    done = blocks.generate(["x" * 30, "ab"], max_new_tokens=41, window=0)
    end = blocks.tokenizer.eos_token_id
    for ids, start in zip(done.sequences, (30, 2), strict=True):
        assert len(ids) == start + 41 or end in ids[-4:]
    plain = blocks.generate(["x" * 30, "ab"], max_new_tokens=41, window=0, cache=False)
    assert plain.sequences == done.sequences


def test_blocks_see_as_far_as_in_training_unless_told_otherwise(blocks):
    """20 tokens and their own 4 are the context of 24; within it nothing changes."""
    far = {"max_new_tokens": 30, "seed": 6, "temperature": 3.0}
    default = blocks.generate("x" * 30, **far)
    assert default == blocks.generate("x" * 30, window=20, **far)
    assert default != blocks.generate("x" * 30, window=0, **far)
    near = {"max_new_tokens": 20, "seed": 6, "temperature": 3.0}
    assert blocks.generate("xy", **near) == blocks.generate("xy", window=0, **near)


def test_a_stop_string_ends_a_text_before_it(blocks):
    """Every string that the unstopped text has can stop it, wherever blocks cut it."""
    whole = blocks.generate("ab", max_new_tokens=60, seed=3)
    text = whole.completions[0]
    for start in range(0, len(text) - 3, 7):
        stop = text[start : start + 3]
        done = blocks.generate("ab", max_new_tokens=60, seed=3, stop=["\0never", stop])
        assert done.completions[0] == text[: text.index(stop)]
        assert done.texts[0] == "ab" + done.completions[0]
        assert done.calls <= whole.calls


def test_a_stop_string_that_never_comes_changes_nothing(blocks):
    plain, stopped = (
        blocks.generate("ab", max_new_tokens=20, num_samples=3, stop=stop)
        for stop in ((), "surely not in there")
    )
    assert plain == stopped


def test_a_streamer_gets_each_block_when_it_is_done(blocks):
    streamer = Recorder()
    done = blocks.generate("ab", streamer=streamer, max_new_tokens=13)
    assert [len(put) for put in streamer.puts] == [2, 2, 4, 4, 3]
    assert sum(streamer.puts, []) == done.sequences[0]  # noqa: RUF017
    assert max(len(draft) for draft in streamer.drafts) <= 4
    assert streamer.ended


def test_forbidden_ids_are_never_generated(held):
    excluded = {held.model.config.mask_token_id, *held.model.config.excluded_token_ids}
    for ids in held.generate("", num_samples=16, temperature=5.0).sequences:
        assert not excluded & set(ids)


def test_temperature_zero_depends_on_no_token_draw(held):
    first = held.generate("ab", temperature=0.0, steps=1, max_new_tokens=3, seed=1)
    second = held.generate("ab", temperature=0.0, steps=1, max_new_tokens=3, seed=2)
    assert first.sequences == second.sequences


def test_texts_around_holes(held):
    done = held.generate(["The [MASK:5] sat[MASK:2]", "ab"], suffix="", max_new_tokens=4, seed=1)
    assert done.texts[0] == f"The {done.holes[0][0]} sat{done.holes[0][1]}"
    assert done.completions[0] == f"{done.holes[0][0]} sat{done.holes[0][1]}"
    assert done.holes[1] == [done.completions[1]]
    ended = held.generate(["ab", "cd"], suffix=["!", ""], max_new_tokens=4, seed=1)
    assert ended.texts[0] == f"ab{ended.completions[0]}!"
    assert len(ended.sequences[0]) == 7
    assert ended.sequences[1] == held.generate(["ab", "cd"], max_new_tokens=4, seed=1).sequences[1]
    with pytest.raises(ConfigError) as error:
        held.generate("[MASK]", suffix="x")
    assert error.value.code == "suffix_of_template"
    with pytest.raises(ConfigError) as error:
        held.generate("a", suffix=["x", "y", "z"])
    assert error.value.code == "not_one_suffix_each"


def test_patterns_bans_and_hooks(held):
    options = {"max_new_tokens": 9, "num_samples": 5, "seed": 2}
    wanted = {"regex": "(no|yes|é)+", "ban": ["yesyes", "nono"], "force": "éno"}
    done = held.generate("ab", **wanted, **options)
    for text in done.completions:
        assert "éno" in text
        assert re.fullmatch("(no|yes|é)+", text)
        assert "nono" not in text
        assert "yesyes" not in text
    spelled = []

    def vowels(context, log_x0):
        spelled.extend(context.place.tolist())
        return log_x0.masked_fill(~torch.isin(torch.arange(259), torch.tensor([*b"aeiou"])), -9e9)

    hooked = held.generate("ab", hooks=[vowels], **options)
    assert {letter for text in hooked.completions for letter in text} <= set("aeiou")
    assert set(spelled) == set(range(2, 11))


def test_a_pattern_is_made_once(held, monkeypatch):
    made = []

    def counted(*arguments):
        made.append(arguments[0])
        return build_pattern(*arguments)

    monkeypatch.setattr("textdiff.sampling.request.build_pattern", counted)
    fresh = replace(held)
    texts = [
        fresh.generate("ab", regex=regex, ban="bb", max_new_tokens=n, seed=n).completions[0]
        for regex, n in [("[ab]+", 3), ("[ab]+", 5), ("c+", 4), ("[ab]+", 7)]
    ]
    assert made == ["[ab]+", "c+"]
    assert all(1 <= len(t) <= n for t, n in zip(texts, [3, 5, 4, 7], strict=True))
    assert all(set(text) <= set("ab") and "bb" not in text for text in (*texts[:2], texts[3]))


@pytest.mark.parametrize("option", [{"stop": "b\udcff"}, {"ban": ["\ud800"]}, {"regex": "\ud800"}])
def test_strings_that_no_text_can_hold_are_refused(held, option):
    with pytest.raises(ConfigError) as error:
        held.generate("ab", **option)
    assert error.value.code == "string_unicode"


def test_defaults_may_name_one_banned_string_or_none():
    found = SamplingConfig.from_export({"ban": "zq", "force": None})
    assert (found.ban, found.force) == (("zq",), ())


class Rising:
    """A grammar of a user's own: bytes never fall from one place to the next."""

    def check(self, job):
        if int(job.lengths.max()) > 20:
            raise ConfigError("too long to rise")

    def begin(self, context, log_weights):
        self.context, self.log_weights = context, log_weights
        self.text = context.canvas.clone()
        return self

    def allow(self, which):
        row, column = self.context.row[which], self.context.column[which]
        open_ = self.text > 256  # special ids, the mask among them
        low = self.text.masked_fill(open_, -1).cummax(1).values
        high = self.text.masked_fill(open_, 999).flip(1).cummin(1).values.flip(1)
        ids = torch.arange(self.log_weights.shape[1])
        before = torch.nn.functional.pad(low, (1, 0), value=-1)[row, column, None]
        after = torch.nn.functional.pad(high, (0, 1), value=999)[row, column + 1, None]
        return self.log_weights[which].masked_fill((ids < before) | (ids > after), -torch.inf)

    def put(self, which, tokens):
        self.text[self.context.row[which], self.context.column[which]] = tokens


def test_a_grammar_of_a_users_own(full):
    bytes_only = [lambda context, log_x0: log_x0.index_fill(-1, torch.tensor([256]), -9e9)]
    rising = {"constraint": Rising(), "hooks": bytes_only, "num_samples": 6, "seed": 3}
    done = full.generate("[MASK:4]m[MASK:4]", **rising)
    for ids in done.sequences:
        assert ids == sorted(ids)
        assert ids[4] == ord("m")
    assert len(set(map(tuple, done.sequences))) == 6
    with refused(ConfigError, None, "too long to rise"):
        full.generate("[MASK:21]", **rising)


def test_unknown_option(held):
    with pytest.raises(ConfigError) as error:
        held.generate("", temprature=1.0)
    assert error.value.code == "unknown_option"


def test_score_agrees_with_estimate(held):
    texts = ["A first text that is longer than the context.", "Short."]
    scores = held.score(texts, seed=4)
    whole = held.estimate(texts, seed=4, each_document=True).bound()
    assert {score.replicates for score in scores} == {whole.replicates}
    tokens = [score.tokens for score in scores]
    assert tokens == [len(text) for text in texts]
    mean = sum(s.mean * s.tokens for s in scores) / sum(tokens)
    assert whole.mean == pytest.approx(mean, abs=1e-12)
    assert whole.bytes == sum(map(len, texts))


def test_prompts_are_context(held):
    texts = ["bcde", "fg"]
    alone, given = held.estimate(texts), held.estimate(texts, prompts=["a", "ef"])
    assert given.bound().tokens == alone.bound().tokens == 6
    assert given.bound().mean != alone.bound().mean
    empty = held.estimate(texts, prompts=["", ""])
    assert empty.bound().mean == pytest.approx(alone.bound().mean)


def test_compare_with_another_model(held):
    other = build(num_layers=1)
    texts = ["Some words.", "And some more of them, longer than the context."]
    settings = {
        "seed": 2,
        "replicates": 32,
    }  # as many of both
    difference = held.compare(other, texts, **settings)
    means = [model.estimate(texts, **settings).bound().mean for model in (held, other)]
    assert difference.mean == pytest.approx(means[0] - means[1])
    assert difference.unit == "nats/token"


def test_choices_that_exclude_each_other(held):
    with pytest.raises(ConfigError) as error:
        held.estimate(["ab"], prompts=["a"], spans=[[(0, 1)]])
    assert error.value.code == "prompts_and_spans"
    with pytest.raises(ConfigError) as error:
        held.estimate(["ab"], protocol="mdlm", stride=4)
    assert error.value.code == "protocol_fixes_chunks"


def test_autoregressive_models_are_exact_under_a_protocol():
    model = build(block_size=1)
    found = model.estimate(["words and words, " * 6], protocol="bd3lm")
    assert found.estimator == "masked_count"
    assert found.bound().stderr == pytest.approx(0.0, abs=1e-12)


def test_a_string_is_no_list_of_texts(held):
    for method in (held.estimate, held.score, held.windows):
        with pytest.raises(ConfigError, match=r"give a list of texts: \[text\]"):
            method("abc")


def test_half_of_a_surrogate_pair_is_no_text(held):
    for method in (held.score, held.generate):
        with refused(DataError, "surrogate", "surrogate pair as character 3"):
            method(["ab\ud800"])


def test_empty_text_is_refused(held):
    with refused(DataError, "no_token_to_score", "no token"):
        held.score([""])


def test_save_and_load(held, tmp_path):
    held.save_pretrained(tmp_path)
    again = TextDiffusion.from_pretrained(tmp_path, device="cpu", dtype="float64")
    assert again.generate("ab", seed=2).sequences == held.generate("ab", seed=2).sequences
    assert again.defaults == held.defaults
    assert again.family.block_size == held.family.block_size
    weights = dict(again.model.named_parameters())
    assert all(torch.equal(w, weights[name]) for name, w in held.model.named_parameters())
    # Where weights lie in memory decides a last digit: products take another path on some CPUs.
    found, kept = again.score(["text"])[0], held.score(["text"])[0]
    same = {"mean": found.mean, "stderr": found.stderr, "terms": found.terms}
    assert replace(kept, **same) == found
    assert (found.mean, found.stderr) == pytest.approx((kept.mean, kept.stderr), rel=1e-12)
    assert found.terms == pytest.approx(kept.terms, rel=1e-12)


def test_loading_says_what_is_wrong(tmp_path):
    with refused(CheckpointError, "no_directory", "no such directory"):
        TextDiffusion.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json; give a run's export directory"):
        TextDiffusion.from_pretrained(tmp_path)
    run = tmp_path / "runs" / "one"
    (run / "export").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).touch()
    with pytest.raises(CheckpointError, match=r"continue it with .*one/config\.yaml"):
        TextDiffusion.from_pretrained(run)
    (run / "export" / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"holds no model: .* give .*runs/one/export"):
        TextDiffusion.from_pretrained(run.parent)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file({"bert.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with refused(CheckpointError, "not_an_export", "not a textdiff export"):
        TextDiffusion.from_pretrained(tmp_path)


def test_unknown_characters_are_refused(tmp_path):
    from textdiff.data.sections import CharTokenizer

    held = build()
    tokenizer = train_tokenizer(CharTokenizer(), ["abc"])
    held.tokenizer = tokenizer
    held.model.config.mask_token_id = tokenizer.mask_token_id
    held.model.config.excluded_token_ids = [tokenizer.unk_token_id]
    held.family = family_of(held.model.config, torch.device("cpu"))
    with refused(DataError, "foreign_characters", "not trained on"):
        held.generate("abz")
    with refused(DataError, "foreign_tokens", "cannot predict"):
        held.score(["abz"])


def test_export_reloads_as_a_plain_tokenizer(held, tmp_path):
    held.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("héllo", add_special_tokens=False) == list("héllo".encode())


# --- where documents end -------------------------------------------------------------------------


def test_texts_are_scored_with_their_ends(held):
    texts = ["ab", "", "abcdefg"]
    found = held.estimate(texts, end_of_text=True, estimator="chain_rule")
    assert found.windows.document_tokens.tolist() == [2, 0, 7]
    assert found.windows.tokens[1].tolist() == [held.tokenizer.eos_token_id]
    one, seven = (held.score([text], end_of_text=True)[0] for text in (texts[0], texts[2]))
    assert one.terms["end_of_text"] > 0.0
    assert (seven.tokens, seven.bytes) == (7, 7)
    with refused(
        DataError, "no_token_to_score", "document 2 has no token to share its bound among"
    ):
        held.score(texts, end_of_text=True)
    total = held.estimate(texts, end_of_text=True, estimator="chain_rule").bound()
    assert total.mean * 9 == pytest.approx(float(found.nats.sum()))


def test_ends_that_have_no_probability_are_refused(held):
    with pytest.raises(ConfigError) as error:
        held.estimate(["abc"], spans=[[(0, 1)]], end_of_text=True)
    assert error.value.code == "spans_and_end_of_text"
    with pytest.raises(ConfigError) as error:
        held.estimate(["abc"], protocol="bd3lm", end_of_text=True)
    assert error.value.code == "protocol_fixes_chunks"
    endless = train_tokenizer(ByteTokenizer(), [])
    endless.eos_token = None
    other = TextDiffusion(held.model, endless, held.family, held.defaults)
    with pytest.raises(ConfigError) as error:
        other.estimate(["abc"], end_of_text=True)
    assert error.value.code == "no_end_of_text_token"
    endless.eos_token = "<|pad|>"
    with pytest.raises(ConfigError) as error:
        other.estimate(["abc"], end_of_text=True)
    assert error.value.code == "end_of_text_not_predicted"
