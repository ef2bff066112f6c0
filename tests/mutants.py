"""Draws small changes of the package ("mutants"), runs the tests that cover each, prints those that survive.

    python tests/mutants.py --count 100 --seed 2026-12-03

Tests run in forks of this process, which has imported the large libraries, in a copy of the project: also the processes
that tests start import the mutant. Which test covers which line is recorded once, by test file, below `build/mutants`;
a line that has moved since is found again, and a test file that has changed is recorded anew. A draw that was
interrupted continues: verdicts are in `build/mutants/draws`.

A survivor is no proof of a hole, as some mutants change nothing that can be seen. Lines are drawn alike, then one of
the operators that apply to a line.

Neither mutmut 3.8 nor cosmic-ray 8.7 is used. mutmut puts a wrapper around every function and its mutants into one
module, which changes what this package and its libraries read: signatures that become options, sources that
`torch.export` traces, shapes in annotations; it mutates nothing outside functions, and has no draw by a seed.
cosmic-ray imports torch anew for every mutant, and does not choose tests by coverage. Their operators lack
half of these (dropped statements, swapped arguments, dropped keywords), and others are always noticed (`None` in place
of a value).
"""

from __future__ import annotations

import argparse
import ast
import atexit
import contextlib
import copy
import ctypes
import datetime
import difflib
import gc
import hashlib
import importlib
import json
import math
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = Path("src/bridgetower")

# What tests import from elsewhere and takes long. Nothing here may start a thread, which a fork would lose.
LIBRARIES = (
    *(
        "torch",
        "torch._dynamo",
        "torch._inductor.config",
        "torch.distributed.fsdp",
        "torch.export",
        "torchvision",
    ),
    *(
        "numpy",
        "pandas",
        "PIL.Image",
        "scipy.stats",
        "sklearn.linear_model",
        "sklearn.metrics",
        "matplotlib.pyplot",
    ),
    *(
        "datasets",
        "lancedb",
        "pyarrow.parquet",
        "safetensors.torch",
        "tokenizers",
        "huggingface_hub",
        "transformers",
    ),
    *(
        "fastapi",
        "granian",
        "httpx",
        "aiohttp",
        "pydantic",
        "tyro",
        "rich.progress",
        "jinja2",
        "fsspec",
    ),
    *("pytest", "_pytest.pytester", "hypothesis", "beartype", "jaxtyping", "timm", "av"),
)
UNRECORDED = ("tests/demo", "tests/gpu", "tests/pages")  # which `make test` leaves out
LEFT_OUT = (
    ".git",
    ".*venv*",
    ".*cache*",
    ".hypothesis",
    "__pycache__",
    "build",
    "dist",
    "runs",
    "*-demo",
    "*-cache",
)
START = 60  # seconds that imports and fixtures may take
CLOSEST = 20  # tests that run first, at least
CONTRACTS = "contracts"  # of the test file that compares values of all modules
PR_SET_CHILD_SUBREAPER = 36  # of Linux: processes whose parent ended become children of this one

# ------------------------------------------------------------------------------------------------------- mutations

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
BOUNDARIES = ({ast.Lt, ast.LtE}, {ast.Gt, ast.GtE})
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
OPPOSITES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "ceil": "floor",
    "floor": "ceil",
}
TYPES = {
    "Literal",
    "Annotated",
    "Callable",
    "ClassVar",
    "Optional",
    "Union",
    "Final",
    "tuple",
    "list",
    "dict",
    "type",
}
# keywords; strict is of zip
WORDING = {
    "help",
    "title",
    "description",
    "summary",
    "message",
    "stacklevel",
    "strict",
}
UNCHANGED_CALLS = {"sleep", "debug", "info", "exception", "TypeVar", "NewType", "cast"}
IDENTIFIER = re.compile(r"[\w./-]+")
STATEMENTS = (ast.Raise, ast.Return, ast.Continue, ast.Break)


