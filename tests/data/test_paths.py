"""Which files a name means."""

import os
import socket
from pathlib import Path

import pytest
from refusals import refused

from textdiff.data import formats, paths
from textdiff.data.document_stream import EMPTY, iterate_texts
from textdiff.data.paths import find_files
from textdiff.data.sections import Source
from textdiff.data.sources import load_documents
from textdiff.data.text_files import read_texts
from textdiff.errors import DataError


def write(name: str, text: str | bytes = "x") -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def found(name: str) -> list[str]:
    return [str(path) for path in find_files(name).paths]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


# --- what exists is what is meant ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes[1].txt", "a*.txt", "a?.txt", "[ab].txt", "**", "{a}.txt"])
def test_existing_file_is_not_a_pattern(name):
    for other in ("notes1.txt", "ab.txt", "a.txt", "b.txt", "x/y.txt"):
        write(other, "another")
    write(name, "this one")
    assert read_texts([name]) == ["this one"]
    assert list(iterate_texts(load_documents(Source(source=name)))) == ["this one"]


def test_existing_folder_is_not_a_pattern_either():
    write("dir[1]/a.txt", "this one")
    write("dir1/b.txt", "another")
    assert read_texts(["dir[1]"]) == read_texts(["dir[1]/*.txt"]) == ["this one"]
    assert found("dir*") == ["dir1/b.txt", "dir[1]/a.txt"]
    assert found("dir[[]1]/*") == ["dir[1]/a.txt"]


def test_pattern_that_matches_nothing_is_one_sentence():
    os.symlink("nowhere", "broken.txt")
    for name, said in (
        ("nothing*.txt", "nothing*.txt: no text file matches this pattern"),
        ("no/such/*.txt", "no text file matches this pattern"),
        ("br*", "left out: 1 file (broken links: 1)"),
    ):
        for read in (lambda name: read_texts([name]), lambda n: load_documents(Source(source=n))):
            with pytest.raises(DataError) as caught:
                read(name)
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "~nobody/x", "x\0y", "y" * 5000, "nope"])
def test_name_that_is_none(name):
    with refused(DataError, "no_file"):
        read_texts([name])


@pytest.mark.parametrize("target", ["nowhere", "link.txt"])
def test_link_that_leads_nowhere(target):
    os.symlink(target, "link.txt")
    with refused(DataError, "broken_link", f"link.txt: a link to {target}"):
        read_texts(["link.txt"])


def test_home_is_a_folder(monkeypatch, tmp_path):
    write("a.txt", "home")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_texts(["~/a.txt"]) == read_texts(["~/*.txt"]) == read_texts(["~"]) == ["home"]


# --- folders and links ---------------------------------------------------------------------------


def test_linked_folders_are_followed_once():
    write("corpus/b.txt", "1")
    write("corpus/deep/a.txt", "2")
    write("elsewhere/c.txt", "3")
    for link, target in {
        "corpus/self": ".",
        "corpus/deep/up": "..",
        "corpus/deep/round": "../../corpus/deep",
        "corpus/0": "deep",
        "corpus/other": "../elsewhere",
        "corpus/again": "../elsewhere",
        "elsewhere/back": "../corpus",
    }.items():
        os.symlink(target, link)
    expected = ["corpus/again/c.txt", "corpus/b.txt", "corpus/deep/a.txt"]
    for name in ("corpus", "corpus/**", "corpus/**/*.txt", "corpus/*", "corpus/**/*"):
        assert found(name) == expected
    assert found("corpus/**/a.txt") == ["corpus/deep/a.txt"]
    assert found("corpus/*/a.txt") == ["corpus/deep/a.txt"]
    assert found("corpus/s*/deep/*.txt") == ["corpus/self/deep/a.txt"]


def test_many_links_between_folders_come_to_an_end():
    for here in range(9):
        write(f"m/{here}/t.txt", str(here))
        for there in range(9):
            os.symlink(f"../{there}", f"m/{here}/to-{there}")
    assert found("m") == found("m/**/*.txt") == [f"m/{n}/t.txt" for n in range(9)]


def test_link_to_a_file_is_not_another_document():
    write("f/new.txt", "1")
    os.symlink("new.txt", "f/latest.txt")
    files = find_files("f")
    assert [str(path) for path in files.paths] == ["f/new.txt"]
    assert files.left_out == {"links to files that are read": 1}
    os.link("f/new.txt", "f/copy.txt")
    assert found("f") == ["f/copy.txt", "f/new.txt"]


