"""What kills and other faults do: python tests/stress/faults.py --kills 200 --out faults.json.

Every job runs once undisturbed. Then it is killed (SIGKILL) at random moments and started again, until it ends; what it
leaves is compared with that of the undisturbed one, bit for bit. So is what it leaves after an attempt on a full disk,
in a read-only folder, and beside another process that does the same. Prints tables in Markdown; --out gets them as
JSON. The jobs are small and run in forks of this process, so that kills meet the work and not the imports.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import datasets  # noqa: F401 - imported here and below for the forks
import lancedb  # noqa: F401
import pandas  # type: ignore[import-untyped]  # noqa: F401
import sklearn.linear_model  # noqa: F401
import torch
import torch._dynamo  # optimisers import it
from fault_attempts import Around, Attempt, Ended, Kill, on_small_disk, read_only, why_not_mounted
from fault_work import Found, Work, evaluating, indexing, preparing, training_work, write_images

import bridgetower.inference.predictor
import bridgetower.search.build
import bridgetower.training.run  # noqa: F401
from bridgetower.files import write_json

PLAIN = ("prepare", "train", "index", "evaluate")  # jobs that other faults befall
JOBS = (*PLAIN, "train-async", "train-two")
IN_A_ROW = 12  # kills of one output, after which it is left to end


@dataclass
class Kills:
    """What kills did to a job.

    Attributes:
        what: The job.
        kills: That met a living process.
        resumed: After which the next attempt went on, without an error.
        unit: Of what may be lost.
        most_lost: By one kill.
        allowed: To be lost by one kill.
        beyond: Kills that lost more.
        ends: Outputs that were completed.
        equal: Of these, how many have the bits of the undisturbed one.
        errors: What failed attempts said last.
    """

    what: str
    unit: str
    allowed: int
    kills: int = 0
    resumed: int = 0
    most_lost: int = 0
    beyond: int = 0
    ends: int = 0
    equal: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fault:
    """What another fault did to a job.

    Attributes:
        what: The job.
        fault: And what befell it.
        seen: How it ended: refused with one line, done, or otherwise.
        equal: Whether the same command then leaves the bits of the undisturbed one; None if it was not run.
    """

    what: str
    fault: str
    seen: str
    equal: bool | None


@dataclass(frozen=True)
class Job:
    """A job with what it leaves when nothing disturbs it.

    Attributes:
        work: The job.
        folder: For outputs.
        result: Of the undisturbed one.
        seconds: It took.
    """

    work: Work
    folder: Path
    result: Found
    seconds: float

    @classmethod
    def undisturbed(cls, work: Work, folder: Path) -> Job:
        """Runs it once."""
        folder.mkdir()
        ended = _attempt(work, folder / "whole")
        if not ended.done:
            raise RuntimeError(f"{work.name} fails undisturbed: {ended.said[-2000:]}")
        return cls(work, folder, work.result(folder / "whole"), ended.seconds)

    def is_equal(self, out: Path) -> bool:
        """Whether an output is that of the undisturbed one."""
        return self.work.result(out) == self.result


def kill_often(job: Job, kills: int, source: random.Random) -> Kills:
    """Kills a job so many times, and compares every output in the end."""
    work = job.work
    row = Kills(work.name, work.unit, work.allowed)
    while row.kills < kills:
        out = job.folder / f"killed-{row.ends}"
        before = None
        for _ in range(IN_A_ROW):
            processes = range(work.processes)
            kill = Kill(
                source.uniform(0, job.seconds),
                source.sample(processes, source.randint(1, work.processes)),
            )
            ended = _attempt(work, out, kill)
            before = _note(row, work, out, ended, before)
            if ended.done or row.kills == kills:
                break
        if not ended.done:
            ended = _attempt(work, out)
            _note(row, work, out, ended, before)
        row.ends += 1
        row.equal += job.is_equal(out)
    return row


def fill_disk(job: Job) -> Fault:
    """Runs a job on a disk without enough room, then the same command where there is room."""
    disk = job.folder / "disk"
    outside = job.folder / "full"
    disk.mkdir()
    around = partial(on_small_disk, disk, job.work.kib, outside)
    ended = _attempt(job.work, disk / "out", around=around)
    return _repeated(job, f"full disk ({job.work.kib} KiB)", _said(ended), outside / "out")


def refuse_writing(job: Job) -> Fault:
    """Runs a job in a folder that cannot be written to, then the same command where it can."""
    folder = job.folder / "read-only"
    folder.mkdir()
    ended = _attempt(job.work, folder / "out", around=partial(read_only, folder))
    return _repeated(job, "read-only folder", _said(ended), folder / "out")


def write_twice(job: Job) -> Fault:
    """Runs a job in two processes at once, then again."""
    out = job.folder / "twice"
    attempts = [_start(job.work, out, log) for log in ("one", "other")]
    seen = sorted(_said(attempt.end()) for attempt in attempts)
    return _repeated(job, "two writers", " and ".join(seen), out)


def _said(ended: Ended) -> str:
    return "done" if ended.done else "refused" if ended.refused else f"failed: {ended.said[-600:]}"


def _repeated(job: Job, fault: str, seen: str, out: Path) -> Fault:
    """Runs a command again, undisturbed."""
    ended = _attempt(job.work, out)
    return Fault(job.work.name, fault, seen, ended.done and job.is_equal(out))


FAULTS: dict[str, Callable[[Job], Fault]] = {
    "full disk": fill_disk,
    "read-only folder": refuse_writing,
    "two writers": write_twice,
}


def other_faults(job: Job) -> list[Fault]:
    """Tries all other faults. Those that need a file system of its own only where one can be mounted."""
    reason = why_not_mounted()
    unmounted = [] if reason is None else ["full disk", "read-only folder"]
    not_run = [Fault(job.work.name, name, f"not run: {reason}", None) for name in unmounted]
    return not_run + [fault(job) for name, fault in FAULTS.items() if name not in unmounted]


def _start(work: Work, out: Path, name: str, around: Callable[[], Around] = nullcontext) -> Attempt:
    out.parent.mkdir(exist_ok=True)
    log = out.parent.parent / f"{out.parent.name}-{name}.log"
    return Attempt(work.command(out), log, processes=work.processes, around=around)


def _attempt(
    work: Work, out: Path, kill: Kill | None = None, around: Callable[[], Around] = nullcontext
) -> Ended:
    return _start(work, out, out.name, around).end(kill)


def _note(row: Kills, work: Work, out: Path, ended: Ended, before: Found | None) -> Found | None:
    """Counts what an attempt shows about the kill before it, and its own kill. Returns what is safe now."""
    content = work.found(out)
    if before is not None:
        lost = work.lost(before, content)
        row.most_lost = max(row.most_lost, lost)
        row.beyond += lost > work.allowed
        row.resumed += ended.done or ended.killed
    row.kills += ended.killed
    if not (ended.done or ended.killed):
        row.errors.append(ended.said[-600:])
    return content if ended.killed else None


def markdown_table(rows: Sequence[Sequence[object]], *names: str) -> str:
    """Returns a table in Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def table_of_kills(kills: Sequence[Kills]) -> str:
    """Returns a row for each job, and their sum."""
    rows: list[Sequence[object]] = []
    for row in kills:
        lost = f"{row.most_lost} of {row.allowed} {row.unit}"
        rows.append(
            (row.what, row.kills, row.resumed, lost, row.beyond, f"{row.equal} of {row.ends}")
        )
    done, resumed, beyond, equal, ends = (
        sum(getattr(row, name) for row in kills)
        for name in ("kills", "resumed", "beyond", "equal", "ends")
    )
    rows.append(("all", done, resumed, "", beyond, f"{equal} of {ends}"))
    return markdown_table(
        rows, "what", "kills", "resumed", "most lost, of allowed", "lost more", "final bits equal"
    )


