"""The page of a film, run by a browser where there is one."""

import json
import os
import re
import shutil

import pytest
from children import finished

from textdiff.view.cells import Kind, Reader
from textdiff.view.recorders import KINDS, Film

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
LONG = 600  # tokens, and steps: what it shows in all steps together is 360,000 cells

PROBE = """<script>
const said = {}, shown = () => spans.map((span) => span.textContent).join("");
const key = (key, more) => document.dispatchEvent(new KeyboardEvent("keydown", {key, ...more}));
said.opened = [at, shown(), $("where").textContent];
said.wide = document.documentElement.scrollWidth - innerWidth;
key("ArrowLeft"); said.back = [at, shown()];
key("Home"); said.home = [at, shown()];
key("End"); said.end = [at, shown()];
location.hash = "#step=2&row=1";
addEventListener("hashchange", () => {
  said.second = [at, row, shown(), spans.map((span) => span.className)];
  key("ArrowRight", {shiftKey: true}); key("ArrowRight", {shiftKey: true});
  said.chosen = [chosen, $("detail").textContent];
  key("ArrowLeft"); said.before = $("detail").textContent;
  $("colour").value = "entropy"; key("ArrowRight");
  said.coloured = spans.map((span) => span.style.background);
  const report = document.createElement("pre");
  report.id = "report"; report.textContent = JSON.stringify(said);
  document.body.append(report);
});
</script>"""


def page(path):
    """A film of two rows: a long one; one with markup, half a character, a token lost again."""
    given, kept, draft, lost = (
        KINDS.index(k) for k in (Kind.GIVEN, Kind.KEPT, Kind.DRAFT, Kind.LOST)
    )
    film = Film(path, Reader(None, mask=0, end=None), "a & b", {"rule": "remask"})
    film.strings = {"x ": 0, "? ": 1, "<b>&amp;": 2, "": 3, "é": 4}
    long = [
        [at, 0, kept, *([] if at else [n for p in range(1, LONG) for n in (p, 1, draft)])]
        for at in range(LONG)
    ]
    film.rows = [
        {
            "index": 0,
            "finished": True,
            "start": [],
            "frames": [
                {"time": 1 - at / LONG, "cells": cells, "news": [at, 500, 100], "nats": 0.0}
                for at, cells in enumerate(long)
            ],
        },
        {
            "index": 1,
            "finished": True,
            "start": [0, 2, given],
            "frames": [
                {"time": 1.0, "cells": [1, 3, kept, 2, 4, kept], "news": [1, 900, 10, 2, 250, 200]},
                {"time": 0.5, "cells": [1, 0, lost, 3, 0, kept], "news": [3, -1, -1]},
            ],
        },
    ]
    film.close()
    path.write_text(
        path.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8"
    )


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the page says of itself."""
    if BROWSER is None:
        pytest.skip("no Chromium here")
    folder = tmp_path_factory.mktemp("film")
    page(folder / "film.html")
    flags = ["--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        "--window-size=500,800",
    ]
    flags += ["--no-sandbox"] if os.getuid() == 0 else []
    address = (folder / "film.html").as_uri() + f"#step={LONG // 2}"
    words = [BROWSER, *flags, f"--user-data-dir={folder}/profile", "--virtual-time-budget=5000"]
    done = finished([*words, "--dump-dom", address], seconds=120)
    found = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_a_long_film_shows_every_step_however_it_is_reached(said):
    def at(step):
        return "x " * step + ("? " * (LONG - step) if step else "")

    half = LONG // 2
    assert said["opened"] == [
        half,
        at(half),
        f"step {half} of {LONG} · t = {1 - (half - 1) / LONG:.3f}",
    ]
    assert said["back"] == [half - 1, at(half - 1)]
    assert said["home"] == [0, at(0)]
    assert said["end"] == [LONG, at(LONG)]


def test_it_does_not_overflow_sideways(said):
    assert said["wide"] <= 0


def test_another_row_opens_by_its_address_and_markup_stays_text(said):
    assert said["second"] == [2, 1, "<b>&amp;x éx ", ["given", "lost", "kept", "fresh"]]


def test_tokens_are_chosen_by_keys_and_tell_their_figures(said):
    assert said["chosen"] == [1, 'position 1, "x ": masked again in this step']
    # One step before, the same position held a piece of a character, which still has its figures.
    assert (
        said["before"] == 'position 1, "": written at step 1, probability 0.900, entropy 0.10 nats'
    )


def test_colours_are_of_tokens_whose_figures_are_known(said):
    given, lost, token, unknown = said["coloured"]
    assert (given, lost, unknown) == ("", "", "")
    assert token.startswith("rgb(253, 234, 69)")  # the most uncertain one
