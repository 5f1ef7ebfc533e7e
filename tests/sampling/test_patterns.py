"""Patterns: what they accept, by Python's own matcher; what is drawn under them, by enumeration."""

import re
from itertools import permutations, product

import pytest
import torch
from engines import generate
from exact_stats import chi_square_p
from exact_tables import CLEAN as KINDS
from exact_tables import MASK as TABLE_MASK
from exact_tables import ROWS as TABLE_ROWS
from exact_tables import all_sequences, code
from rule_worlds import conditionals, keyed, reader, run, truth
from test_rules import FITS, family_of
from tiny_models import ROWS, tiny_family, tiny_model

from textdiff.diffusion.process import Vocabulary
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.errors import ConfigError
from textdiff.sampling.constraints.automata import byte_automaton
from textdiff.sampling.constraints.pattern import build_pattern
from textdiff.sampling.context import Context
from textdiff.sampling.controls import Controls
from textdiff.sampling.draws import draw_tokens
from textdiff.sampling.job import Job
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules import RULES

PATTERNS = [
    "",
    "a",
    "ab|ba|c*",
    "(ab|a)*c?",
    "a{2}b{0,1}",
    "a{,2}(b|c){1,}",
    "[^a]+",
    "[a-b]*c.",
    ".*",
    r"\w\s?\W",
    r"(?:a(b(c)?)?)+",
    r"[]b-]*",
    r"\x61\u0062|é+",
    r"[à-ü߀-\uffff]b?",
    "a||b",
    r"\.\*|[\]\\]",
]


def accepts(machine, text: bytes) -> bool:
    state = 0
    for byte in text:
        state = machine.moves[state][byte]
        if state < 0:
            return False
    return machine.accepting[state]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_automata_accept_what_python_matches(pattern):
    machine = byte_automaton(pattern, [])
    letters = ["a", "b", "c", "]", "-", ".", "*", "\\", " ", "\n", "é", "ß", "ā", "€", "\U0001f600"]
    for length in range(4):
        for letters_of in product(letters, repeat=length):
            text = "".join(letters_of)
            matches = re.fullmatch(pattern, text, flags=re.ASCII) is not None
            assert accepts(machine, text.encode()) == matches, (pattern, text)


def test_every_character_of_a_range_and_no_other():
    machine = byte_automaton("[\\u0700-\\uffff]|[\U00010400-\U000abcde]", [])
    for point in [*range(0x6F0, 0x710), *range(0x7F0, 0x810), *range(0xD7F0, 0xD800)]:
        assert accepts(machine, chr(point).encode()) == (point >= 0x700)
    for point in [0xE000, 0xFFFF, 0x10000, 0x103FF, 0x10400, 0x4FFFF, 0xABCDE, 0xABCDF, 0x10FFFF]:
        wanted = point <= 0xFFFF or 0x10400 <= point <= 0xABCDE
        assert accepts(machine, chr(point).encode()) == wanted


def test_banned_strings_are_nowhere():
    machine = byte_automaton("[ab]*", ["aba", "bb"])
    for length in range(7):
        for letters in product("ab", repeat=length):
            text = "".join(letters)
            assert accepts(machine, text.encode()) == ("aba" not in text and "bb" not in text)
    assert accepts(byte_automaton(None, ["x"]), bytes(range(100)))
    assert not accepts(byte_automaton(None, ["x"]), b"a\xffx")


def test_forced_strings_are_somewhere():
    """Overlapping ones, one inside another, beside a pattern and a ban."""
    machine = byte_automaton("[ab]*", ["bbb"], ["aba", "bb", "b"])
    for length in range(8):
        for letters in product("ab", repeat=length):
            text = "".join(letters)
            wanted = "aba" in text and "bb" in text and "bbb" not in text
            assert accepts(machine, text.encode()) == wanted
    assert len(byte_automaton(None, [], ["aab"]).moves) == 4  # it is not looked for again
    assert accepts(byte_automaton(None, [], ["é"]), "aé\n".encode())
    assert not accepts(byte_automaton(None, [], ["é"]), "é".encode()[:1])
    with pytest.raises(ConfigError) as error:
        byte_automaton(None, [], ["a", ""])
    assert error.value.code == "empty_string"


