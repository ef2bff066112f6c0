"""Counts how code reads, and fails where a count is above its ceiling in `[tool.reading]` of pyproject.toml.

    python tools/reading.py              # the counts of each tree, and the lines to change where one is too high
    python tools/reading.py --list vague # every place that a count has, worst first

Size is counted in nodes of the syntax tree, so that folding lines makes nothing smaller. A count that is low does not
make code readable: the ceilings only keep it from getting worse.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Names that say nothing of what they hold.
VAGUE_NAMES = """
about asked chosen each every found given it kept known left more named one others own part
parts place places rest said several shown some taken them there told wanted what
"""
VAGUE = frozenset(VAGUE_NAMES.split())
DECISIONS = (
    *(ast.If, ast.IfExp, ast.For, ast.While, ast.comprehension, ast.BoolOp),
    *(ast.ExceptHandler, ast.Assert),
)
MAX_DECISIONS = 15  # of a function
MAX_FUNCTION_DENSITY = 20  # nodes a line of a function with at least six lines
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)

HELP = {
    "nodes": "nodes of the syntax tree",
    "density": "nodes a line of code, of the densest room",
    "vague": "percent of the bound names that say nothing",
    "pairs": "assignments `a, b = c, d` per 1,000 lines of code",
    "decisions": f"functions with more than {MAX_DECISIONS} decisions",
    "dense": f"functions with more than {MAX_FUNCTION_DENSITY} nodes a line",
    "semicolons": "percent of the docstrings whose first sentence has a semicolon",
    "homes": "top-level names that several modules define",
    "single": "private functions with one caller",
}


@dataclass
class Room:
    """Counts of the modules of one folder."""

    nodes: int = 0
    lines: int = 0  # of code, without comments, docstrings and imports
    names: int = 0  # that are bound
    docstrings: int = 0
    places: dict[str, list[tuple[float, str]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, other: Room) -> None:
        self.nodes += other.nodes
        self.lines += other.lines
        self.names += other.names
        self.docstrings += other.docstrings
        for name, places in other.places.items():
            self.places[name] += places

    def counts(self) -> dict[str, float]:
        counted = {name: len(places) for name, places in self.places.items()}
        return {
            "nodes": self.nodes,
            "density": self.nodes / max(1, self.lines),
            "vague": 100 * counted.get("vague", 0) / max(1, self.names),
            "pairs": 1000 * counted.get("pairs", 0) / max(1, self.lines),
            "decisions": counted.get("decisions", 0),
            "dense": counted.get("dense", 0),
            "semicolons": 100 * counted.get("semicolons", 0) / max(1, self.docstrings),
        }


def read_module(path: Path, label: str) -> Room:
    """Counts one module."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    room = Room()
    docstring_lines = set[int]()
    for node in ast.walk(tree):
        room.nodes += 1
        if isinstance(node, (*DEFINITIONS, ast.Module)) and (doc := ast.get_docstring(node)):
            statement = node.body[0]
            docstring_lines.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
            room.docstrings += 1
            if ";" in re.split(r"\.\s|\n\n", doc)[0]:
                room.places["semicolons"].append((0, f"{label}:{statement.lineno}"))
        if isinstance(node, ast.Assign) and is_pair(node):
            room.places["pairs"].append((0, f"{label}:{node.lineno}"))
        if isinstance(node, FUNCTIONS):
            measure_function(node, label, room)
        name = bound_name(node)
        if name and name not in ("self", "cls", "_"):
            room.names += 1
            if name.strip("_") in VAGUE:
                room.places["vague"].append((0, f"{label}:{node.lineno} {name}"))  # type: ignore[attr-defined]
    for number, line in enumerate(text.split("\n"), start=1):
        code = line.strip()
        is_import = re.match(r"(from|import) ", code)
        if code and number not in docstring_lines and code[0] != "#" and not is_import:
            room.lines += 1
    return room


