"""Flags over a config: plain data by the type of their key, and sentences for everything else."""

import json
import math
import sys
from pathlib import Path

import pytest
import yaml
from children import finished

from textdiff.cli import main
from textdiff.config import Config
from textdiff.config.keys import at, describe_keys, keys, leaves
from textdiff.config.reading import load, validate
from textdiff.errors import ConfigError


def written(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *flags: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(path, flags, "textdiff train c.yaml [--resume auto|never|PATH] ")
    assert "\n" not in str(error.value)
    return str(error.value)


# Texts that mean something else, or nothing, in YAML.
TEXTS = ["*.txt", "@x", "% a", "& b", "! c", "| d", "> e", ", f", '"g', "'h", "[i].txt", "{j}"]
TEXTS += ["a: b", "c # d", "- e", "?", "null", "none", "true", "3", "1e-3", "2024-01-01", "-x", "="]
TEXTS += ["[1, 2]", '{"a": 1}', "a=b", "train.steps=3", " ", "`", "a\nb", "é", "\t", "<<", "~"]


@pytest.mark.parametrize("text", [t for t in TEXTS if t.strip() and t != "~"])
@pytest.mark.parametrize("form", ["--{}={}", "--{} {}", "{}={}"])
def test_a_text_stays_as_it_is(tmp_path, text, form):
    key = "data.sources.0.source"
    words = [f"--{key}", text] if " {}" in form else [form.format(key, text)]
    config = load(written(tmp_path), words)
    assert config.data.sources[0].source == text
    config = load(written(tmp_path), [f"--data.sources.0.text-column={text}"])
    assert config.data.sources[0].text_column == text


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--train.steps", "7"], "train.steps", 7),
        (["--train.steps=7"], "train.steps", 7),
        (["train.steps=7"], "train.steps", 7),
        (["--train.learning-rate", "1e-3"], "train.learning_rate", 1e-3),
        (["--train.learning_rate=1e-3"], "train.learning_rate", 1e-3),
        (["--train.compile", "true"], "train.compile", True),
        (["--train.compile=False"], "train.compile", False),
        (["--train.betas", "0.8", "0.9"], "train.betas", (0.8, 0.9)),
        (["--train.betas=[0.8, 0.9]"], "train.betas", (0.8, 0.9)),
        (["--diffusion.block-size", "4"], "diffusion.block_size", 4),
        (["--diffusion.block-size", "null"], "diffusion.block_size", None),
        (["--diffusion.block-size", "4", "null"], "diffusion.block_size", (4, None)),
        (["--train.betas", "0.8", "0.9", "train.steps=7"], "train.betas", (0.8, 0.9)),
        (["--diffusion.block-size=[8, null]"], "diffusion.block_size", (8, None)),
        (["--diffusion.noise.range", "search"], "diffusion.noise.range", "search"),
        (["--diffusion.noise.range", "0.1", "0.9"], "diffusion.noise.range", (0.1, 0.9)),
        (["--train.init-from", "None"], "train.init_from", None),
        (["--data.sources.0.name", "none"], "data.sources.0.name", None),
        (["--tokenizer.kind", "char"], "tokenizer.kind", "char"),
        (["--tokenizer.vocab-size", "300"], "tokenizer.vocab_size", 300),
        (["--tokenizer.vocab-size=300", "--tokenizer.kind=bpe"], "tokenizer.vocab_size", 300),
        (["--tokenizer", "{kind: char}"], "tokenizer.kind", "char"),
        (["--data.sources.1.source=z", '--data.sources=[{"source": "\\ud83d\\ude00"}, {"source": '
          '"y"}]'], "data.sources.0.source", "\U0001f600"),
        (["--train.steps", "3", "--train.steps", "7"], "train.steps", 7),
    ],
)  # fmt: skip
def test_values_by_the_type_of_their_key(tmp_path, words, key, value):
    found = load(written(tmp_path), words)
    for name in key.split("."):
        found = found[int(name)] if name.isdecimal() else getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_flags_complete_what_a_file_leaves_inconsistent(tmp_path):
    path = written(tmp_path, "model: {time_conditioning: true}\ntokenizer: {kind: pretrained}\n")
    config = load(path, ["--model.adaln=true", "--tokenizer.path", "x"])
    assert (config.model.adaln, config.tokenizer.path) == (True, "x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.steps"], "--train.steps needs a value"),
        (["--train.steps", "--run.dir", "x"], "--train.steps needs a value"),
        (["extra"], "unexpected argument 'extra'"),
        (["--train.steps", "1", "2"], "unexpected argument '2'"),
        (["train.steps=x"], "train.steps: 'x' is not a whole number"),
        (["--diffusion.block-size", "x"], "'x' is not a whole number or a list"),
        (["--model.qk-norm", "maybe"], "--model.qk-norm: 'maybe' is not true or false"),
        (["--train.optimizer", "sgd"], "--train.optimizer: 'sgd' is not 'adamw' or 'muon'"),
        (["--train.optimizer", "adam"], "'adam' is not 'adamw' or 'muon'; did you mean 'adamw'?"),
        (["--train.stpes=3"], "unknown option --train.stpes; did you mean --train.steps?"),
        (["train.stpes=3"], "did you mean --train.steps?"),
        (["--learning_rate=3"], "did you mean --train.learning-rate?"),
        (["--steps=3"], "did you mean --train.steps or --sample.steps?"),
        (["--data.sources.1.sorce=x"], "did you mean --data.sources.1.source?"),
        (["--resum", "never"], "did you mean --resume?"),
        (["--data.sources.3.source=x"], "`data.sources` has one entry, 0"),
        (["--train.steps.more=x"], "unknown option --train.steps.more"),
        (["--tokenizer", "char"], "--tokenizer is a section of keys, such as {kind: char}"),
        (["--tokenizer.path", "x"], "--tokenizer.path: the schema has no key"),
        (["--tokenizer", '{"kind": "bpe", "kind": "char"}'], "'kind' stands twice"),
        (["--data.sources", "[{source: a, source: b}]"], "`0.source` stands on line 1 and again"),
        (["--tokenizer", '{"kind": '], "--tokenizer: not valid YAML"),
        (["--data.sources", "[]"], "sources is empty"),
        (["--train.steps", "0"], "--train.steps: Input should be greater than or equal to 1"),
        (["--run.dir", ""], "--run.dir: it is blank"),
        (["--run.dir", "  "], "--run.dir: it is blank"),
        (["--run.dir", "~no such user/x"], "unknown user"),
    ],
)
def test_refusals_are_one_sentence(tmp_path, words, said):
    assert said in refusal(written(tmp_path), *words)


