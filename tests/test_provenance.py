"""Where a number comes from."""

import hashlib
import json
import shutil

import pytest
from children import finished

from textdiff.export.records import (
    PACKAGE,
    commit_of,
    model_record,
    source_hash,
    training_record,
)
from textdiff.storage import file_hash


def git(folder, *words) -> str:
    done = finished(["git", "-C", folder, *words])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    git(folder, *identity, "commit", "-q", "--allow-empty", "-m", "first")
    return folder


def test_commit_of_a_branch_a_packed_branch_a_worktree_and_a_detached_head(checkout, tmp_path):
    commit = git(checkout, "rev-parse", "HEAD")
    assert commit_of(checkout) == commit
    git(checkout, "worktree", "add", "-q", "-b", "other/name", str(tmp_path / "tree"))
    assert commit_of(tmp_path / "tree") == commit
    git(checkout, "pack-refs", "--all")
    assert commit_of(checkout) == commit_of(tmp_path / "tree") == commit
    git(checkout, "checkout", "-q", "--detach")
    assert commit_of(checkout) == commit


def test_no_checkout(tmp_path):
    assert commit_of(tmp_path) is None


def test_source_hash_covers_the_package():
    assert len(source_hash()) == 64
    assert (PACKAGE / "export" / "records.py").is_file()


def test_hashes(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    paths = [tmp_path / "a", tmp_path / "b"]
    assert file_hash(*paths) == hashlib.sha256(b"onetwo").hexdigest()
    assert file_hash(tmp_path / "a", tmp_path / "missing") is None
    assert file_hash() is None


def test_exports_say_which_weights_they_hold(tmp_path):
    assert model_record(None)["weights"] == "unknown"
    assert model_record(tmp_path)["weights"] == "unknown"
    (tmp_path / "training.json").write_text(json.dumps({"weights": "ema"}))
    assert model_record(tmp_path)["weights"] == "ema"
    (tmp_path / "training.json").write_text("[")
    assert training_record(tmp_path) == {}