@pytest.mark.parametrize(
    ("pattern", "place"),
    [
        ("(ab", 4),
        ("ab)", 3),
        ("*a", 1),
        ("a{2", 2),
        ("a{3,2}", 2),
        ("a{5000}", 2),
        ("[ab", 4),
        ("[b-a]", 5),
        ("^a$", 1),
        ("(?=a)", 2),
        (r"(a)\1", 6),
        (r"\xZZ", 3),
    ],
)
def test_what_is_no_pattern_is_refused_with_the_place(pattern, place):
    with pytest.raises(ConfigError, match=f", character {place}: ") as error:
        byte_automaton(pattern, [])
    assert error.value.code == "not_a_pattern"


@pytest.mark.parametrize("pattern", ["((a{1000}){1000})", "(a|b)*a(a|b){12}"])
def test_patterns_of_too_many_states_are_refused(pattern):
    with pytest.raises(ConfigError) as error:
        byte_automaton(pattern, [])
    assert error.value.code == "pattern_too_large"


# --- tokens ---------------------------------------------------------------------------------------

SPELLED = {0: b"a", 1: b"b", 2: b"ab", 3: b"c", 5: b"ba", 6: "é".encode()[:1], 7: "é".encode()[1:]}
END = 8
TOKENS = [SPELLED.get(token) for token in range(ROWS)]
PROMPTS = [[None] * 3 + [0, 3] + [None] * 2, [], [1, 1, 1, 1, 1], [0, None, 0]]
NEW = [4, 9, 6, 0]


@pytest.fixture(scope="module")
def model():
    return tiny_model(adaln=True, time_conditioning=True)


def spelled(tokens) -> bytes:
    return b"".join(SPELLED[token] for token in tokens)


def rows_of(model, family, job, rule, pattern, steps=3, **options):
    controls = Controls(
        temperature=1.5,
        end_tokens=(END,),
        min_new_tokens=pattern.min_new_tokens,
        constraint=pattern,
    )
    *_, last = generate(model, family, job, rule=rule, steps=steps, controls=controls, **options)
    return [row[:n].tolist() for row, n in zip(last.canvas, job.lengths.tolist(), strict=True)]


def check_row(row, prompt, new, pattern: str, banned=(), forced=()):
    """Every hole matches by itself; an open end up to where the text ends."""
    places = [*[token is None for token in prompt], *[True] * new]
    start = None
    for place, is_open in enumerate([*places, False]):
        if is_open and start is None:
            start = place
        if not is_open and start is not None:
            hole = row[start:place]
            if place == len(places) and END in hole:
                hole = hole[: hole.index(END)]
            text = spelled(hole)
            assert re.fullmatch(pattern, text.decode()), (hole, text)
            assert not any(ban.encode() in text for ban in banned)
            assert all(force.encode() in text for force in forced)
            start = None


CASES = [
    (case, rule)
    for case in ("mdlm", "sedd", "udlm", "gidd", "sedd-uniform")
    for rule in sorted(FITS[case])
    if case != "sedd" or rule in ("euler", "tweedie")
]


@pytest.mark.parametrize(("case", "rule"), CASES)
@pytest.mark.parametrize("size", [None, 4])
def test_every_hole_matches_under_every_rule_in_any_batch(model, case, rule, size):
    family, job = family_of(case).with_block_size(size), Job(PROMPTS, NEW, seed=5)
    pattern = build_pattern("(a|bab|é|cc)+", ["aa"], TOKENS, END, min_new_tokens=2, forced=["a"])
    pattern.check(job)
    together = rows_of(model, family, job, rule, pattern)
    for row, prompt, new in zip(together, PROMPTS, NEW, strict=True):
        check_row(row, prompt, new, "(a|bab|é|cc)+", ["aa"], ["a"])
        tail = max(
            [place + 1 for place, token in enumerate(prompt) if token is not None], default=0
        )
        assert END not in row[tail : tail + 2]
    one = Job(PROMPTS[:1], NEW[:1], seed=5)
    assert rows_of(model, family, one, rule, pattern) == together[:1]
    if size is not None:
        assert rows_of(model, family, job, rule, pattern, cache=True, slots=2) == together