@dataclass(frozen=True)
class Mutation:
    """A change of one place: bytes of a file from `start` to `end` become `text`."""

    path: str
    operator: str
    line: int
    start: int
    end: int
    text: str

    @property
    def room(self) -> str:
        segments = Path(self.path).relative_to(PACKAGE).parts
        return segments[0].removesuffix(".py")

    def mutated(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def diff(self, source: bytes) -> str:
        before = source.decode().splitlines()
        after = self.mutated(source).decode().splitlines()
        lines = list(difflib.unified_diff(before, after, lineterm="", n=2))
        return "\n".join(lines[2:])


def changed(node: ast.AST, **fields: object) -> ast.AST:
    """A copy of a node with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def without(items: list, position: int) -> list:
    return items[:position] + items[position + 1 :]


def name_of(node: ast.AST) -> str:
    """The last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def compare(node: ast.Compare) -> Iterator[tuple]:
    for position, operator in enumerate(node.ops):
        for other in COMPARISONS[type(operator)]:
            operators = [*node.ops]
            operators[position] = other()
            is_boundary = {type(operator), other} in BOUNDARIES
            yield "boundary" if is_boundary else "comparison", node, changed(node, ops=operators)


def combine(node: ast.BoolOp) -> Iterator[tuple]:
    other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
    yield "and-or", node, changed(node, op=other)
    for position in range(len(node.values)):
        remainder = without(node.values, position)
        yield (
            "dropped condition",
            node,
            changed(node, values=remainder) if len(remainder) > 1 else remainder[0],
        )


def calculate(node: ast.BinOp) -> Iterator[tuple]:
    other = ARITHMETIC.get(type(node.op))
    if other and not is_text(node.left) and not is_text(node.right):
        yield "arithmetic", node, changed(node, op=other())


def accumulate(node: ast.AugAssign) -> Iterator[tuple]:
    yield "dropped statement", node, ast.Pass()


def negate(node: ast.If | ast.While | ast.IfExp) -> Iterator[tuple]:
    if name_of(node.test) == "TYPE_CHECKING":
        return
    if not isinstance(node.test, ast.Compare | ast.UnaryOp | ast.NamedExpr):
        yield "negated condition", node.test, ast.UnaryOp(ast.Not(), node.test)
    is_guard = (
        isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], STATEMENTS)
    )
    if is_guard and not isinstance(node.test, ast.NamedExpr):
        yield "dropped guard", node, ast.Pass()


def filtered(node: ast.comprehension) -> Iterator[tuple]:
    for condition in node.ifs:
        if not isinstance(condition, ast.Compare | ast.UnaryOp):
            yield "negated condition", condition, ast.UnaryOp(ast.Not(), condition)
        yield "dropped condition", condition, ast.Constant(True)


def unary(node: ast.UnaryOp) -> Iterator[tuple]:
    if isinstance(node.op, ast.Not | ast.USub):
        yield (
            "negated condition" if isinstance(node.op, ast.Not) else "arithmetic",
            node,
            node.operand,
        )


def constant(node: ast.Constant) -> Iterator[tuple]:
    match node.value:
        case bool():
            yield "constant", node, ast.Constant(not node.value)
        case int():
            yield "constant", node, ast.Constant(node.value + 1)
            if node.value > 0:
                yield "constant", node, ast.Constant(node.value - 1)
        case float() if math.isfinite(node.value):
            yield "constant", node, ast.Constant(node.value * 2 or 1.0)
        case str() if IDENTIFIER.fullmatch(node.value):
            yield "constant", node, ast.Constant(node.value + "x")


def called(node: ast.Call) -> Iterator[tuple]:
    for position in range(len(node.args) - 1):
        first, second = node.args[position : position + 2]
        is_same = ast.dump(first) == ast.dump(second)
        if (
            not is_same
            and not isinstance(first, ast.Starred)
            and not isinstance(second, ast.Starred)
        ):
            arguments = [*node.args]
            arguments[position : position + 2] = second, first
            yield "swapped arguments", node, changed(node, args=arguments)
    for keyword in node.keywords:
        if keyword.arg and keyword.arg not in WORDING:
            yield "dropped keyword", keyword, None
    if other := OPPOSITES.get(name_of(node.func)):
        renamed = {"attr": other} if isinstance(node.func, ast.Attribute) else {"id": other}
        yield "opposite function", node.func, changed(node.func, **renamed)


def dropped(node: ast.Expr) -> Iterator[tuple]:
    value = node.value.value if isinstance(node.value, ast.Await) else node.value
    if isinstance(value, ast.Call):
        yield "dropped statement", node, ast.Pass()


def sliced(node: ast.Slice) -> Iterator[tuple]:
    for side in ("lower", "upper"):
        if getattr(node, side) is not None:
            yield "dropped bound", node, changed(node, **{side: None})


