"""A run writes in a folder of its own: new, empty or its own earlier one."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from textdiff.config import Config
from textdiff.config.reading import to_yaml
from textdiff.errors import ConfigError, TextDiffError
from textdiff.train.directory import claim


def begin(directory: Path, resume: str = "auto") -> list[str]:
    said: list[str] = []
    with ExitStack() as stack:
        claim(directory, resume, said.append, stack)
    return said


def earlier_run(folder: Path) -> Path:
    (folder / "checkpoints" / "step-000002").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(Config()))
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_new_an_empty_and_an_own_folder(tmp_path):
    empty, blank = tmp_path / "empty", tmp_path / "blank"
    empty.mkdir()
    blank.mkdir()
    (blank / ".gitkeep").touch()
    own = earlier_run(tmp_path / "own")
    (own / "notes.md").write_text("mine, beside the run's")
    for folder in (tmp_path / "new" / "deep", empty, blank, own):
        assert begin(folder) == []
        assert begin(folder) == []  # a start that ended early leaves its lock
    assert (own / "notes.md").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"thesis.tex": "x"},
        {"config.yaml": "run: {}\ndata: {}\ndiffusion: {}\ntrain: {}\n"},  # a config, no run
        {"config.yaml": "lr: 1\n", "checkpoints/last.pt": "of another program"},
        {"config.yaml": "a: [\n", "metrics.jsonl": ""},
        {"checkpoints/last.pt": "x"},
        {".hidden": "x"},
        {".lock": "", "thesis.tex": "x"},
    ],
    ids=lambda content: "+".join(content),
)
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_files_of_others_are_left_alone(tmp_path, content, resume):
    for name, text in content.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = files(tmp_path)
    with pytest.raises(ConfigError) as error:
        begin(tmp_path / "folder", resume)
    assert error.value.code == "foreign_files"
    assert files(tmp_path) == before


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("name", [".", "..", "/", "file", "file/run"])
def test_places_that_are_no_folder_for_a_run(tmp_path, monkeypatch, name, resume):
    work = tmp_path / "work"
    work.mkdir()
    (work / "file").write_text("x")
    monkeypatch.chdir(work)
    before = files(tmp_path)
    with pytest.raises(TextDiffError, match=r"run\.dir "):
        begin(Path(name), resume)
    assert files(tmp_path) == before


def test_never_moves_an_earlier_run_aside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    earlier_run(Path("runs/a"))
    assert begin(Path("runs/a"), "never") == ["moved the earlier run to runs/a.old-1"]
    assert begin(Path("runs/a"), "never") == []  # nothing was trained there
    earlier_run(Path("runs/a"))
    assert begin(tmp_path / "runs/a", "never") == [
        f"moved the earlier run to {tmp_path / 'runs/a.old-2'}"
    ]
    assert (tmp_path / "runs/a.old-1/checkpoints/step-000002").is_dir()
    assert os.listdir("runs/a") == [".lock"]


def test_never_does_not_move_the_current_folder(tmp_path, monkeypatch):
    own = earlier_run(tmp_path / "own")
    monkeypatch.chdir(own)
    assert begin(Path(".")) == []
    before = files(tmp_path)
    del before["own/.lock"]  # holds the time of the last try
    for name in (".", own, "../own", "checkpoints/.."):
        with pytest.raises(ConfigError) as error:
            begin(Path(name), "never")
        assert error.value.code == "current_folder"
    assert files(tmp_path) == before | {"own/.lock": (own / ".lock").read_text()}
