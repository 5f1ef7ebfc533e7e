import re
import sys
from pathlib import Path

from refusals import refused

from textdiff.data.document_stream import corpus_fingerprint
from textdiff.data.python_docs import python_docs
from textdiff.errors import DataError

# The package re-exports the function under the module's name.
module = sys.modules["textdiff.data.python_docs"]


def test_size_and_determinism(documentation):
    assert 1_500_000 <= sum(map(len, documentation)) <= 2_000_000
    assert all(len(text) >= 200 for text in documentation)
    assert python_docs() == documentation


def test_reads_like_prose(documentation):
    text = "".join(documentation)
    letters = sum(map(str.isalpha, text)) / len("".join(text.split()))
    assert letters > 0.9
    assert ">>>" not in text
    assert not re.search(r"^[*=~-]{3,}$", text, re.MULTILINE)
    assert not re.search(r"[ \t]$", text, re.MULTILINE)


def test_no_paragraph_occurs_twice(documentation):
    # Otherwise held-out documents would quote the training split.
    paragraphs = [p.strip("\n") for text in documentation for p in re.split(r"\n\n+", text)]
    assert len(paragraphs) == len(set(paragraphs))


def test_modules_are_not_imported(documentation):
    assert any("Turtle graphics is a popular way" in text for text in documentation)
    assert "turtle" not in sys.modules
    assert "antigravity" not in sys.modules


def test_docstrings_come_in_source_order_and_once(tmp_path: Path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""First."""\nclass A:\n    """Second."""\n    def f(self):\n        """Third.\n\n'
        '        Indented.\n        """\nasync def g():\n    """First."""\n'
    )
    assert module._docstrings(path) == ["First.", "Second.", "Third.\n\nIndented."]


def test_file_that_is_no_python_is_skipped(tmp_path: Path):
    path = tmp_path / "template.py"
    path.write_text("def {name}(:\n")
    assert module._docstrings(path) == []


def test_python_without_sources(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(module, "_topics", lambda: iter(()))
    with refused(DataError, "no_python_docs"):
        python_docs()


def test_fingerprint_sees_boundaries_order_and_content():
    prints = {
        corpus_fingerprint(texts)
        for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", ""], ["ab", "C"])
    }
    assert len(prints) == 6
    assert corpus_fingerprint(iter(["ab", "c"])) == corpus_fingerprint(["ab", "c"])