def jump(node: ast.Break | ast.Continue) -> Iterator[tuple]:
    yield "jump", node, ast.Continue() if isinstance(node, ast.Break) else ast.Break()


OPERATORS: dict[type, Callable] = {
    ast.Compare: compare,
    ast.BoolOp: combine,
    ast.BinOp: calculate,
    ast.AugAssign: accumulate,
    ast.If: negate,
    ast.While: negate,
    ast.IfExp: negate,
    ast.comprehension: filtered,
    ast.UnaryOp: unary,
    ast.Constant: constant,
    ast.Call: called,
    ast.Expr: dropped,
    ast.Slice: sliced,
    ast.Break: jump,
    ast.Continue: jump,
}


def children(node: ast.AST) -> Iterator[ast.AST]:
    """Children of a node but for types, wording and imports, in which a change changes nothing that runs."""
    left_out: set[str] = set()
    match node:
        case ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.Raise() | ast.Assert():
            return
        case ast.Expr(value=ast.Constant()) | ast.Assign(targets=[ast.Name(id="__all__")]):
            return
        case ast.If(test=test) if name_of(test) == "TYPE_CHECKING":
            return
        case ast.Subscript(value=value) if name_of(value) in TYPES:
            return
        case ast.Call(func=function) if name_of(function) in UNCHANGED_CALLS:
            return
        case ast.keyword(arg=name) if name in WORDING:
            return
        case ast.ClassDef():
            left_out = {"bases", "keywords", "decorator_list"}
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            left_out = {"returns"}
        case ast.arg() | ast.AnnAssign():
            left_out = {"annotation"}
    for field, value in ast.iter_fields(node):
        if field not in left_out:
            children = value if isinstance(value, list) else [value]
            yield from (child for child in children if isinstance(child, ast.AST))


def is_unchanged(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Expr) else node
    return isinstance(call, ast.Call) and name_of(call.func) in UNCHANGED_CALLS


