"""The tool that draws mutants: its operators, its draw, and its verdicts on a small project."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import mutants

PRICES = """
import math
from typing import TYPE_CHECKING, Literal

Kind = Literal["one", "two"]
REDUCED = 10


def price(count: int, unit: int) -> int:
    \"\"\"The price of some.\"\"\"
    if count < 0:
        raise ValueError(f"count is {count}; expected {0}")
    total = count * unit
    if count >= REDUCED:
        total -= 1
    return total


def unseen(value: int) -> int:
    return value + 1


def counted(number: int) -> int:
    turns = 0
    while number > 0:
        number -= 1
        turns += 1
    return turns
"""

TESTS = """
from pathlib import Path

import pytest

from bridgetower.prices import counted, price


@pytest.mark.parametrize(("count", "unit", "expected"), [(0, 7, 0), (9, 7, 63), (10, 7, 69), (11, 3, 32)])
def test_price(count, unit, expected):
    assert price(count, unit) == expected


def test_refused():
    with pytest.raises(ValueError, match="-1"):
        price(-1, 7)


def test_counted():
    assert Path("MARK").exists()
    assert counted(3) == 3
"""


def texts_of_mutants(source):
    """What each operator makes of an expression or statement."""
    source = source.encode()
    return {
        (mutation.operator, mutation.mutated(source).decode())
        for mutation in mutants.mutations("a.py", source)
    }


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", {("boundary", "(a <= b)"), ("comparison", "(a >= b)")}),
        ("a is b", {("comparison", "(a is not b)")}),
        (
            "a and b",
            {("and-or", "(a or b)"), ("dropped condition", "a"), ("dropped condition", "b")},
        ),
        ("a + b", {("arithmetic", "(a - b)")}),
        ("'a b' + b", set()),
        ("a += b", {("dropped statement", "pass")}),
        ("-a", {("arithmetic", "a")}),
        ("x = not a", {("negated condition", "x = a")}),
        ("x = a if b else c", {("negated condition", "x = a if (not b) else c")}),
        (
            "[a for a in b if c]",
            {
                ("negated condition", "[a for a in b if (not c)]"),
                ("dropped condition", "[a for a in b if True]"),
            },
        ),
        ("x = 3", {("constant", "x = 4"), ("constant", "x = 2")}),
        ("x = 0.5", {("constant", "x = 1.0")}),
        ("x = True", {("constant", "x = False")}),
        ("x = 'name'", {("constant", "x = 'namex'")}),
        ("x = 'some words'", set()),
        ("x = f(a, b)", {("swapped arguments", "x = f(b, a)")}),
        (
            "x = f(a, b=c, d=e)",
            {("dropped keyword", "x = f(a, d=e)"), ("dropped keyword", "x = f(a, b=c, )")},
        ),
        ("x = zip(a, b, strict=True)", {("swapped arguments", "x = zip(b, a, strict=True)")}),
        ("x = max(a)", {("opposite function", "x = min(a)")}),
        ("f(a)", {("dropped statement", "pass")}),
        ("x = a[b:]", {("dropped bound", "x = a[:]")}),
        ("for a in b: break", {("jump", "for a in b: continue")}),
        (
            "def f():\n if a: return",
            {
                ("negated condition", "def f():\n if (not a): return"),
                ("dropped guard", "def f():\n pass"),
            },
        ),
        (
            "if a: raise ValueError('name', 3)",
            {
                ("negated condition", "if (not a): raise ValueError('name', 3)"),
                ("dropped guard", "pass"),
            },
        ),
        ("x: Literal['a'] = b", set()),
        ("X = Literal['a', 'b']", set()),
        ("def f(a: g(1, 2)) -> g(3, 4): 'name'", set()),
        ("import a", set()),
        ("__all__ = ['a', 'b']", set()),
        ("if TYPE_CHECKING: x = 1", set()),
        ("logger.info('name', 3)", set()),
        ("raise ValueError('name', 3)", set()),
        (
            "'ü', a < b",
            {
                ("boundary", "'ü', (a <= b)"),
                ("comparison", "'ü', (a >= b)"),
                ("constant", "'üx', a < b"),
            },
        ),
    ],
)
def test_operators(source, expected):
    assert texts_of_mutants(source) == expected


@pytest.fixture
def small_project(tmp_path):
    folder = tmp_path / "project"
    for name, content in {
        "pyproject.toml": "[tool.pytest.ini_options]",
        "MARK": "",
        "src/bridgetower/__init__.py": "",
        "src/bridgetower/prices.py": PRICES,
        "demo/__init__.py": "",
        "tests/test_prices.py": TESTS,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_a_draw_follows_from_its_seed(small_project):
    drawn = mutants.draw(small_project, 5, "2026-01-01")
    assert len({mutation.line for mutation in drawn}) == 5
    assert drawn == mutants.draw(small_project, 5, "2026-01-01")
    assert drawn != mutants.draw(small_project, 5, "2026-01-02")
    assert len(mutants.draw(small_project, 100, "a")) < 20  # a mutation of each line
    assert mutants.draw(small_project, 5, "a", only=("elsewhere",)) == []


def test_values_of_modules_are_tested_by_their_folder_and_the_contracts(small_project):
    path = "src/bridgetower/prices.py"
    mutation = mutants.Mutation(
        path, "constant", PRICES.splitlines().index("REDUCED = 10") + 1, 0, 0, ""
    )
    tests = [
        "tests/test_contracts.py::test_a",
        "tests/test_prices.py::test_b",
        "tests/test_c.py::test_c",
    ]
    coverage = mutants.Coverage(dict.fromkeys(tests, 1.0), Counter(), defaultdict(dict))
    assert coverage.of(mutation, small_project) == tests[:2]


CALL = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import mutants
NAME = "src/bridgetower/prices.py"
every = mutants.mutations(NAME, (Path({project!r}) / NAME).read_bytes())
chosen = [one for one in every if one.line in {lines} and one.operator in ("dropped statement", "arithmetic")]
mutants.draw = lambda *_: chosen
mutants.ROOT, mutants.LIBRARIES, mutants.START = Path({project!r}), (), 60
mutants.main({arguments!r})
"""


