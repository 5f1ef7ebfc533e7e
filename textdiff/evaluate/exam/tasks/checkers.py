"""Prompts of the local tasks, and checks of their answers.

Every check is a function of a document and the harness's results, of which there is one: the text.
"""

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

Document = dict[str, Any]
Scores = dict[str, float]

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
EQUATION = re.compile(r"(\d+)\s*([-+*/])\s*(\d+)\s*=\s*(\d+)")
SIZE, DIGITS = 4, "1234"


def before_last_word(document: Document) -> str:
    """Return a passage up to its last word, without the space before it."""
    return str(document["text"]).rpartition(" ")[0]


def last_word(document: Document) -> str:
    """Return the last word of a passage with the space before it."""
    return " " + str(document["text"]).rpartition(" ")[2]


def minimal_pair(document: Document) -> list[str]:
    """Return the acceptable sentence and the other."""
    return [document["sentence_good"], document["sentence_bad"]]


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text; None: it has none."""
    numbers = NUMBER.findall(text)
    return Fraction(numbers[-1].replace(",", "")) if numbers else None


def same_number(document: Document, results: Sequence[str]) -> Scores:
    """Return whether the last number of an answer is that of the right one."""
    right = last_number(document["answer"])
    return {"exact_match": float(right is not None and last_number(results[0]) == right)}


def same_answer(document: Document, results: Sequence[str]) -> Scores:
    """Return whether an answer is the right text, and whether its last number is the right one."""
    right, text = document["answer"].strip(), results[0].strip()
    number = last_number(right)
    same = text == right if number is None else last_number(text) == number
    return {"exact_match": float(text == right), "acc": float(same)}


def countdown_solved(document: Document, results: Sequence[str]) -> Scores:
    """Return whether equations are right, use every number once and reach the target."""
    numbers = [int(number) for number in document["numbers"].split(",")]
    return {"acc": float(reaches(results[0], numbers, int(document["target"])))}


def reaches(text: str, numbers: Sequence[int], target: int) -> bool:
    """Return whether the equations in a text's first line lead from numbers to a target.

    Args:
        text: `44-15=29,79-29=50`.
        numbers: each is used exactly once; results are numbers for later equations.
        target: the last result.
    """
    line = text.strip().partition("\n")[0].strip()
    equations = [EQUATION.fullmatch(equation.strip()) for equation in line.split(",")]
    left = Counter(numbers)
    result = None
    for equation in equations:
        if equation is None:
            return False
        a, sign, b, result = int(equation[1]), equation[2], int(equation[3]), int(equation[4])
        left.subtract([a, b])
        if min(left.values()) < 0 or not _holds(a, sign, b, result):
            return False
        left[result] += 1
    return result == target and left.total() == 1


def _holds(a: int, sign: str, b: int, result: int) -> bool:
    if sign == "/":
        return b != 0 and a == b * result
    return {"+": a + b, "-": a - b, "*": a * b}[sign] == result


def sudoku_solved(document: Document, results: Sequence[str]) -> Scores:
    """Return whether a grid is filled by the rules and keeps the digits that were given."""
    return {"acc": float(is_solution(results[0], document["puzzle"]))}


def is_solution(text: str, puzzle: str) -> bool:
    """Return whether the first lines of a text solve a Sudoku of 4 x 4.

    Args:
        text: a line of digits per row.
        puzzle: likewise, 0 where a digit is wanted.
    """
    grid = [line.strip() for line in text.strip().splitlines()[:SIZE]]
    if len(grid) != SIZE or any(len(row) != SIZE for row in grid):
        return False
    given = zip("".join(grid), "".join(puzzle.split()), strict=True)
    kept = all(clue in ("0", digit) for digit, clue in given)
    columns = ["".join(column) for column in zip(*grid, strict=True)]
    boxes = [
        grid[i][j : j + 2] + grid[i + 1][j : j + 2] for i in range(0, 4, 2) for j in range(0, 4, 2)
    ]
    return kept and all(sorted(unit) == list(DIGITS) for unit in [*grid, *columns, *boxes])