def mutations(path: str, source: bytes) -> list[Mutation]:
    """Every mutation of a module, in its order."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    mutations = set()
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        nodes.extend(children(node))
        if type(node) not in OPERATORS or is_unchanged(node):
            continue
        for operator, target, replacement in OPERATORS[type(node)](node):
            start = starts[target.lineno - 1] + target.col_offset
            end = starts[target.end_lineno - 1] + target.end_col_offset
            if source.startswith(b"elif", start):
                continue
            text = ast.unparse(replacement) if replacement else ""
            if isinstance(replacement, ast.BoolOp | ast.Compare | ast.BinOp | ast.UnaryOp):
                text = f"({text})"
            if replacement is None:  # of an argument, with its comma
                end = re.compile(rb"(\s*,\s*)?").match(source, end).end()
            mutations.add(Mutation(path, operator, target.lineno, start, end, text))
    return sorted(
        mutations,
        key=lambda mutation: (mutation.start, mutation.end, mutation.operator, mutation.text),
    )


def is_real(mutation: Mutation, source: bytes) -> bool:
    """Whether what it makes is Python, and another program."""
    try:
        return ast.dump(ast.parse(mutation.mutated(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def draw(root: Path, count: int, seed: str, only: tuple[str, ...] = ()) -> list[Mutation]:
    """Mutations of as many lines. The same seed and code give the same."""
    generator = random.Random(seed)
    by_line = defaultdict(list)
    for file in sorted((root / PACKAGE).rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if not only or any(prefix in path for prefix in only):
            for mutation in mutations(path, file.read_bytes()):
                by_line[path, mutation.line].append(mutation)
    lines = list(by_line.values())
    generator.shuffle(lines)
    drawn: list[Mutation] = []
    for choices in lines:
        if len(drawn) == count:
            break
        operator = generator.choice(sorted({mutation.operator for mutation in choices}))
        mutation = generator.choice(
            [mutation for mutation in choices if mutation.operator == operator]
        )
        if is_real(mutation, (root / mutation.path).read_bytes()):
            drawn.append(mutation)
    return drawn


# ------------------------------------------------------------------------------------------- tests in forked processes


class Events:
    """A plugin of pytest: what each test took, which failed first, and the coverage of each test and wide fixture."""

    def __init__(self, coverage: object = None):
        self.coverage = coverage
        self.tests: dict[str, dict] = {}
        self.failed: list[str] = []
        self.reason = ""
        self.running = ""

    def context(self, name: str) -> None:
        if self.coverage is not None:
            self.coverage.switch_context(name)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid
        self.context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self.context("")

    def pytest_runtest_setup(self, item) -> None:
        self.tests[item.nodeid] = {
            "seconds": 0.0,
            "fixtures": list(item.fixturenames),
            "passed": False,
        }

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.fail(report)
        elif report.when == "call" and report.passed:
            self.tests[report.nodeid]["passed"] = True
        if report.nodeid in self.tests:
            self.tests[report.nodeid]["seconds"] += report.duration

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.fail(report)

    def fail(self, report) -> None:
        self.failed.append(report.nodeid)
        lines = report.longreprtext.splitlines() or [""]
        self.reason = (
            self.reason or next((line for line in lines if line.startswith("E ")), lines[-1])[:300]
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope == "function":
            return (yield)
        self.context(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self.context(self.running)


@dataclass(frozen=True)
class Workplace:
    """A copy of the project that one process changes and tests at a time."""

    folder: Path

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    @property
    def temporary(self) -> Path:
        return self.folder / "t"

    @classmethod
    def made(cls, folder: Path) -> Workplace:
        shutil.copytree(
            ROOT, folder / "tree", symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT)
        )
        compile_all = ["-m", "compileall", "-q", "src", "demo", "tests"]
        subprocess.run(
            [sys.executable, *compile_all],
            check=False,
            cwd=folder / "tree",
            stdout=subprocess.DEVNULL,
        )
        return cls(folder)

    def pytest(self, arguments: list[str], limit: float, recording: Path | None = None) -> dict:
        """Runs pytest in a fork of this process. Returns its status (None after the time limit) and its events."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        outcome = self.folder / "outcome.json"
        outcome.unlink(missing_ok=True)
        (self.folder / "log.txt").write_text("")
        started = time.monotonic()
        child = os.fork()
        if not child:
            self._run(arguments, outcome, recording)
        ended = os.pidfd_open(child)
        in_time = False
        try:
            in_time = bool(select.select([ended], [], [], limit)[0])
        finally:
            os.close(ended)
            end_descendants(child)
        shutil.rmtree(self.temporary, ignore_errors=True)
        result = {
            "status": 3 if in_time else None,
            "reason": (self.folder / "log.txt").read_text()[-300:],
        }
        if in_time and outcome.exists():
            result |= json.loads(outcome.read_text())
        return {"tests": {}, "failed": [], **result, "seconds": time.monotonic() - started}

    def _run(self, arguments: list[str], outcome: Path, recording: Path | None) -> None:
        """Runs pytest in this process, writes its events, and ends it as Python would."""
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, stream in enumerate((nothing, log, log)):
            os.dup2(stream, number)
        os.chdir(self.tree)
        paths = [str(self.tree / "src"), str(self.tree / "demo")]
        inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        os.environ.update(
            PYTHONPATH=os.pathsep.join([*paths, *elsewhere(inherited)]),
            PYTHONDONTWRITEBYTECODE="1",
            OMP_NUM_THREADS="1",
        )
        sys.dont_write_bytecode = True
        sys.path[:] = [*paths, *elsewhere(sys.path)]
        status = 3
        try:
            coverage = started_coverage(self.tree, recording) if recording else None
            status, events = run_pytest([*arguments, "--basetemp", str(self.temporary)], coverage)
            if coverage is not None:
                coverage.stop()
                coverage.save()
            where = getattr(sys.modules.get("bridgetower"), "__file__", str(self.tree))
            if not Path(where).is_relative_to(self.tree):
                events.reason = f"the package of {where} was tested"
                status = 3
            content = {
                "status": int(status),
                "tests": events.tests,
                "failed": events.failed,
                "reason": events.reason,
            }
            outcome.with_suffix(".part").write_text(json.dumps(content))
            outcome.with_suffix(".part").rename(outcome)
            atexit._run_exitfuncs()
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(status))


def elsewhere(paths: Iterable[str]) -> list[str]:
    """The paths outside the project's own code: its virtual environment may lie below its folder."""
    code = (ROOT, ROOT / "src", ROOT / "demo", ROOT / "tests", ROOT / "tools")
    return [path for path in paths if Path(path).resolve() not in code]