@pytest.mark.parametrize(
    ("words", "given", "nearest"),
    [
        (["tensorbord"], "'tensorbord'", "'tensorboard'"),
        (["[wandb, trackoi]"], "'trackoi'", "'trackio'"),
        (["wandbb", "trackio"], "'wandbb'", "'wandb'"),
        (["[[wandb]]"], "['wandb']", "'wandb'"),
    ],
)
def test_a_wrong_name_is_told_the_nearest_one(tmp_path, words, given, nearest):
    said = refusal(written(tmp_path), "--train.log-with", *words)
    names = "'tensorboard', 'wandb' or 'trackio'"
    assert f"--train.log-with: {given} is not {names}; did you mean {nearest}?" in said


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: 3}\nmodel: {adaln: true}\ntrain:\n  warmup_steps: 1\n",
         "`train` stands on line 1 and again on line 3"),
        ("train:\n  steps: 3\n  seed: 1\n  steps: 4\n",
         "`train.steps` stands on line 2 and again on line 4"),
        ("data:\n  sources:\n  - source: a\n    split: b\n    source: c\n",
         "`data.sources.0.source` stands on line 3 and again on line 5"),
        ("diffusion: {noise: {draw: time,\n 'draw': count}}",
         "`diffusion.noise.draw` stands on line 1 and again on line 2"),
        ("1: a\n", "Keys should be strings"),
        ("a: &a\n  b: *a\n", "unknown key `a`"),
        ("data: 2024-13-41\n", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        ("a: b: c\n", "not valid YAML"),
        ("? [1]\n: 2\n", "not valid YAML"),
        ("run: {seed: " + "9" * 5000 + "}\n", "not valid YAML"),
        ("run: {dir: ~}\n", "`run.dir`: nothing is not a text"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_taken(tmp_path, text, said):
    assert said in refusal(written(tmp_path, text))


def test_merge_keys_are_no_duplicates(tmp_path):
    path = written(tmp_path, "model: &m {adaln: true}\n")
    assert load(path).model.adaln
    path = written(tmp_path, "data:\n  sources:\n  - &a {source: a, split: b}\n"
                             "  - {<<: *a, source: c}\n")  # fmt: skip
    assert [(s.source, s.split) for s in load(path).data.sources] == [("a", "b"), ("c", "b")]


KINDS = {"exponent": "polynomial", "sigma_min": "geometric", "sigma_max": "geometric"}
KINDS |= {"uniform": "hybrid", "auxiliary": "d3pm", "start": "ar", "vocab_size": "bpe"}


def of_types(*types: type) -> list[tuple[str, ...]]:
    return sorted({key for key in keys() if set(types) & set(leaves(at(key)))})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", of_types(float), ids=".".join)
def test_no_number_is_infinite_or_none(tmp_path, key, value):
    """Each is refused by its name, in a file and as a flag, whatever else is wrong then."""
    from textdiff.config.reading import Flag, merge

    raw: dict = {}
    merge(raw, [Flag("x", key, value)])
    if key[-1] in KINDS:
        raw["diffusion"][key[1]]["kind"] = KINDS[key[-1]]
    with pytest.raises(ConfigError, match=rf"`{'.'.join(key)}`: -?(inf|nan) is not a finite"):
        validate(raw)
    kind = [f"--{key[0]}.{key[1]}.kind={KINDS[key[-1]]}"] if key[-1] in KINDS else []
    for word in (f"{value}", f"{value}".replace("inf", "Infinity")):
        said = refusal(written(tmp_path), *kind, f"--{'.'.join(key)}={word}")
        assert f"--{'.'.join(key)}: '{word}' is not a finite number" in said


@pytest.mark.parametrize("key", of_types(int, float), ids=".".join)
def test_true_is_no_number(key):
    """Python counts it as 1, and YAML reads `yes` and `on` as true."""
    from textdiff.config.reading import Flag, merge

    raw: dict = {}
    merge(raw, [Flag("x", key, True)])
    if key[-1] in KINDS:
        at_key = raw[key[0]] if len(key) == 2 else raw[key[0]][key[1]]
        at_key["kind"] = KINDS[key[-1]]
    with pytest.raises(ConfigError, match=f"`{'.'.join(key)}`: True is not a number"):
        validate(raw)


@pytest.mark.parametrize("items", ["[yes, 0.9]", "[0.9, off]"])
def test_true_is_no_number_in_a_list(tmp_path, items):
    assert "is not a number" in refusal(written(tmp_path, f"train: {{betas: {items}}}"))


@pytest.mark.parametrize("key", ["run.dir", "data.cache_dir", "train.init_from"])
def test_no_path_holds_a_zero_character(key):
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=f"`{key}`: it holds a zero character"):
        validate({section: {name: "a\0b"}})


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = written(
        tmp_path,
        "run: {dir: ~/x}\ndata: {cache_dir: ~/c, sources: [{source: ~/t.txt}]}\n"
        "tokenizer: {kind: pretrained, path: ~/tok}\ntrain: {init_from: ~/e}\n",
    )
    found = load(path)
    places = [found.run.dir, found.data.cache_dir, found.data.sources[0].source]
    places += [found.tokenizer.path, found.train.init_from]
    assert places == [str(tmp_path / name) for name in ("x", "c", "t.txt", "tok", "e")]
    assert load(path, ["run.dir=~"]).run.dir == str(tmp_path)
    assert load("~/c.yaml") == found
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~odd.txt").touch()  # a name that is there is that name
    assert load(path, ["--data.sources.0.source=~odd.txt"]).data.sources[0].source == "~odd.txt"


# --- help ----------------------------------------------------------------------------------------


def test_help_names_every_key_with_its_value(tmp_path, capsys):
    path = written(tmp_path, "train: {steps: 77}\n")
    assert main(["train", str(path), "--help", "--run.dir=here", "tokenizer.kind=char"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[3:])) < 80
    for words in ("--train.steps 77 ", "--run.dir here ", "--tokenizer.kind char ", "[--resume"):
        assert words in shown
    assert "vocab-size" not in shown  # of another kind

    def check(value: object, key: str) -> None:
        nested = isinstance(value, list) and value and isinstance(value[0], dict)
        if isinstance(value, dict) or nested:
            for name, item in value.items() if isinstance(value, dict) else enumerate(value):
                check(item, f"{key}.{name}".lstrip("."))
        else:
            text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
            assert f"--{key.replace('_', '-')} {text}" in shown

    config = load(path, ["run.dir=here", "tokenizer.kind=char"])
    check(config.model_dump(mode="json"), "")
    assert describe_keys(config) in shown


def test_help_takes_less_than_a_second_and_no_torch(root):
    program = (
        "import resource, sys\nfrom textdiff.cli import main\n"
        f"main(['train', {str(root / 'configs/quickstart.yaml')!r}, '--help'])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, 'torch' in sys.modules)"
    )
    done = finished([sys.executable, "-c", program])
    seconds, heavy = done.stdout.splitlines()[-1].split()
    assert heavy == "False"
    assert float(seconds) < 1.0


def test_json_values_round_trip(tmp_path):
    config = Config()
    dumped = json.loads(config.model_dump_json())
    flags = [f"--{name}={json.dumps(section)}" for name, section in dumped.items()]
    assert load(written(tmp_path), flags) == config