def test_what_is_left_out_is_counted_and_said_in_one_line(caplog):
    for name in ("f/a.txt", "f/b.png", "f/c.PNG", "f/d", "f/.hidden/e.txt", "f/g.tar.gz"):
        write(name)
    write("f/empty.txt", "")
    write("f/blank.txt", " \n")
    write("f/state.json", '{"rows": 3}')
    os.symlink("nowhere", "f/broken.txt")
    os.mkfifo("f/pipe.txt")
    assert find_files("f").left_out == {
        ".png": 2,
        "without a suffix": 1,
        "hidden": 1,
        ".tar.gz": 1,
        EMPTY: 1,
        "broken links": 1,
        "not regular files": 1,
    }
    assert read_texts(["f"]) == ["x"]
    (line,) = caplog.messages
    assert line.startswith("f: left out 10 files (.png: 2, empty or only white space: 2, ")
    assert ".json without a key 'text': 1" in line


@pytest.mark.parametrize("name", ["f", "f/**/*.txt", "f/*/*.txt"])
def test_folder_that_cannot_be_read_is_an_error(name, monkeypatch):
    write("f/a.txt")
    write("f/sub/b.txt")
    real = os.scandir

    def scandir(folder):
        if str(folder).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(paths.os, "scandir", scandir)
    for read in (lambda n: read_texts([n]), lambda n: load_documents(Source(source=n))):
        with refused(DataError, "unreadable", "f/sub", "permission denied"):
            read(name)


def test_source_is_read_several_times_and_so_is_not_a_pipe():
    os.mkfifo("pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        for name in ("pipe.txt", "socket.txt", "/dev/null"):
            with refused(DataError, "not_regular", name):
                load_documents(Source(source=name))
    with refused(DataError, "standard_input"):
        load_documents(Source(source="-"))


# --- kinds ---------------------------------------------------------------------------------------


def test_last_suffix_decides():
    write("notes.jsonl.txt", '{"text": "row"}')
    write("notes.txt.jsonl", '{"text": "row"}')
    write("UPPER.JSONL", '{"text": "row"}')
    write("UPPER.TXT", "plain")
    assert read_texts(["notes.jsonl.txt"]) == ['{"text": "row"}']
    assert read_texts(["notes.txt.jsonl"]) == read_texts(["UPPER.JSONL"]) == ["row"]
    assert read_texts(["UPPER.TXT"]) == ["plain"]


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "program.py", "data.log", "x.unknown"])
def test_any_text_that_is_named_is_read(name):
    write(name, "text é")
    assert read_texts([name]) == ["text é"]
    assert list(iterate_texts(load_documents(Source(source=name)))) == ["text é"]


def test_pattern_of_unknown_suffixes_names_its_files():
    write("f/a.py", "1")
    write("f/b.py", "2")
    write("f/c.txt", "3")
    assert read_texts(["f/*.py"]) == ["1", "2"]
    assert read_texts(["f/*"]) == ["3"]
    write("g/a.py")
    with refused(DataError, "no_text_files"):
        read_texts(["g"])


def test_lone_state_file_does_not_make_a_saved_dataset():
    write("f/state.json", "{}")
    write("f/a.txt", "text")
    assert list(iterate_texts(load_documents(Source(source="f")))) == ["text"]
    assert read_texts(["f"]) == ["text"]


def test_saved_dataset_is_read_for_scoring_too():
    import datasets

    saved = datasets.Dataset.from_dict({"text": ["one", "two"]})
    saved.save_to_disk("one")
    datasets.DatasetDict({"a": saved}).save_to_disk("many")
    assert read_texts(["one"]) == read_texts(["many/a"]) == ["one", "two"]
    with refused(DataError, "splits", "many"):
        read_texts(["many"])


# --- folders without text ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f", "f/*", "f/**/*.txt"])
@pytest.mark.parametrize("contents", [("",), (" \n", ""), ("\t", "\u2003", "\r\n")])
def test_folder_of_blank_documents_says_so(name, contents):
    for number, content in enumerate(contents):
        write(f"f/{number}.txt", content)
    for read in (
        lambda: read_texts([name]),
        lambda: list(load_documents(Source(source=name)).blocks()),
    ):
        with refused(DataError, "no_text", "every document"):
            read()


def test_blank_file_among_others_costs_nothing():
    write("f/a.txt", " \n" * 9)
    write("f/b.txt", "text")
    write("f/c.csv", "text\n")
    documents = load_documents(Source(source="f"))
    assert list(iterate_texts(documents)) == ["text"]
    assert documents.omissions.files == {EMPTY: 2}


def test_blank_beginning_of_a_file_belongs_to_it(monkeypatch):
    monkeypatch.setattr(formats, "_READ_BYTES", 4)
    write("a.txt", " \n" * 20 + "text" + "\n " * 20)
    assert read_texts(["a.txt"]) == [" \n" * 20 + "text" + "\n " * 20]