def run_pytest(arguments: list[str], coverage: object = None) -> tuple[int, Events]:
    events = Events(coverage)
    usual = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--color=no", "--tb=short"]
    usual += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins among the libraries
    return pytest.main([*usual, *arguments], plugins=[events]), events


def end_descendants(child: int) -> None:
    """Ends a child and all that it started: this process adopts those whose parents have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    while True:
        started = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for process in started:
            os.kill(int(process), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# --------------------------------------------------------------------------------------------- which tests cover what


def started_coverage(tree: Path, folder: Path):
    """Records into a folder what this process and those that it starts run of the package."""
    import coverage

    settings = folder / "coveragerc"
    settings.write_text(
        "[run]\nparallel = true\npatch = subprocess, fork, _exit\nsigterm = true\n"
        f"source = {tree / PACKAGE}\ndata_file = {folder / 'coverage'}\n"
    )
    recorder = coverage.Coverage(config_file=str(settings), messages=False)
    recorder.start()
    return recorder


def lines_by_context(tree: Path, folder: Path) -> dict[str, dict[str, list[int]]]:
    """For each file and test or fixture the lines that it runs. `*` are those of other processes."""
    import coverage

    lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for file in folder.glob("coverage.*"):
        data = coverage.CoverageData(str(file))
        try:
            data.read()
        except coverage.exceptions.CoverageException:
            continue  # of a process that was killed
        is_main = bool(data.measured_contexts() - {""})
        for path in data.measured_files():
            name = Path(path).relative_to(tree).as_posix()
            for line, contexts in data.contexts_by_lineno(path).items():
                for context in contexts:
                    if context or not is_main:  # else while modules are imported
                        lines[name][context or "*"].add(line)
    return {
        name: {context: sorted(numbers) for context, numbers in contexts.items()}
        for name, contexts in lines.items()
    }


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class Recordings:
    """What each test file covers, in a folder: a file of JSON for each, and the sources that their lines are of."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "sources").mkdir(parents=True, exist_ok=True)

    def file(self, test_file: str) -> Path:
        return self.folder / (test_file.replace("/", "+") + ".json")

    def missing(self, days: float) -> list[str]:
        """Test files that have no recording, or an old one, or have changed since."""
        missing = []
        for file in sorted((ROOT / "tests").rglob("test_*.py")):
            name = file.relative_to(ROOT).as_posix()
            recorded = self.file(name)
            is_fresh = recorded.exists() and time.time() - recorded.stat().st_mtime < days * 86400
            is_fresh = is_fresh and json.loads(recorded.read_bytes())["digest"] == digest(
                file.read_bytes()
            )
            if not is_fresh and not name.startswith(UNRECORDED):
                missing.append(name)
        return missing

    def record(self, workplace: Workplace, test_file: str, limit: float) -> str:
        folder = workplace.folder / "recording"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        outcome = workplace.pytest([test_file], limit, folder)
        lines = lines_by_context(workplace.tree, folder)
        sources = {}
        for name in lines:
            content = (workplace.tree / name).read_bytes()
            sources[name] = digest(content)
            (self.folder / "sources" / sources[name]).write_bytes(content)
        content = {
            "digest": digest((workplace.tree / test_file).read_bytes()),
            "status": outcome["status"],
            "tests": outcome["tests"],
            "sources": sources,
            "lines": lines,
        }
        if outcome["status"] in (0, 1, 5):  # passed, some failed, none there
            partial = self.file(test_file).with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(content))
            partial.rename(self.file(test_file))
        passed = sum(test["passed"] for test in outcome["tests"].values())
        reason = f" {outcome['reason']}" if outcome["status"] else ""
        return f"{test_file}: {passed} tests in {outcome['seconds']:.0f} s{reason}"


