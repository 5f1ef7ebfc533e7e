"""Processes that a script starts without saying so, and what they do with the script."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from children import finished
from refusals import refused

from textdiff.data.encode import workers
from textdiff.errors import DataError

PREPARE = """
from textdiff.config.reading import load
from textdiff.data.corpus import prepare_corpus

print("begun")
config = load("c.yaml", ["--data.num-proc=2"])
print(prepare_corpus(config.data, config.tokenizer, 0).record["train"]["tokens"])
"""

TRAIN = """
import sys
import torch.multiprocessing as multiprocessing

multiprocessing.set_start_method(sys.argv[1], force=True)
from textdiff.config.reading import load
from textdiff.data.corpus import prepare_corpus
from textdiff.train.reporter import Reporter
from textdiff.train.distributed import make_accelerator
from textdiff.train.trainer import Trainer

config = load("c.yaml", ["--data.num-workers=1"])
accelerator = make_accelerator(config)
corpus = prepare_corpus(config.data, config.tokenizer, 0)
Trainer(config, corpus, accelerator, Reporter()).run()
"""

CONFIG = """
data: {sources: [{source: corpus.txt}], sequence_length: 32, cache_dir: cache}
tokenizer: {kind: byte}
model: {hidden_size: 16, num_layers: 1, num_heads: 2}
train: {steps: 4, global_batch_size: 4, micro_batch_size: 4, warmup_steps: 2}
sample: {num_samples: 0}
run: {dir: run}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(f"Line {i} of {i * i}.\n" for i in range(300)))
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


def test_a_script_without_a_guard_prepares_a_corpus(folder):
    """It runs once: the processes that tokenise do not import it, and so do not wait for it."""
    (folder / "script.py").write_text(PREPARE)
    done = finished([sys.executable, "script.py"], cwd=folder, env=here(), seconds=100)
    assert (done.returncode, done.stderr) == (0, "")
    begun, tokens = done.stdout.splitlines()
    assert begun == "begun"
    assert int(tokens) > 3000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_without_a_guard_that_trains_is_told_of_it(folder, method):
    (folder / "script.py").write_text(TRAIN)
    done = finished([sys.executable, "script.py", method], cwd=folder, env=here(), seconds=100)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "a data-loader worker ended unexpectedly" in last
    assert 'put what the script does under `if __name__ == "__main__":`' in last


def here() -> dict[str, str]:
    """The environment of a script that lies elsewhere."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return {**os.environ, "PYTHONPATH": root}


def test_workers_know_nothing_of_the_script():
    """Another thread finds it where it was."""
    script = sys.modules["__main__"]
    with workers(1, os.getpid) as submit:
        assert submit(os.path.join, "a", "b").result() == os.path.join("a", "b")
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(lambda: sys.modules["__main__"]).result() is script


def test_a_worker_that_dies_is_told_in_a_sentence():
    with refused(DataError, "lost_worker", "data.num_proc"), workers(1, os.getpid) as submit:
        submit(signal.raise_signal, signal.SIGKILL).result()
