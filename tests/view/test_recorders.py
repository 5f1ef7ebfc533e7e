"""Films, traces and the live view of real generations by a network with random weights."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from textdiff.config import Config
from textdiff.data.sections import ByteTokenizer
from textdiff.data.tokenizer import train_tokenizer
from textdiff.export.loading import family_of
from textdiff.models import TextDiffusionModel
from textdiff.pipeline import TextDiffusion
from textdiff.train.setup import model_config, sample_defaults
from textdiff.view.cells import Kind, Pieces, Reader
from textdiff.view.live import LiveRows
from textdiff.view.recorders import KINDS, Film, Trace

REMASK = {"rule": "remask", "knobs": {"eta": 0.4}}
RENOISE = {"rule": "entropy_bound", "knobs": {"entropy_bound": 4.0}}


def build(block_size: int | None, process: str = "absorbing") -> TextDiffusion:
    torch.manual_seed(0)
    diffusion, noisy = {"block_size": block_size, "process": process}, {}
    if process == "uniform":
        diffusion["objective"] = {"kind": "udlm"}
        noisy = {"time_conditioning": True, "adaln": True}
    config = Config.model_validate(
        {
            "data": {"sequence_length": 24},
            "tokenizer": {"kind": "byte"},
            "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, **noisy},
            "diffusion": diffusion,
            "sample": {"steps": 6, "max_new_tokens": 14},
        }
    )
    tokenizer = train_tokenizer(ByteTokenizer(), [])
    model = TextDiffusionModel(model_config(config, tokenizer)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    family = family_of(model.config, torch.device("cpu"))
    return TextDiffusion(model, tokenizer, family, sample_defaults(config))


@pytest.fixture(
    scope="module",
    params=[(None, "absorbing"), (4, "absorbing"), (None, "uniform"), (4, "uniform")],
    ids=["full", "blocks", "uniform", "uniform-blocks"],
)
def held(request) -> TextDiffusion:
    return build(*request.param)


def reader_of(held) -> Reader:
    mask = held.family.process.vocabulary.mask_token_id
    return Reader(Pieces(held.tokenizer, [mask]), mask, held.tokenizer.eos_token_id)


def options_of(held) -> dict:
    if not held.family.process.replaces_tokens:
        return REMASK
    return {} if held.family.block_size is None else RENOISE


def traced(held, **options) -> list[dict]:
    file, reader = io.StringIO(), reader_of(held)
    trace = Trace(file, reader.pieces, reader.mask)
    held.generate(["ab", "", "xyz"], callbacks=[trace], seed=3, **options_of(held), **options)
    trace.close()
    return [json.loads(line) for line in file.getvalue().splitlines()]


# --- traces --------------------------------------------------------------------------------------


def test_a_trace_replayed_is_the_text(held):
    done = held.generate(["ab", "", "xyz"], seed=3, **options_of(held))
    tokens: dict[tuple[int, int], int] = {}
    lost = 0
    for line in traced(held):
        where = (line["row"], line["position"])
        if line.get("remasked"):
            del tokens[where]
            lost += 1
        else:
            tokens[where] = line["token"]
            assert 0.0 <= line["probability"] <= 1.0
            assert line["entropy"] >= 0.0
    for row, ids in enumerate(done.sequences):
        start = len(["ab", "", "xyz"][row])
        assert [tokens[row, at] for at in range(start, len(ids))] == ids[start:]
    assert (lost > 0) == bool(options_of(held))


def test_what_steps_say_of_a_row_is_of_the_row_alone(held):
    """Noise that draws tokens fills the last block of a shorter row; nothing is said of that."""

    def dependence(prompts: list[str]) -> float:
        steps = held.stream(prompts, max_new_tokens=3, seed=3, parts=("entropy",))
        return sum(float(step.dependence[0]) for step in steps)

    assert dependence(["ab", "abcdefgh"]) == pytest.approx(dependence(["ab"]), rel=1e-9)


def test_a_trace_tells_rows_in_their_own_steps_whatever_the_batch(held):
    together, apart = traced(held, batch_size=16), traced(held, batch_size=1)
    assert [(x["row"], x["step"]) for x in together] == sorted(
        (x["row"], x["step"]) for x in together
    )
    for a, b in zip(together, apart, strict=True):
        same = {key: value for key, value in a.items() if key not in ("probability", "entropy")}
        assert same.items() <= b.items()
        if "token" in a:
            assert a["probability"] == pytest.approx(b["probability"], rel=1e-5)
            assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-5)
    for row in range(3):
        steps = {line["step"] for line in together if line["row"] == row}
        assert steps == set(range(1, max(steps) + 1))


def test_a_trace_that_is_closed_early_has_what_was_there(held):
    file, reader = io.StringIO(), reader_of(held)
    trace = Trace(file, reader.pieces, reader.mask)
    order = held.prepare(["ab", "cd"], seed=3)
    trace.begin(order.job)
    for number, step in enumerate(held.stream(["ab", "cd"], seed=3, parts=trace.parts)):
        if number == 2:
            break
        trace.step(step)
    assert file.getvalue() == ""
    trace.close()
    rows = [json.loads(line)["row"] for line in file.getvalue().splitlines()]
    assert set(rows) == {0, 1}
    assert rows == sorted(rows)


# --- films ---------------------------------------------------------------------------------------


class Scripts(HTMLParser):
    """The script elements of a page, and everything that it would load."""

    def __init__(self):
        super().__init__()
        self.inside, self.found, self.loads, self.text = None, {}, [], []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.loads += [named[key] for key in ("src", "href", "action") if key in named]
        if tag == "script":
            self.inside = named.get("id", "program")
            self.found[self.inside] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.found[self.inside] += data
        else:
            self.text.append(data)


def filmed(held, path, title="film", **options) -> tuple[dict, Scripts]:
    film = Film(path, reader_of(held), title, {"rule": "</script>"})
    prompts = ["a</script><b>", "", "xyz"]
    held.generate(prompts, callbacks=[film], seed=3, **options_of(held), **options)
    film.close()
    page = Scripts()
    page.feed(path.read_text(encoding="utf-8"))
    return json.loads(page.found["film"]), page


def last_texts(film: dict) -> list[str]:
    """What the page shows at the end of each row: the changes one after another."""
    texts = []
    for row in film["rows"]:
        cells: dict[int, tuple[int, int]] = {}
        for changes in [row["start"], *(frame["cells"] for frame in row["frames"])]:
            for at in range(0, len(changes), 3):
                cells[changes[at]] = (changes[at + 1], changes[at + 2])
        kept = [cells[at] for at in sorted(cells) if KINDS[cells[at][1]] != Kind.CUT]
        assert {KINDS[kind] for _, kind in kept} <= {Kind.GIVEN, Kind.KEPT}
        texts.append("".join(film["strings"][string] for string, _ in kept))
    return texts


def test_a_film_ends_with_the_text_and_loads_nothing(held, tmp_path):
    film, page = filmed(held, tmp_path / "film.html")
    done = held.generate(["a</script><b>", "", "xyz"], seed=3, **options_of(held))
    reader = reader_of(held)
    shown = [
        "".join(cell.text for cell in reader.cells(ids, None, range(start), (), ()))
        for ids, start in zip(done.sequences, (13, 0, 3), strict=True)
    ]
    for text, whole in zip(last_texts(film), shown, strict=True):
        assert whole.startswith(text)
        assert whole == text or text.endswith("∎")
    assert page.loads == []
    source = (tmp_path / "film.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", source)
    assert "@import" not in source
    assert "url(" not in source
    assert [row["finished"] for row in film["rows"]] == [True] * 3
    assert set(page.found) == {"film", "program"}


def test_titles_are_escaped(held, tmp_path):
    _, page = filmed(held, tmp_path / "film.html", title="<img src=x onerror=alert(1)>")
    assert page.loads == []
    assert "".join(page.text).count("<img src=x onerror=alert(1)>") == 2


def test_frames_hold_what_changed_and_its_figures(held, tmp_path):
    film, _ = filmed(held, tmp_path / "film.html", batch_size=2)
    trace = io.StringIO()
    reader = reader_of(held)
    callback = Trace(trace, reader.pieces, reader.mask)
    prompts = ["a</script><b>", "", "xyz"]
    held.generate(prompts, callbacks=[callback], seed=3, **options_of(held))
    told = [json.loads(line) for line in trace.getvalue().splitlines()]
    for row in film["rows"]:
        for number, frame in enumerate(row["frames"], start=1):
            news = [
                (line["position"], line["probability"], line["entropy"])
                for line in told
                if (line["row"], line["step"]) == (row["index"], number) and "token" in line
            ]
            found = [frame["news"][at : at + 3] for at in range(0, len(frame["news"]), 3)]
            assert [at for at, _, _ in found] == [at for at, _, _ in news]
            for (_, sure, nats), (_, chance, entropy) in zip(found, news, strict=True):
                assert sure == pytest.approx(1000 * chance, abs=0.51)
                assert nats == pytest.approx(100 * entropy, abs=0.51)
            assert frame["nats"] >= -1e-9
            lost = {
                line["position"]
                for line in told
                if (line["row"], line["step"]) == (row["index"], number) and "remasked" in line
            }
            marked = {
                frame["cells"][at]
                for at in range(0, len(frame["cells"]), 3)
                if KINDS[frame["cells"][at + 2]] is Kind.LOST
            }
            assert marked <= lost


# --- the live view -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 12), (100, 30), (20, 5)])
@pytest.mark.parametrize("samples", [1, 3, 9])
def test_pictures_fit_the_terminal_and_the_last_one_has_the_text(held, size, samples):
    console = Console(
        width=size[0], height=size[1], file=io.StringIO(), force_terminal=True, color_system=None
    )
    view = LiveRows(console, reader_of(held), samples, calls=10**9)
    pictures: list[list[str]] = []
    draw = view.picture

    def kept():
        group = draw()
        pictures.append([str(text) for text in group.renderables])
        return group

    view.picture = kept
    view.drawn = -1.0
    with view:
        done = held.generate("ab", num_samples=samples, callbacks=[view], **options_of(held))
        view.picture()
    assert pictures
    for lines in pictures:
        assert len(lines) <= size[1] - 1
        assert all(console.measure(line).maximum <= size[0] for line in lines)
        assert lines[-1].startswith("call ")
        assert console.measure(lines[-1] + "^C").maximum <= size[0]  # an interrupted view clears up
    assert f"{done.tokens_per_forward:.1f} tokens/call" in view.figures(200).plain
    if samples == 1 and size == (100, 30):
        text = "".join(pictures[-1][:-1])
        shown = "".join(
            cell.text for cell in reader_of(held).cells(done.sequences[0], None, (), (), ())
        )
        assert text == shown.replace("\n", "")


def test_watching_paces_fast_models(held, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr("textdiff.view.live.time.sleep", slept.append)
    console = Console(width=40, height=12, file=io.StringIO(), force_terminal=True)
    view = LiveRows(console, reader_of(held), 1, calls=8)
    with view:
        done = held.generate("ab", callbacks=[view])
    assert len(slept) == done.calls
    assert max(slept) <= 0.5
    assert sum(slept) > 0.25 * done.calls
