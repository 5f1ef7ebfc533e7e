"""Views that may fail: a display that breaks ends alone, and what it shows goes on."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")


def unfailing(view: T) -> T:
    """The same view, whose methods raise no errors: after the first one they do nothing.

    Args:
        view: a progress bar, a reporter, a watcher: something whose results nobody needs.
    """
    return cast(T, _Unfailing(view))


class _Unfailing:
    def __init__(self, view: Any):
        self._view = view
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._view, name)
        return self._guarded(found) if callable(found) else found

    def __enter__(self) -> "_Unfailing":
        self._guarded(self._view.__enter__)()
        return self

    def __exit__(self, *error: object) -> None:
        self._failed = False  # also a broken display gives the terminal back, if it can
        self._guarded(self._view.__exit__)(*error)

    def _guarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*values: Any, **named: Any) -> Any:
            if self._failed:
                return None
            try:
                return method(*values, **named)
            except Exception as error:
                self._failed = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"note: the display failed and is off ({reason})", file=sys.stderr)
                return None

        return call
