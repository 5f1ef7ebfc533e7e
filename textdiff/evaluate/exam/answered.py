"""Answers as lm-evaluation-harness takes them, with their Monte-Carlo error.

Each is a plain value with attributes. They travel wherever the harness takes values: through its
cache, between processes and into its samples.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from textdiff.likelihood.bound import WithError, mean_skewness

Draws = NDArray[np.float64]


class _Drawn(WithError):
    """Base of log-likelihoods that are the mean of replicates.

    Attributes:
        draws: [R] log-likelihood in each replicate.
        exact: whether it has no Monte-Carlo error.
    """

    draws: Draws
    exact: bool
    doubt = ""

    @property
    def mean(self) -> float:  # type: ignore[override]
        """Log-likelihood in nats, which bounds that of the model from below."""
        return float(self.draws.mean())

    @property
    def replicates(self) -> int:  # type: ignore[override]
        """R."""
        return len(self.draws)

    @property
    def stderr(self) -> float:  # type: ignore[override]
        """Monte-Carlo standard error of the mean."""
        return 0.0 if self.exact else float(self.draws.std(ddof=1)) / self.replicates**0.5

    @property
    def skewness(self) -> float:  # type: ignore[override]
        """Skewness of the mean."""
        import torch

        return mean_skewness(torch.from_numpy(self.draws)[:, None])


class Answer(tuple[float, bool], _Drawn):
    """Log-likelihood of an answer, and whether greedy decoding writes it.

    Attributes:
        truncated: whether its context was cut from the left.
        lossy: whether tokens do not give back its text, which is then not what is scored.
    """

    truncated: bool
    lossy: bool

    def __new__(
        cls,
        draws: Draws,
        is_greedy: bool,
        exact: bool = False,
        truncated: bool = False,
        lossy: bool = False,
    ) -> "Answer":
        """Return the answer whose log-likelihood is the mean of replicates."""
        self = super().__new__(cls, (float(draws.mean()), is_greedy))
        self.draws, self.exact, self.truncated, self.lossy = draws, exact, truncated, lossy
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Answer, (self.draws, self[1], self.exact, self.truncated, self.lossy)


class WholeText(float, _Drawn):
    """Log-likelihood of a whole text.

    Attributes:
        lossy: see `Answer`.
    """

    lossy: bool

    def __new__(cls, draws: Draws, exact: bool = False, lossy: bool = False) -> "WholeText":
        """Return the log-likelihood that is the mean of replicates."""
        self = super().__new__(cls, float(draws.mean()))
        self.draws, self.exact, self.lossy = draws, exact, lossy
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return WholeText, (self.draws, self.exact, self.lossy)


class WrittenAnswer(str):
    """Generated answer.

    Attributes:
        truncated: whether its context was cut from the left.
        shortened: whether the context left room for fewer tokens than were asked for.
        calls: network calls per answer, the mean over answers written together.
    """

    truncated: bool
    shortened: bool
    calls: float

    def __new__(
        cls, text: str, truncated: bool = False, shortened: bool = False, calls: float = 0.0
    ) -> "WrittenAnswer":
        """Return the text as an answer."""
        self = super().__new__(cls, text)
        self.truncated, self.shortened, self.calls = truncated, shortened, calls
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return WrittenAnswer, (str(self), self.truncated, self.shortened, self.calls)
