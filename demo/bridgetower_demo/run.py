"""The main job end to end: prepare images, pre-train, fine-tune, evaluate, report, index."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bridgetower.data.batches.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.data.sets.prepared_set import PreparedSet
from bridgetower.data.sets.schema import VQA
from bridgetower.data.sets.store import Table
from bridgetower.evaluation.masked_words import evaluate_masked_words
from bridgetower.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from bridgetower.files import locked, read_json, write_bytes, write_json, write_text
from bridgetower.inference.predictor import Predictor, load
from bridgetower.model.cpu import processor_name
from bridgetower.objectives.config import PretrainingConfig
from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import Index
from bridgetower.tasks.run_config import RunConfig
from bridgetower_demo.costs import model_cost
from bridgetower_demo.examples import (
    AnswerExample,
    SearchExample,
    answer_examples,
    search_examples,
    spread_evenly,
)
from bridgetower_demo.folder import (
    ANSWERS,
    answering_model,
    held_out_images,
    held_out_index,
    run_folder,
    trained_model,
)
from bridgetower_demo.grounding import Judged, judge
from bridgetower_demo.parallel import train_all
from bridgetower_demo.plan import MINUTES, ON_TOWERS, Plan, Stage, scaled
from bridgetower_demo.recipes import RECIPES
from bridgetower_demo.report import render_report
from bridgetower_demo.results import ARMS, Arm, DemoAnswers, DemoDataset, DemoResults, DemoRun
from bridgetower_demo.starter import TEXT, VISION, starter_towers
from bridgetower_demo.toysets import TOYSETS, prepare_toyset
from bridgetower_demo.toysets.scenes import ScenesConfig


def write_held_out(datasets: Mapping[str, Path], folder: Path, split: str = "test") -> None:
    """Writes the images of a split of data sets as files, each with a text file of its captions beside it.

    A file that is there with the same content is left as it is, so that its time stays.

    Args:
        datasets: Prepared folders by name; each gets a folder of that name.
        folder: Where to write.
        split: Of each set.
    """
    for name, dataset in datasets.items():
        captions: dict[int, list[str]] = {}
        held_out = PreparedSet(dataset, [split])
        for row in held_out.scan():
            captions.setdefault(row["images"][0], []).append(row["entry"])
        names, contents = held_out.image_names(list(captions)), held_out.images(list(captions))
        for file, content, texts in zip(names, contents, captions.values(), strict=True):
            image = folder / name / Path(file).name
            _write(image, content)
            _write(image.with_suffix(".txt"), "".join(f"{caption}\n" for caption in texts).encode())


def index_held_out(folder: Path, uri: Path, predictor: Predictor) -> None:
    """Brings the index of held-out images up to date; one of another model, such as of an earlier demo, is replaced.

    Args:
        folder: From `write_held_out`.
        uri: The index.
        predictor: The model.
    """
    if Table.exists(uri) and Index(uri).info.fingerprint != predictor.fingerprint:
        shutil.rmtree(uri)
    build_index(folder, uri, predictor, IndexConfig(num_workers=0))


def _write(path: Path, content: bytes) -> None:
    if not (path.exists() and path.read_bytes() == content):
        write_bytes(path, content)


_EXAMPLES = 2  # of either kind per topic
_STATES = 6  # that each training saves on its way
_TEXT_LENGTH = 16  # tokens of the pair whose cost is measured
_SETTINGS = "demo.json"  # and the times
_SEARCHES, _IMAGES = 4, 8  # examples per test


def questions_folder(out: Path, plan: Plan) -> Path:
    """Folder of the questions."""
    return out / "data" / plan.questions.toyset


def _judged_answers(out: Path, plan: Plan, arm: Arm, seed: int) -> Judged:
    """Answers the test questions with the last checkpoint."""
    predictor = load(answering_model(out, arm, seed), device="cpu")
    return judge(predictor, "vqa", questions_folder(out, plan))


def _question_examples(folder: Path, judged: Judged) -> list[AnswerExample]:
    """Returns questions of the test split with their images and answers."""
    questions = PreparedSet(folder, ["test"], VQA)
    return answer_examples(judged, questions.images(questions.groups.tolist()), count=_EXAMPLES)


def _drawn_scenes(count: int) -> list[bytes]:
    """Returns images of generated scenes, for trying models that answer questions about these."""
    records = (
        TOYSETS["scenes"]
        .collect(ScenesConfig(num_train=1, num_validation=1, num_test=count))
        .splits["test"]
    )
    return [record.images[0].content for record in records]


def run_demo(
    out: Path,
    *,
    plan: Plan = ON_TOWERS,
    arms: Sequence[Arm] = ARMS[:1],
    minutes: float = MINUTES,
    seeds: int = 1,
    progress: bool = True,
) -> DemoResults:
    """Trains BridgeTower on emoji and flags, tests it and reports; continues where it was cut off.

    `ON_TOWERS`, it starts from two small pre-trained towers, which stay frozen: first the contrastive head learns,
    then the fusion encoder with the matching head, then the answers to questions about flags. `FROM_SCRATCH`, a nano
    model learns all at once, and another the answers to questions about generated scenes.

    The folder gets `data/`, `runs/ARM-SEED/`, `runs/ARM-SEED-STAGE/`, `images/` (some held-out ones), `held-out/`
    (all held-out ones) and `held-out.lance`, an index of these, `results.json`, `report.html` and `demo.json`, the
    settings and the time that calls have taken so far; on towers also `towers/`. Of a finished training only the last
    checkpoint stays, the one that is tested.

    Args:
        out: Folder for everything.
        plan: What is trained, and how.
        arms: Models that are trained, `bridgetower` among them; a later call may add `meter`.
        minutes: Scales the number of training steps: about this long for one seed on 2 cores.
        seeds: Trainings of each model; more give a spread.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: The packages of the `demo` extra are missing.
        FileExistsError: Another process works in `out`.
        OSError: The towers cannot be downloaded.
        ValueError: `minutes` or `seeds` is not positive, or `out` holds a demo with other settings.
        Interrupted: A signal asked the trainings to stop; the same call continues them.
        LostProcessError: The process of a training was killed; the same call continues it.
    """
    if minutes <= 0 or seeds < 1:
        raise ValueError(
            f"minutes {minutes}, seeds {seeds}; expected more than 0 minutes and at least 1 seed"
        )
    settings = {"minutes": minutes, "seeds": seeds, "from_scratch": not plan.towers}
    with locked(out), _timed(out, settings) as seconds:
        return _Demo(out, plan, arms, minutes, seeds, seconds, progress).run()


@dataclass(frozen=True)
class _Demo:
    """A demo in its folder."""

    out: Path
    plan: Plan
    arms: Sequence[Arm]
    minutes: float
    seeds: int
    seconds: Callable[[], float]
    progress: bool

    def run(self) -> DemoResults:
        """Does all that is not done yet."""
        out, plan, progress = self.out, self.plan, self.progress
        if plan.towers:
            starter_towers(out / "towers")
        datasets = [
            DemoDataset.of(prepare_toyset(name, out / "data" / name, config, progress=progress))
            for name, config in plan.datasets.items()
        ]
        questions = plan.questions
        prepare_toyset(
            questions.toyset,
            questions_folder(out, plan),
            questions.settings(self.minutes),
            progress=progress,
        )
        runs: list[tuple[Arm, int]] = [
            (arm, seed) for seed in range(self.seeds) for arm in self.arms
        ]
        answering = {
            run_folder(out, *run, ANSWERS): answering_config(out, plan, *run, self.minutes)
            for run in runs
        }
        for stage in plan.stages:
            configs = {run: demo_config(out, plan, stage, *run, self.minutes) for run in runs}
            folders = {run_folder(out, *run, stage.name): config for run, config in configs.items()}
            # side by side where they can be
            self.train(folders | ({} if questions.init else answering))
        self.train(answering)
        results = self.report(
            datasets, configs, {run: _judged_answers(out, plan, *run) for run in runs}
        )
        shutil.rmtree(out / "features", ignore_errors=True)
        return results

    def train(self, runs: Mapping[Path, RunConfig]) -> None:
        """Trains those that have no last checkpoint yet, and removes what only a run that goes on needs."""
        unfinished = {
            folder: one
            for folder, one in runs.items()
            if not (folder / "last" / "config.json").exists()
        }
        train_all(unfinished, feature_cache=self.out / "features", progress=self.progress)
        for folder in runs:
            for name in ("best", "states"):
                shutil.rmtree(folder / name, ignore_errors=True)

    def report(
        self,
        datasets: Sequence[DemoDataset],
        configs: Mapping[tuple[Arm, int], RunConfig],
        judged: Mapping[tuple[Arm, int], Judged],
    ) -> DemoResults:
        """Tests the models, and writes results, report, held-out images and their index."""
        out, plan = self.out, self.plan
        tested = {run: _tested(out, plan, *run, config) for run, config in configs.items()}
        steps = sum(
            scaled(RECIPES[each.recipes["bridgetower"]].max_steps or 0, self.minutes)
            for each in plan.stages
        )
        splits = {dataset.name: dataset.splits for dataset in datasets}
        predictors = {arm: load(trained_model(out, arm), device="cpu") for arm in self.arms}
        results = DemoResults(
            command=f"python -m bridgetower_demo{plan.option}{' --compare' if len(self.arms) > 1 else ''} "
            f"--minutes {self.minutes:g} --seeds {self.seeds}",
            settings={
                "minutes": self.minutes,
                "seeds": self.seeds,
                "from_scratch": not plan.towers,
                "steps": steps,
            },
            datasets=tuple(datasets),
            tests={
                name: splits[dataset][split]["images"]
                for name, (dataset, split) in plan.tests.items()
            },
            runs=tuple(
                DemoRun(arm=arm, seed=seed, steps=steps, test=test)
                for (arm, seed), (test, _) in tested.items()
            ),
            costs=tuple(
                model_cost(one.model, _TEXT_LENGTH, arm=arm) for arm, one in predictors.items()
            ),
            answers=tuple(
                DemoAnswers(
                    arm=arm,
                    seed=seed,
                    steps=scaled(plan.questions.steps, self.minutes),
                    topics=dict(one.groundings),
                )
                for (arm, seed), one in judged.items()
            ),
            about=plan.questions.about,
            towers=(VISION.provenance, TEXT.provenance) if plan.towers else (),
            versions={name: version(name) for name in ("bridgetower", "torch")}
            | {"python": platform.python_version()},
            processor=processor_name(),
            seconds_total=self.seconds(),
        )
        results.write(out / "results.json")
        first: tuple[Arm, int] = ("bridgetower", 0)
        answers = _question_examples(questions_folder(out, plan), judged[first]) if judged else []
        _report(
            out, plan, results, predictors["bridgetower"], configs[first], tested[first][1], answers
        )
        for name, (dataset, split) in plan.tests.items():
            write_held_out({name: out / "data" / dataset}, held_out_images(out), split)
        index_held_out(held_out_images(out), held_out_index(out), predictors["bridgetower"])
        return results


def demo_config(
    out: Path, plan: Plan, stage: Stage, arm: Arm, seed: int, minutes: float
) -> RunConfig:
    """Returns the run of one arm in a stage: its recipe on all data sets, steps scaled to `minutes`."""
    recipe = RECIPES[stage.recipes[arm]]
    steps = scaled(recipe.max_steps or 0, minutes)
    folders = tuple(str(out / "data" / name) for name in plan.datasets)
    number = plan.stages.index(stage)
    changes: dict[str, Any] = {
        "max_steps": steps,
        "max_epochs": None,
        "checkpoint_every": -(-steps // _STATES),
    }
    # at the end: the checkpoint is calibrated
    changes["evaluate_every"] = 0 if stage is plan.stages[-1] else None
    changes["align_first"] = round(recipe.align_first * minutes / MINUTES)
    if number > 0:
        changes |= {"init": str(trained_model(out, arm, seed, plan.stages[number - 1].name))}
    elif plan.towers:
        changes |= {"vision": str(out / "towers" / "vision"), "text": str(out / "towers" / "text")}
    data = replace(recipe.data, folders=folders, repeats=plan.repeats)
    return replace(recipe, data=data, seed=seed, **changes)


def answering_config(out: Path, plan: Plan, arm: Arm, seed: int, minutes: float) -> RunConfig:
    """Returns the run in which a model learns to answer: the recipe with so many steps."""
    questions = plan.questions
    recipe = RECIPES[questions.recipes[arm]]
    steps = scaled(questions.steps, minutes)
    return replace(
        recipe,
        init=str(trained_model(out, arm, seed)) if questions.init else None,
        data=replace(recipe.data, folders=(str(questions_folder(out, plan)),)),
        seed=seed,
        max_steps=steps,
        evaluate_every=None,
        checkpoint_every=-(-steps // _STATES),
    )


@contextmanager
def _timed(out: Path, settings: Mapping[str, float]) -> Iterator[Callable[[], float]]:
    """Refuses a folder of other settings; yields what gives the seconds of this call and those before, and keeps them.

    Only the time of a call that is killed is lost.
    """
    path, started = out / _SETTINGS, time.perf_counter()
    before = read_json(path) if path.exists() else dict(settings)
    if {name: before.get(name) for name in settings} != settings:
        given = " ".join(f"--{name} {before.get(name)}" for name in ("minutes", "seeds"))
        given += " --from-scratch" if before.get("from_scratch") else ""
        raise ValueError(
            f"{out} holds a demo with {given}; give the same to continue it, or choose another --out"
        )

    def seconds() -> float:
        spent: float = before.get("seconds", 0.0) + time.perf_counter() - started
        return spent

    write_json(path, {**settings, "seconds": seconds()})
    try:
        yield seconds
    finally:
        write_json(path, {**settings, "seconds": seconds()})


def _tested(
    out: Path, plan: Plan, arm: Arm, seed: int, config: RunConfig
) -> tuple[dict[str, dict[str, float]], dict[str, RetrievalResult]]:
    """Returns metrics and retrieval on the images of each test."""
    predictor = load(trained_model(out, arm, seed), device="cpu")
    assert isinstance(config.task, PretrainingConfig)  # as in all stages
    retrieved: dict[str, RetrievalResult] = {}
    test: dict[str, dict[str, float]] = {}
    for name in plan.tests:
        images = _images(predictor, out, plan, name)
        words: dict[str, float] = {}
        if config.model.heads.mlm:
            words = evaluate_masked_words(predictor.model, images, config.task.masking)
        retrieved[name] = evaluate_retrieval(
            predictor.model, images, config.evaluation, reranking=predictor.reranking
        )
        test[name] = retrieved[name].metrics() | words
    return test, retrieved


def _images(predictor: Predictor, out: Path, plan: Plan, test: str) -> CaptionImages:
    dataset, split = plan.tests[test]
    return CaptionImages(
        DataConfig(folders=(str(out / "data" / dataset),), cache=True), split, predictor.processor
    )


def _report(
    out: Path,
    plan: Plan,
    results: DemoResults,
    predictor: Predictor,
    config: RunConfig,
    retrieved: Mapping[str, RetrievalResult],
    answers: Sequence[AnswerExample],
) -> None:
    searches: dict[str, list[SearchExample]] = {}
    for name in plan.tests:
        images = _images(predictor, out, plan, name)
        searches[name] = search_examples(
            images, retrieved[name], config.evaluation, count=_SEARCHES
        )
        shown = images.contents(spread_evenly(range(len(images)), _IMAGES))
        for number, content in enumerate(shown):
            write_bytes(out / "images" / f"{name.removesuffix('s')}-{number + 1}.png", content)
    asked = [answer.image for answer in answers[:_IMAGES]]
    drawn = {"scene": _drawn_scenes(_IMAGES)} if plan.towers else {}
    for name, contents in (drawn | {plan.questions.prefix: asked}).items():
        for number, content in enumerate(contents):
            write_bytes(out / "images" / f"{name}-{number + 1}.png", content)
    write_text(out / "report.html", render_report(results, searches, answers))
