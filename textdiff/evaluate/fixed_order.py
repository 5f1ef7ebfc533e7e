"""The part of a likelihood frontier that searches for a fixed order, on documents of its own."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import Field, ValidationError

from textdiff.errors import ConfigError
from textdiff.evaluate.frontier import Setting
from textdiff.evaluate.suites import LEAST_TEXTS
from textdiff.likelihood.order_search import FixedOrder, find_order
from textdiff.pipeline import TextDiffusion
from textdiff.section import Section, Whole

CURVE = "best fixed order found"


class OrderSearch(Section):
    """The key `order_search` of a grid."""

    documents: Whole = Field(
        64, ge=LEAST_TEXTS, description="documents to search on, which follow the scored ones"
    )
    beam: Whole = Field(16, ge=1, description="sets of revealed places that are kept of each size")

    @classmethod
    def read(cls, content: object) -> "OrderSearch":
        """Return the section.

        Raises:
            ConfigError: a key that does not exist, or a value out of range.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(["order_search", *map(str, first["loc"])])
            raise ConfigError(
                f"grid: {name}: {first['msg']}; it takes documents (at least {LEAST_TEXTS}) and "
                "beam (at least 1)",
                code="order_search",
            ) from None

    def texts(self, rest: Sequence[str]) -> list[str]:
        """Return the documents to search on.

        Args:
            rest: documents of the reference that are not scored.

        Raises:
            ConfigError: there are too few.
        """
        if len(rest) < self.documents:
            raise ConfigError(
                f"the reference has {len(rest)} documents after the scored ones, and order_search "
                f"takes {self.documents}: give more, or set order_search.documents",
                code="too_few_texts",
            )
        return list(rest[: self.documents])

    def key(self, texts: Sequence[str]) -> str:
        """Return the key of the point: the search and its documents."""
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        return f"{CURVE}: {self.documents} documents {digest}, beam {self.beam}"

    def run(self, model: TextDiffusion, texts: Sequence[str]) -> FixedOrder:
        """Search on texts."""
        return find_order(model.model, model.family, model.windows(texts), beam=self.beam)


def searched_setting(order: FixedOrder) -> Setting:
    """Return the setting that writes in an order, one token per call."""
    knobs = {"order": "position", "positions": list(order.places)}
    size = len(order.places)
    return Setting({"rule": "confidence", "steps": size, "knobs": knobs})


def search_record(search: OrderSearch, order: FixedOrder) -> dict[str, Any]:
    """Return the parts of its point that are the search's own."""
    searched = {**search.model_dump(), **asdict(order), "nats_per_token": order.nats / order.tokens}
    return {"curve": CURVE, "line": CURVE, "search": searched}


def split_grid(grid: Mapping[str, Any]) -> tuple[OrderSearch | None, dict[str, Any]]:
    """Return the search that a grid asks for, and the rest of the grid.

    Raises:
        ConfigError: see `OrderSearch.read`.
    """
    rest = {name: value for name, value in grid.items() if name != "order_search"}
    wanted = "order_search" in grid
    return OrderSearch.read(grid["order_search"]) if wanted else None, rest