def test_many_rows_all_match(model):
    """Single tokens of a two-byte character, long and short tokens, ends wherever they may be."""
    job = Job([[]] * 200, [7] * 200, seed=9)
    pattern = build_pattern("(ab|é)*c?", [], TOKENS, END)
    for family in (tiny_family(), tiny_family(4)):
        rows = rows_of(model, family, job, "first_hitting", pattern)
        for row in rows:
            check_row(row, [], 7, "(ab|é)*c?")
        assert len(set(map(tuple, rows))) > 50
        assert {row.index(END) if END in row else 7 for row in rows} >= {1, 2, 3, 4, 5, 6, 7}


def test_what_cannot_match_is_refused_before_the_network_runs():
    def refusal(pattern, job) -> str:
        with pytest.raises(ConfigError) as error:
            pattern.check(job)
        assert error.value.code == "no_text_fits"
        return str(error.value)

    pattern = build_pattern("a{6}", [], TOKENS, END, min_new_tokens=4)
    pattern.check(Job([[]], [6]))
    assert "exactly 5 tokens" in refusal(pattern, Job([[None] * 5 + [0]], [0]))
    assert "up to 5 tokens" in refusal(pattern, Job([[]], [5]))
    late = build_pattern("a?", [], TOKENS, END, min_new_tokens=3)
    assert "up to 9 tokens" in refusal(late, Job([[]], [9]))
    forced = build_pattern(None, [], TOKENS, END, forced=["cc", "éa"])
    forced.check(Job([[]], [5]))
    assert "up to 4 tokens satisfies the forced `cc`, `éa`" in refusal(forced, Job([[]], [4]))
    endless = build_pattern("a?", [], TOKENS, None)
    assert "exactly 9 tokens" in refusal(endless, Job([[]], [9]))


def test_rules_that_draw_one_by_one_what_belongs_together_refuse(model):
    pattern = build_pattern("a*", [], TOKENS, END)
    for case, rule, knobs, reason in [
        ("learned", "ancestral", {}, "pattern_with_learned_schedule"),
        ("gidd", "predictor_corrector", {"corrections": 2}, "pattern_with_corrections"),
    ]:
        with pytest.raises(ConfigError) as error:
            rows_of(model, family_of(case), Job([[]], [4]), rule, pattern, knobs=knobs)
        assert error.value.code == reason


# --- laws -----------------------------------------------------------------------------------------

LETTERS = dict(zip(KINDS, "abc", strict=True))
PATTERN = "a*b?[ac]*"


def possible_texts() -> tuple[torch.Tensor, torch.Tensor]:
    """All texts of four kinds, and which match."""
    texts = all_sequences(4)
    words = ["".join(LETTERS[kind] for kind in text) for text in texts.tolist()]
    return texts, torch.tensor([re.fullmatch(PATTERN, word) is not None for word in words])


def sampled(rule, steps, rows, table, seed=0, **knobs):
    tokens = [LETTERS[t].encode() if t in LETTERS else None for t in range(TABLE_ROWS)]
    pattern = build_pattern(PATTERN, [], tokens, None)
    canvas = torch.full((rows, 4), TABLE_MASK)
    chosen = RULES[rule]()
    walk = run(
        chosen,
        reader(table),
        canvas,
        keyed(rows, 4, seed),
        steps,
        controls=Controls(constraint=pattern),
    )
    texts, _ = possible_texts()
    index = {tuple(text): i for i, text in enumerate(texts.tolist())}
    found = torch.tensor([index[tuple(row)] for row in walk[-1].canvas.tolist()])
    return torch.bincount(found, minlength=len(texts)).double()