LINES = {
    PRICES.splitlines().index(f"    {line}") + 1: line
    for line in ("return value + 1", "    number -= 1", "    total -= 1")
}


def printed(project, *arguments):
    folder = str(Path(mutants.__file__).parent)
    call = CALL.format(
        folder=folder, project=str(project), lines=[*LINES], arguments=list(arguments)
    )
    done = subprocess.run(
        [sys.executable, "-c", call], capture_output=True, text=True, check=False, cwd=project
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.nightly  # waits for what never ends
def test_verdicts(small_project):
    pytest.importorskip("coverage")
    printed(small_project, "--record")
    recorded = json.loads(
        (small_project / "build/mutants/coverage/tests+test_prices.py.json").read_text()
    )
    assert len(recorded["tests"]) == 6
    lines = printed(small_project, "--seed", "a", "--jobs", "1", "--json").splitlines()
    verdicts = {LINES[verdict["line"]]: verdict for verdict in map(json.loads, lines)}
    assert {line.strip(): verdict["verdict"] for line, verdict in verdicts.items()} == {
        "return value + 1": "survived",
        "number -= 1": "timed out",
        "total -= 1": "killed",
    }
    assert verdicts["    total -= 1"]["failed"] == "tests/test_prices.py::test_price[10-7-69]"

    # A draw goes on where it was interrupted, and what fails without a mutation, too, is no verdict.
    (draw,) = (small_project / "build/mutants/draws").iterdir()
    remaining = [
        line
        for line in draw.read_text().splitlines()
        if json.loads(line)["operator"] != "dropped statement"
    ]
    draw.write_text("".join(f"{line}\n" for line in remaining))
    (small_project / "MARK").unlink()
    text = printed(small_project, "--seed", "a", "--jobs", "1")
    endless, seen, unseen = (
        f"src/bridgetower/prices.py:{line}" for line in sorted(LINES, key=LINES.get)
    )
    assert f"unclear: {endless}" in text
    assert f"survived: {unseen}" in text
    assert seen not in text.partition("unclear:")[2]
    assert len(draw.read_text().splitlines()) == 3