@dataclass
class Coverage:
    """The tests that passed, and which of them run a line."""

    seconds: dict[str, float]
    breadth: Counter[str]  # lines that a test runs
    by_line: dict[str, dict[int, set[str]]]  # by file, in today's lines

    @classmethod
    def read(cls, recordings: Recordings, root: Path) -> Coverage:
        seconds: dict[str, float] = {}
        breadth: Counter[str] = Counter()
        by_line: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for file in sorted(recordings.folder.glob("*.json")):
            recorded = json.loads(file.read_bytes())
            tests = {name: test for name, test in recorded["tests"].items() if test["passed"]}
            seconds.update({name: test["seconds"] for name, test in tests.items()})
            users = defaultdict(set)
            for name, test in tests.items():
                users[name].add(name)
                users["*"].add(name)
                for fixture in test["fixtures"]:
                    users[f"fixture {fixture}"].add(name)
            for path, contexts in recorded["lines"].items():
                if not (root / path).exists():
                    continue
                moved = moved_lines(
                    recordings.folder / "sources" / recorded["sources"][path], root / path
                )
                for context, lines in contexts.items():
                    for line in filter(None, map(moved.get, lines)):
                        by_line[path][line] |= users[context]
                    breadth.update({name: len(lines) for name in users[context] if context == name})
        return cls(seconds, breadth, by_line)

    def of(self, mutation: Mutation, root: Path) -> list[str]:
        """The tests that run what a mutation changes, the closest first."""
        source = (root / mutation.path).read_bytes()
        tests: set[str] = set()
        for path, lines in lines_to_cover(mutation, source, root):
            tests = tests.union(*(self.by_line[path].get(line, ()) for line in lines))
            if tests:
                break
        if function_of(source, mutation.line) is None:  # what an import computes is read in no line
            tests |= {test for test in self.seconds if distance(mutation, test) < 2}
        if not tests:  # nothing runs it: tests whose files name the module
            module = Path(mutation.path).stem
            files = {test.partition("::")[0] for test in self.seconds}
            files = {file for file in files if module in (root / file).read_text(encoding="utf-8")}
            tests = {test for test in self.seconds if test.partition("::")[0] in files}
        return sorted(tests, key=lambda test: (distance(mutation, test), self.breadth[test], test))


def distance(mutation: Mutation, test: str) -> int:
    file = Path(test.partition("::")[0])
    if file.stem.removeprefix("test_") in (Path(mutation.path).stem, CONTRACTS):
        return 0
    return 1 if mutation.room in (file.parent.name, file.stem.removeprefix("test_")) else 2


@cache
def moved_lines(before: Path, after: Path) -> dict[int, int]:
    """Where the lines of an earlier version of a file are now."""
    old = before.read_text(encoding="utf-8").splitlines()
    new = after.read_text(encoding="utf-8").splitlines()
    if old == new:
        return {line: line for line in range(1, len(new) + 1)}
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return {
        block.a + offset + 1: block.b + offset + 1
        for block in blocks
        for offset in range(block.size)
    }


def lines_to_cover(
    mutation: Mutation, source: bytes, root: Path
) -> Iterator[tuple[str, range | list[int]]]:
    """Lines whose tests a mutation concerns, the best first.

    What runs while a module is imported concerns the tests of the functions that it belongs to, or that use its name.
    """
    around = [node for node in ast.walk(ast.parse(source)) if spans(node, mutation.line)]
    function = function_of(source, mutation.line)
    if function is not None:
        if mutation.line >= function.body[0].lineno:
            statements = [node for node in around if isinstance(node, ast.stmt)]
            smallest = min(statements, key=lambda node: node.end_lineno - node.lineno)
            yield mutation.path, [mutation.line]
            yield mutation.path, range(smallest.lineno, smallest.end_lineno + 1)
        yield mutation.path, range(function.body[0].lineno, function.end_lineno + 1)
        return
    names = {node.id for node in around if isinstance(node, ast.Name)} | bound_names(around)
    for path in sorted(
        (root / PACKAGE).rglob("*.py"), key=lambda path: path != root / mutation.path
    ):
        relative = path.relative_to(root).as_posix()
        if lines := [
            line for line in lines_that_name(path, frozenset(names)) if line != mutation.line
        ]:
            yield relative, lines
    classes = [node for node in around if isinstance(node, ast.ClassDef)]
    if classes:
        yield mutation.path, range(classes[-1].lineno, classes[-1].end_lineno + 1)