def test_one_token_per_call_follows_the_conditionals_of_what_is_still_possible():
    joint, _ = truth()
    table = conditionals(joint)
    texts, match = possible_texts()
    counts = sampled("first_hitting", 1, 20_000, table)
    assert float(counts[~match].sum()) == 0.0

    expected = torch.zeros(len(texts), dtype=torch.float64)
    for order in permutations(range(4)):
        chance = torch.ones(len(texts), dtype=torch.float64)
        state = torch.full_like(texts, TABLE_MASK)
        for place in order:
            p = table.log_p[code(state), place].exp()
            for kind in KINDS:  # is there a match that agrees with all in sight and this?
                now = state.clone()
                now[:, place] = kind
                agree = ((now[:, None] == texts[match]) | (now[:, None] == TABLE_MASK)).all(-1)
                p[:, kind] *= agree.any(1)
            p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
            chance *= p.gather(1, texts[:, place : place + 1])[:, 0]
            state[:, place] = texts[:, place]
        expected += chance.where(match, 0.0) / 24
    assert float(expected.sum()) == pytest.approx(1.0)
    assert chi_square_p(counts[match], expected[match] * 20_000) > 1e-3


def test_tokens_drawn_together_follow_their_product_given_a_match():
    """One step: all four at once, from the marginals of the empty canvas."""
    joint, _ = truth()
    table = conditionals(joint)
    texts, match = possible_texts()
    empty = torch.full((1, 4), TABLE_MASK)
    p = table.log_p[code(empty)[0]].exp()  # [4, V]
    product_law = torch.stack([p[i, texts[:, i]] for i in range(4)]).prod(0)
    expected = product_law.where(match, 0.0)
    expected = expected / expected.sum()
    counts = sampled("ancestral", 1, 20_000, table)
    assert chi_square_p(counts[match], expected[match] * 20_000) > 1e-3
    assert float(counts[~match].sum()) == 0.0


def test_open_places_count_with_the_best_tokens_that_they_may_become():
    """First and third of three places in one call, the second later: by the formula, and 1/5."""
    letters, pattern = "abcd", "(a(ac|bd)|b.[abcd])"
    vocabulary, rows = Vocabulary.of(5, 4), 20_000
    machine = build_pattern(pattern, [], [*[c.encode() for c in letters], None], None)
    canvas = torch.full((rows, 3), 4)
    where = torch.arange(rows)[:, None] * 3 + torch.tensor([0, 2])
    for log_p in (torch.zeros(2, 4), torch.tensor([[0.3, 1.0, 0.0, 2.0], [1.5, 0.0, 0.7, -0.4]])):
        p = log_p.double().softmax(-1)
        padded = torch.nn.functional.pad(p.log(), (0, 1), value=-torch.inf)
        u = uniforms(3, Stream.TOKEN, row=torch.arange(rows)[:, None], position=torch.arange(2))
        time = torch.ones(rows, dtype=torch.float64)
        drawn = draw_tokens(
            padded.repeat(rows, 1),
            u.flatten(),
            Controls(constraint=machine),
            Context(canvas, Positions.of(where.flatten(), canvas), time, vocabulary),
        ).view(rows, 2)
        first = torch.zeros(4, dtype=torch.float64)
        for a, letter in enumerate(letters):
            first[a] = p[0, a] * max(
                sum(
                    float(p[1, c])
                    for c, last in enumerate(letters)
                    if re.fullmatch(pattern, letter + middle + last)
                )
                for middle in letters
            )
        expected = first / first.sum()
        counts = torch.bincount(drawn[:, 0], minlength=4).double()
        assert chi_square_p(counts[:2], rows * expected[:2]) > 1e-3
        assert counts[2:].sum() == 0
        if not log_p.any():
            assert float(expected[0]) == pytest.approx(0.2)
            assert abs(float(counts[0]) / rows - 0.2) < 4 * (0.16 / rows) ** 0.5