def table_of_faults(faults: Sequence[Fault]) -> str:
    """Returns a row for each job and fault."""
    words = {True: "yes", False: "no", None: ""}
    rows = [(row.what, row.fault, row.seen.replace("\n", " "), words[row.equal]) for row in faults]
    return markdown_table(rows, "what", "fault", "ended", "run again: bits equal")


def jobs_in(folder: Path, images: int, names: Sequence[str]) -> Iterator[Job]:
    """Runs the jobs of some names undisturbed, and those whose output they read."""
    photos = write_images(folder / "photos", images)
    prepare = Job.undisturbed(preparing(photos, folder), folder / "prepare")
    data = folder / "prepare" / "whole"
    model = folder / "train" / "whole" / "last"
    train = Job.undisturbed(training_work(data), folder / "train")
    yield from (job for name, job in (("prepare", prepare), ("train", train)) if name in names)
    other_works = {
        "train-async": training_work(data, asynchronous=True),
        "train-two": training_work(data, processes=2, asynchronous=True),
        "index": indexing(photos.parent, model, folder),
        "evaluate": evaluating(data, model),
    }
    yield from (
        Job.undisturbed(work, folder / name) for name, work in other_works.items() if name in names
    )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="over all jobs")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # of what is started anew, too: more threads add up in another order
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="lancedb fork support", category=RuntimeWarning)
    source = random.Random(options.seed)
    kills = list[Kills]()
    faults = list[Fault]()
    with tempfile.TemporaryDirectory() as folder:
        for number, job in enumerate(jobs_in(Path(folder), options.images, options.jobs)):
            share = options.kills // len(options.jobs) + (
                number < options.kills % len(options.jobs)
            )
            kills.append(kill_often(job, share, source))
            logging.info("%s", asdict(kills[-1]))
            if job.folder.name in PLAIN:
                faults += other_faults(job)
                logging.info("%s", faults[-len(FAULTS) :])
    print(table_of_kills(kills))
    print(table_of_faults(faults))
    if options.out is not None:
        rows = {"kills": list(map(asdict, kills)), "faults": list(map(asdict, faults))}
        write_json(options.out, {"seed": options.seed, **rows})


if __name__ == "__main__":
    main()