def function_of(source: bytes, line: int) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The innermost function with a line."""
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and spans(node, line)
    ]
    return max(functions, key=lambda node: node.lineno, default=None)


def spans(node: ast.AST, line: int) -> bool:
    return hasattr(node, "end_lineno") and node.lineno <= line <= node.end_lineno


def bound_names(nodes: list[ast.AST]) -> set[str]:
    targets = []
    for node in nodes:
        targets += (
            [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        )
    return {
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    }


@cache
def lines_that_name(path: Path, names: frozenset[str]) -> list[int]:
    """Lines in functions of a module that use one of some names, as a variable or an attribute."""
    lines = set()
    for function in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            body = (node for statement in function.body for node in ast.walk(statement))
            lines |= {node.lineno for node in body if name_of(node) in names}
    return sorted(lines)


# ------------------------------------------------------------------------------------------------------------ verdicts


def judged(
    workplace: Workplace,
    mutation: Mutation,
    tests: list[str],
    seconds: dict[str, float],
    most: float,
) -> dict:
    """Runs the tests that cover a mutation: the closest, then as many of the others as take `most` seconds."""
    file = workplace.tree / mutation.path
    source = file.read_bytes()
    verdict = {"verdict": "survived", "tests": 0, "failed": "", "reason": "", "seconds": 0.0}
    # Those of the file with the module's name, of which `within` would take few.
    closest = max(CLOSEST, sum(not distance(mutation, test) for test in tests))
    for stage in (tests[:closest], within(tests[closest:], seconds, most)):
        if not stage:
            continue
        limit = START + 8 * sum(seconds[test] for test in stage)
        try:
            file.write_bytes(mutation.mutated(source))
            for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
                compiled.unlink()
            outcome = workplace.pytest(["-x", *stage], limit)
        finally:
            file.write_bytes(source)
        verdict["tests"] += len(stage)
        verdict["seconds"] = round(verdict["seconds"] + outcome["seconds"], 1)
        if outcome["status"] == 0:
            continue
        verdict["failed"] = (outcome["failed"] or [""])[0]
        verdict["reason"] = outcome["reason"]
        # The same tests must pass in time without the mutation: those that failed, else all.
        is_test = verdict["failed"] in seconds
        control = workplace.pytest([verdict["failed"]] if is_test else ["-x", *stage], limit)
        is_sound = control["status"] == 0 and control["seconds"] < (
            limit if outcome["failed"] else limit / 2
        )
        kind = "timed out" if outcome["status"] is None else "killed"
        verdict["verdict"] = kind if is_sound else "unclear"
        if is_sound:
            break
    return verdict


def within(tests: list[str], seconds: dict[str, float], most: float) -> list[str]:
    """The first tests of each file in turn, as long as they take less than `most` seconds."""
    by_file = defaultdict(list)
    for test in tests:
        by_file[test.partition("::")[0]].append(test)
    nearest_tests = []
    for turn in zip_longest(*by_file.values()):
        for test in filter(None, turn):
            most -= seconds[test]
            if most < 0:
                return nearest_tests
            nearest_tests.append(test)
    return nearest_tests


def in_processes(jobs: int, number: int, work: Callable[[Workplace, int], str]) -> None:
    """Calls `work` for each number, in forks that each have a copy of the project, and prints what it returns."""
    queue, tasks = os.pipe()
    folder = Path(tempfile.mkdtemp(prefix="m-"))  # short: sockets lie there
    processes = []
    try:
        for position in range(min(jobs, number)):
            workplace = Workplace.made(folder / str(position))
            processes.append(process := os.fork())
            if not process:
                os.close(tasks)
                work_off(queue, lambda task, workplace=workplace: work(workplace, task))
        for task in range(number):
            os.write(tasks, task.to_bytes(4, "big"))
        os.close(tasks)
        statuses = [os.waitpid(process, 0)[1] for process in processes]
    except BaseException:
        for process in processes:
            os.kill(process, signal.SIGTERM)
        raise
    finally:
        os.close(queue)
        shutil.rmtree(folder, ignore_errors=True)
    if any(statuses):
        sys.exit("a process that ran tests has ended with an error")


def work_off(queue: int, work: Callable[[int], str]) -> None:
    """Takes numbers from a pipe until it is closed, and ends this process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    try:
        while task := os.read(queue, 4):
            print(work(int.from_bytes(task, "big")), file=sys.stderr, flush=True)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        os._exit(1)
    finally:
        os._exit(0)


def preload() -> None:
    for name in LIBRARIES:
        with contextlib.suppress(ImportError), warnings.catch_warnings(action="ignore"):
            importlib.import_module(name)
    assert "bridgetower" not in sys.modules
    gc.collect()
    gc.freeze()