def is_pair(node: ast.Assign) -> bool:
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def bound_name(node: ast.AST) -> str | None:
    """Returns the name of a variable or a parameter where it is bound."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    return node.arg if isinstance(node, ast.arg) else None


def measure_function(
    function: ast.FunctionDef | ast.AsyncFunctionDef, label: str, room: Room
) -> None:
    """Notes a function that decides too often or is too dense."""
    where = f"{label}:{function.lineno} {function.name}"
    decisions = 1 + sum(isinstance(node, DECISIONS) for node in ast.walk(function))
    if decisions > MAX_DECISIONS:
        room.places["decisions"].append((decisions, f"{where}: {decisions} decisions"))
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if not body:
        return
    lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
    density = sum(1 for statement in body for _ in ast.walk(statement)) / lines
    if lines >= 6 and density > MAX_FUNCTION_DENSITY:
        room.places["dense"].append((density, f"{where}: {density:.1f} nodes a line"))


def several_homes(trees: dict[str, ast.Module]) -> Iterator[str]:
    """Yields top-level names that several modules define; tests of pytest may have equal names."""
    homes = defaultdict[str, set[str]](set)
    for label, tree in trees.items():
        for node in tree.body:
            if isinstance(node, DEFINITIONS) and not node.name.lower().startswith("test"):
                homes[node.name].add(f"{label}:{node.lineno}")
    for name, places in sorted(homes.items()):
        if len(places) > 1:
            yield f"{name}: {', '.join(sorted(places))}"


def single_callers(trees: dict[str, ast.Module]) -> Iterator[str]:
    """Yields private functions, not methods, that one place of their module uses."""
    for label, tree in trees.items():
        used = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        used.update(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        for node in tree.body:
            if isinstance(node, FUNCTIONS) and not node.decorator_list:
                is_private = node.name.startswith("_") and not node.name.startswith("__")
                if is_private and used[node.name] == 1:
                    yield f"{label}:{node.lineno} {node.name}"


def read_tree(folder: Path) -> tuple[dict[str, Room], Room]:
    """Counts the rooms of a tree, and the whole."""
    rooms = defaultdict[str, Room](Room)
    total = Room()
    trees = dict[str, ast.Module]()
    for path in sorted(folder.rglob("*.py")):
        label = str(path.relative_to(ROOT))
        parents = path.relative_to(folder).parts[:-1]
        counted = read_module(path, label)
        rooms[parents[0] if parents else "."].add(counted)
        total.add(counted)
        trees[label] = ast.parse(path.read_text(encoding="utf-8"))
    total.places["homes"] = [(0, place) for place in several_homes(trees)]
    total.places["single"] = [(0, place) for place in single_callers(trees)]
    return rooms, total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = "\n".join(f"{name}: {text}" for name, text in HELP.items())
    parser.add_argument("--list", choices=HELP, metavar="COUNT", help=f"print its places:\n{names}")
    options = parser.parse_args()
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["reading"]
    has_failed = False
    for tree, ceilings in config.items():
        rooms, total = read_tree(ROOT / tree)
        print(f"{tree:16}" + "".join(f"{name:>11}" for name in HELP))
        for name, room in sorted(rooms.items()):
            print(f"  {name:14}" + "".join(f"{value:11.1f}" for value in room.counts().values()))
        densest = max(room.counts()["density"] for room in rooms.values())
        homes, single = len(total.places["homes"]), len(total.places["single"])
        counts = {**total.counts(), "density": densest, "homes": homes, "single": single}
        print(f"  {'all':14}" + "".join(f"{value:11.1f}" for value in counts.values()))
        print(f"  {'ceiling':14}" + "".join(f"{ceilings[name]:11.1f}" for name in counts))
        for name, value in counts.items():
            if options.list == name or value > ceilings[name]:
                for _, place in sorted(total.places[name], reverse=True):
                    print(f"    {place}")
            if value > ceilings[name]:
                has_failed = True
                print(f"{tree}: {value:.1f} {HELP[name]}; the ceiling is {ceilings[name]}")
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
