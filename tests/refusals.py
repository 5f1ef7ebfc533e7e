"""Refusals that tests expect: an error's type and code, and the names and places that it gives."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from textdiff.errors import TextDiffError


@contextmanager
def refused(
    kind: type[TextDiffError], code: str | None, *words: str
) -> Iterator[pytest.ExceptionInfo[TextDiffError]]:
    """Expect one sentence of a type and code that holds some words."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code
    for each in words:
        assert each in str(caught.value)
    assert "\n" not in str(caught.value)