def report(verdicts: list[dict]) -> str:
    """A table by room, and what survived."""
    kinds = ("killed", "timed out", "survived", "unclear")
    counts = defaultdict(Counter)
    for verdict in verdicts:
        counts[verdict["room"]][verdict["verdict"]] += 1
        counts["all"][verdict["verdict"]] += 1
    lines = [f"{'room':<14}" + "".join(f"{kind:>11}" for kind in kinds)]
    rooms = [*sorted(counts.keys() - {"all"}), "all"]
    lines += [
        f"{room:<14}" + "".join(f"{counts[room][kind]:>11}" for kind in kinds) for room in rooms
    ]
    for verdict in verdicts:
        if verdict["verdict"] in ("survived", "unclear"):
            location = f"{verdict['path']}:{verdict['line']}"
            failure = (
                f" ({verdict['failed']}: {verdict['reason']})"
                if verdict["verdict"] == "unclear"
                else ""
            )
            lines.append(
                f"\n{verdict['verdict']}: {location} {verdict['operator']}, {verdict['tests']} tests{failure}"
            )
            lines.append(verdict["diff"])
    caught = counts["all"]["killed"] + counts["all"]["timed out"]
    if judgements := caught + counts["all"]["survived"]:
        lines.append(f"\n{caught} of {judgements} were noticed: {caught / judgements:.1%}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="mutants to draw")
    parser.add_argument(
        "--seed",
        default=str(datetime.date.today()),
        help="what the draw depends on beside the code",
    )
    parser.add_argument(
        "--only", nargs="*", default=(), help="parts of paths of the files to draw from"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that run tests")
    parser.add_argument(
        "--limit",
        type=float,
        default=500,
        help="seconds of tests a mutant, beyond the closest tests",
    )
    parser.add_argument(
        "--days", type=float, default=30, help="days after which coverage is recorded anew"
    )
    parser.add_argument(
        "--record",
        nargs="*",
        metavar="PART",
        help="record these test files, or all, and draw nothing",
    )
    parser.add_argument(
        "--as-recorded",
        action="store_true",
        help="record nothing, even where test files have changed",
    )
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON lines")
    options = parser.parse_args(arguments)
    recordings = Recordings(ROOT / "build/mutants/coverage")
    # removes the copies of the project
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    preload()

    missing = [] if options.as_recorded else recordings.missing(options.days)
    if options.record:
        missing = [name for name in missing if any(prefix in name for prefix in options.record)]
    in_processes(
        options.jobs,
        len(missing),
        lambda workplace, n: recordings.record(workplace, missing[n], 3600),
    )
    if options.record is not None:
        return

    draws = ROOT / "build/mutants/draws"
    draws.mkdir(exist_ok=True)
    name = "-".join([options.seed, *(prefix.replace("/", "+") for prefix in options.only)])
    file = draws / f"{name}.jsonl"
    drawn = draw(ROOT, options.count, options.seed, tuple(options.only))
    done = {}
    if file.exists():
        done = {
            verdict["key"]: verdict for verdict in map(json.loads, file.read_text().splitlines())
        }
    keys = {mutation: digest(json.dumps(asdict(mutation)).encode()) for mutation in drawn}
    pending = [mutation for mutation in drawn if keys[mutation] not in done]
    coverage = Coverage.read(recordings, ROOT)

    def judge(workplace: Workplace, number: int) -> str:
        mutation = pending[number]
        tests = coverage.of(mutation, ROOT)
        diff = mutation.diff((ROOT / mutation.path).read_bytes())
        verdict = judged(workplace, mutation, tests, coverage.seconds, options.limit)
        whole = {
            "key": keys[mutation],
            **asdict(mutation),
            "room": mutation.room,
            "diff": diff,
            **verdict,
        }
        with file.open("a") as stream:
            stream.write(json.dumps(whole) + "\n")
        failure = f" by {verdict['failed']}" if verdict["failed"] else ""
        where = f"{mutation.path}:{mutation.line} {mutation.operator}"
        return f"{where}: {verdict['verdict']}{failure}, {verdict['seconds']} s"

    in_processes(options.jobs, len(pending), judge)
    done = {verdict["key"]: verdict for verdict in map(json.loads, file.read_text().splitlines())}
    verdicts = [done[keys[mutation]] for mutation in drawn if keys[mutation] in done]
    print("\n".join(map(json.dumps, verdicts)) if options.json else report(verdicts))


if __name__ == "__main__":
    main()
