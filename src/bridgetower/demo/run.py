"""The main job end to end: prepare images, pre-train two models, fine-tune, evaluate, compare, report, index."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from bridgetower.analysis.examples import (
    AnswerExample,
    MaskExample,
    SearchExample,
    answer_examples,
    mask_examples,
    search_examples,
)
from bridgetower.analysis.profile import model_cost
from bridgetower.analysis.report import render_report
from bridgetower.analysis.results import ARMS, Arm, DemoAnswers, DemoDataset, DemoResults, DemoRun, curve
from bridgetower.data.captions import CaptionImages
from bridgetower.data.config import DataConfig
from bridgetower.data.folder import read_split
from bridgetower.data.schema import VQA
from bridgetower.demo.folder import (
    answering_folder,
    answering_model,
    held_out_index,
    held_out_pictures,
    run_folder,
    trained_model,
)
from bridgetower.demo.toysets import prepare_toyset
from bridgetower.demo.toysets.scenes import ScenesConfig
from bridgetower.evaluation.masked_words import evaluate_masked_words
from bridgetower.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from bridgetower.files import locked, read_json, write_bytes, write_json, write_text
from bridgetower.objectives.config import PretrainingConfig
from bridgetower.predictor import Predictor, load
from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import Index
from bridgetower.tasks.grounding import Judged, judge
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.run_folder import read_metrics
from bridgetower.tasks.table import RECIPES
from bridgetower.training.parallel import train_all


def write_held_out(datasets: Mapping[str, Path], folder: Path) -> None:
    """Writes the test images of data sets as files, each with a text file of its captions beside it.

    A file that is there with the same content is left as it is, so that its time stays.

    Args:
        datasets: Prepared folders by name; each gets a folder of that name.
        folder: Where to write.
    """
    for name, dataset in datasets.items():
        rows = read_split(dataset, "test")
        for row in map(rows.row, range(len(rows))):
            image = folder / name / row["image"]["path"]
            _write(image, row["image"]["bytes"])
            _write(image.with_suffix(".txt"), "".join(f"{caption}\n" for caption in row["captions"]).encode())


def index_held_out(folder: Path, uri: Path, predictor: Predictor) -> None:
    """Brings the index of held-out images up to date; one of another model, such as of an earlier demo, is replaced.

    Args:
        folder: From `write_held_out`.
        uri: The index.
        predictor: The model.
    """
    if Index.exists(uri) and Index(uri).info.fingerprint != predictor.fingerprint:
        shutil.rmtree(uri)
    build_index(folder, uri, predictor, IndexConfig(truncate=True, num_workers=0))


def _write(path: Path, content: bytes) -> None:
    if not (path.exists() and path.read_bytes() == content):
        write_bytes(path, content)


SCENES_PER_MINUTE = 2_500  # of the demo, for training; at least one batch of them
NUM_VALIDATION, NUM_TEST = 400, 1_000
EXAMPLES = 2  # of either kind per topic


def scenes_folder(out: Path) -> Path:
    """Folder of the questions."""
    return out / "data" / "scenes"


def prepare_questions(out: Path, minutes: float, *, progress: bool) -> None:
    """Draws the scenes and asks about them; more minutes draw more."""
    recipe = RECIPES["scenes-vqa"]
    config = ScenesConfig(
        num_train=max(recipe.batch_size, round(SCENES_PER_MINUTE * minutes)),
        num_validation=NUM_VALIDATION,
        num_test=NUM_TEST,
        side=recipe.model.vision.image_size,
    )
    prepare_toyset("scenes", scenes_folder(out), config, progress=progress)


def answering_config(out: Path, arm: Arm, seed: int, steps: int) -> RunConfig:
    """Returns the run in which a pre-trained model learns to answer: the recipe with so many steps."""
    recipe = RECIPES["scenes-vqa"]
    every = -(-steps // 3)
    return replace(
        recipe,
        init=str(trained_model(out, arm, seed)),
        data=replace(recipe.data, folders=(str(scenes_folder(out)),)),
        seed=seed,
        max_steps=steps,
        evaluate_every=every,
        checkpoint_every=every,
    )


def judged_answers(out: Path, arm: Arm, seed: int) -> Judged:
    """Answers the test questions with the last checkpoint."""
    predictor = load(answering_model(out, arm, seed), device="cpu")
    return judge(predictor, "vqa", scenes_folder(out))


def answer_metrics(judged: Mapping[tuple[Arm, int], Judged], steps: int) -> tuple[DemoAnswers, ...]:
    """Returns what is reported of the answers of each arm and seed."""
    return tuple(
        DemoAnswers(arm=arm, seed=seed, steps=steps, topics=dict(one.groundings)) for (arm, seed), one in judged.items()
    )


def scene_examples(out: Path, judged: Judged) -> list[AnswerExample]:
    """Returns questions of the test split with their images and answers."""
    rows = read_split(scenes_folder(out), "test", schema=VQA)
    images = [image["bytes"] for image in rows.stream("image")]
    return answer_examples(judged, images, count=EXAMPLES)


DatasetName = Literal["emoji", "flags"]

RECIPE_OF: dict[Arm, str] = {"bridgetower": "pretrain-nano", "meter": "pretrain-nano-meter"}
DATASETS: tuple[DatasetName, ...] = get_args(DatasetName)
REPEATS = (1, 6)  # there are twenty times fewer pairs of flags than of emoji
MINUTES = 10.0  # about what the recipes' own number of steps takes for both arms and one seed, on 2 cores
STEPS_OF_ANSWERS = 2  # for each step of pre-training; they are a quarter as dear
EVALUATIONS = 6  # during each training, but no more often than
MIN_INTERVAL = 20  # steps
TEXT_LENGTH = 16  # tokens of the pair whose cost is measured
SETTINGS = "demo.json"  # and the time so far
SEARCHES, MASKS, PICTURES = 6, 4, 8  # examples per data set


def run_demo(out: Path, *, minutes: float = MINUTES, seeds: int = 1, progress: bool = True) -> DemoResults:
    """Trains and compares BridgeTower and METER on held-out emoji and flags; continues where it was cut off.

    Then each of them learns to answer questions about generated scenes.

    The folder gets `data/`, `runs/ARM-SEED/`, `runs/ARM-SEED-answers/`, `pictures/` (some held-out ones and some
    scenes), `held-out/` (all held-out ones) and `held-out.lance`, an index of these, `results.json`, `report.html` and
    `demo.json`, the settings and the time that calls have taken so far. Both arms are tested with their last
    checkpoint: the best one on validation could be of a phase in which the fusion encoder has not been trained yet.

    Args:
        out: Folder for everything.
        minutes: Scales the number of training steps: about this long for one seed on 2 cores.
        seeds: Trainings of each model; more give a spread.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: The packages of the `demo` extra are missing.
        FileExistsError: Another process works in `out`.
        ValueError: `minutes` or `seeds` is not positive, or `out` holds a demo with other settings.
        Interrupted: A signal asked the trainings to stop; the same call continues them.
        LostProcessError: The process of a training was killed; the same call continues it.
    """
    if minutes <= 0 or seeds < 1:
        raise ValueError(f"minutes {minutes}, seeds {seeds}; expected more than 0 minutes and at least 1 seed")
    with locked(out), _timed(out, {"minutes": minutes, "seeds": seeds}) as seconds:
        return _run(out, minutes, seeds, progress, seconds)


def _run(out: Path, minutes: float, seeds: int, progress: bool, seconds: Callable[[], float]) -> DemoResults:
    datasets = [DemoDataset.of(prepare_toyset(name, out / "data" / name, progress=progress)) for name in DATASETS]
    configs = {(arm, seed): demo_config(out, arm, seed, minutes) for seed in range(seeds) for arm in ARMS}
    train_all({run_folder(out, *run): config for run, config in configs.items()}, progress=progress)
    steps = STEPS_OF_ANSWERS * demo_steps(minutes)
    prepare_questions(out, minutes, progress=progress)
    train_all({answering_folder(out, *run): answering_config(out, *run, steps) for run in configs}, progress=progress)
    judged = {run: judged_answers(out, *run) for run in configs}
    tested = {run: _tested(out, *run, config) for run, config in configs.items()}
    runs = [run for run, _ in tested.values()]
    predictors = {arm: _trained(out, arm, 0) for arm in ARMS}
    results = DemoResults(
        command=f"bridgetower demo --minutes {minutes:g} --seeds {seeds}",
        settings={"minutes": minutes, "seeds": seeds, "steps": runs[0].steps, "device": "cpu"},
        datasets=tuple(datasets),
        runs=tuple(runs),
        costs=tuple(model_cost(predictors[arm].model, TEXT_LENGTH, arm=arm) for arm in ARMS),
        answers=answer_metrics(judged, steps),
        versions={name: version(name) for name in ("bridgetower", "torch")} | {"python": platform.python_version()},
        seconds_total=seconds(),
    )
    results.write(out / "results.json")
    first: tuple[Arm, int] = ("bridgetower", 0)
    _report(out, results, predictors["bridgetower"], tested[first][1], scene_examples(out, judged[first]))
    write_held_out({name: out / "data" / name for name in DATASETS}, held_out_pictures(out))
    index_held_out(held_out_pictures(out), held_out_index(out), predictors["bridgetower"])
    return results


def demo_steps(minutes: float) -> int:
    """Steps of each pre-training."""
    return max(2, round((RECIPES[RECIPE_OF["bridgetower"]].max_steps or 0) * minutes / MINUTES))


def demo_config(out: Path, arm: Arm, seed: int, minutes: float) -> RunConfig:
    """Returns the run of one arm: its recipe on both data sets, steps scaled to `minutes`."""
    recipe = RECIPES[RECIPE_OF[arm]]
    steps = demo_steps(minutes)
    every = max(MIN_INTERVAL, -(-steps // EVALUATIONS))
    folders = tuple(str(out / "data" / name) for name in DATASETS)
    data = replace(recipe.data, folders=folders, repeats=REPEATS)
    return replace(recipe, data=data, seed=seed, max_steps=steps, evaluate_every=every, checkpoint_every=every)


@contextmanager
def _timed(out: Path, settings: Mapping[str, float]) -> Iterator[Callable[[], float]]:
    """Refuses a folder of other settings; yields what tells the seconds so far, over all calls but killed ones."""
    path, started = out / SETTINGS, time.perf_counter()
    before = read_json(path) if path.exists() else {**settings, "seconds": 0.0}
    if {name: before.get(name) for name in settings} != settings:
        given = " ".join(f"--{name} {before.get(name)}" for name in settings)
        raise ValueError(f"{out} holds a demo with {given}; give the same to continue it, or choose another --out")

    def seconds() -> float:
        return before["seconds"] + time.perf_counter() - started

    write_json(path, before)
    try:
        yield seconds
    finally:
        write_json(path, {**settings, "seconds": seconds()})


def _trained(out: Path, arm: Arm, seed: int) -> Predictor:
    return load(trained_model(out, arm, seed), device="cpu")


def _tested(out: Path, arm: Arm, seed: int, config: RunConfig) -> tuple[DemoRun, dict[DatasetName, RetrievalResult]]:
    """Returns what is reported of a run, and its retrieval on the test images of each data set."""
    folder = run_folder(out, arm, seed)
    predictor = _trained(out, arm, seed)
    steps = config.max_steps or 0
    seconds = sum(line["seconds"] for line in read_metrics(folder, "train"))
    assert isinstance(config.task, PretrainingConfig)  # as in `RECIPE_OF`
    retrieved: dict[DatasetName, RetrievalResult] = {}
    test: dict[str, dict[str, float]] = {}
    for name in DATASETS:
        images = _images(predictor, out / "data" / name)
        words = evaluate_masked_words(predictor.model, images, config.task.masking)
        retrieved[name] = evaluate_retrieval(
            predictor.model, images, config.evaluation, itc_weight=predictor.itc_weight
        )
        test[name] = retrieved[name].metrics() | words
    run = DemoRun(
        arm=arm,
        seed=seed,
        steps=steps,
        seconds=seconds,
        pairs_per_second=steps * config.batch_size / seconds,
        curve=curve(read_metrics(folder, "validation")),
        test=test,
    )
    return run, retrieved


def _images(predictor: Predictor, folder: Path) -> CaptionImages:
    return CaptionImages(DataConfig(folders=(str(folder),), cache=True), "test", predictor.processor)


def _report(
    out: Path,
    results: DemoResults,
    predictor: Predictor,
    retrieved: Mapping[DatasetName, RetrievalResult],
    answers: Sequence[AnswerExample],
) -> None:
    evaluation = RECIPES[RECIPE_OF["bridgetower"]].evaluation
    searches: dict[str, list[SearchExample]] = {}
    masks: list[MaskExample] = []
    for name in DATASETS:
        images = _images(predictor, out / "data" / name)
        searches[name] = search_examples(predictor, images, retrieved[name], evaluation, count=SEARCHES)
        masks += mask_examples(predictor, images, count=MASKS)
        for number in range(min(PICTURES, len(images))):
            write_bytes(out / "pictures" / f"{name.removesuffix('s')}-{number + 1}.png", images.image_bytes(number))
    for number, answer in enumerate(answers[:PICTURES]):
        write_bytes(out / "pictures" / f"scene-{number + 1}.png", answer.image)
    page = render_report(results, searches, masks, answers, examples_from="BridgeTower, seed 0")
    write_text(out / "report.html", page)
