import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from textdiff.data.document_stream import Documents, from_texts
from textdiff.data.sections import BpeTokenizer, ByteTokenizer, CharTokenizer
from textdiff.data.tokenizer import train_tokenizer

STORY = (
    "The lamp was lit at dusk, and the keeper's dog slept beside it.\n"
    "Nobody asked why the sea — usually so loud — had fallen silent.\n\n"
    "\tBy morning the fog was gone; the lamp burned on.  \n"
)


@pytest.fixture(scope="session")
def story() -> str:
    return STORY


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Forty different documents of different lengths."""
    return [f"Chapter {n}.\n" + STORY * (1 + n % 5) for n in range(40)]


@pytest.fixture(scope="session")
def tokenizers(corpus: list[str]) -> dict:
    sections = (BpeTokenizer(vocab_size=400), CharTokenizer(), ByteTokenizer())
    return {section.kind: train_tokenizer(section, corpus) for section in sections}


@pytest.fixture(scope="session")
def as_dataset() -> Callable[[Sequence[str]], Documents]:
    return from_texts


@pytest.fixture
def shared_data() -> Path:
    folder = os.environ.get("TEXTDIFF_DATA")
    if not folder:
        pytest.skip("TEXTDIFF_DATA is not set")
    return Path(folder)
