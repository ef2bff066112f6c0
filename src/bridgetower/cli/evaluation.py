"""The command that measures a model: evaluate."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from bridgetower.cli.options import (
    LOADED,
    FirstModel,
    Json,
    Loading,
    LoadOptions,
    custom_task,
    resolve_demo,
)
from bridgetower.cli.output import emit, emit_metrics, emit_next_command, is_json
from bridgetower.evaluation.config import EvaluationOptions, Outcome, RetrievalConfig
from bridgetower.extras import require
from bridgetower.files import cache_folder, require_parent
from bridgetower.tasks.run_config import TIMEOUT_MINUTES
from bridgetower.tasks.table import BENCHMARKS, benchmark_task

_LOG = logging.getLogger(__name__)

_MEASURED = ", ".join(
    f"{name} ({spec.benchmarks[name].metrics[0]})" for name, spec in BENCHMARKS.items()
)


def evaluate_command(
    model: FirstModel,
    benchmark: Annotated[Positional[str], arg(help=f"What to measure: {_MEASURED}.")],
    *,
    data: tuple[str, ...],
    split: str = "test",
    options: Annotated[RetrievalConfig, arg(name="")] = RetrievalConfig(),  # noqa: B008 - frozen
    fit_two_stage: bool = False,
    templates: tuple[str, ...] = (),
    task_spec: str | None = None,
    num_workers: int = 0,
    work: Path | None = None,
    loading: Loading = LOADED,
    out: Path | None = None,
    report: Path | None = None,
    slices: Path | None = None,
    json: Json = False,
) -> None:
    """Evaluate a model on a prepared data set.

    Retrieval prints recall of three rankings next to chance: by ITC alone, by matching of ITC's candidates alone, and
    of the candidates by both, as the checkpoint weighs them (--fit-two-stage), and the expected calibration error (ECE)
    of what is shown for a candidate. A model without contrastive head has one stage: the fusion encoder scores every
    pair. docs/evaluation.md has the metrics of each benchmark. A table on a terminal, JSON elsewhere.

    --out gets metrics.json, predictions.jsonl by id, and for vqav2 and nlvr2 the submission file that their servers
    take; for vqav2 that is always all of the split test, also with --split test-dev.

    Examples: bridgetower evaluate runs/nano retrieval --data data/flags --max-captions 1
              bridgetower evaluate runs/nano retrieval --data data/flags --split validation --fit-two-stage
              bridgetower evaluate runs/vqa vqav2 --data data/vqav2 --split validation --out vqa
              torchrun --nproc-per-node 2 -m bridgetower evaluate runs/vqa vqav2 --data data/vqav2 --out vqa

    Args:
        benchmark: What to measure.
        data: Prepared data sets or their URLs, evaluated together.
        split: Split to evaluate on.
        options: How it is measured; all but --protocol and --batch-size is for retrieval.
        fit_two_stage: Fit what search needs to match candidates on this split, which is not for tests, and write it
            into the model's folder: the weight of ITC, the calibration of probabilities, and whether matching ranks
            better than ITC alone.
        templates: For zero-shot: texts with {} where a class goes, whose vectors are averaged; zero-shot-matching takes
            the first. Default: those of `classify`.
        task_spec: A custom task, FILE.py:NAME or module:NAME; then BENCHMARK is one of its benchmarks.
        num_workers: Processes that decode images; 0 decodes in the main one.
        work: Folder for the scores so far of retrieval and compositionality; in the user's cache if none is given.
            Killed, the same command continues; at the end it is emptied.
        out: Folder for the metrics and predictions.
        report: HTML file to write, with the worst misses and their images, confusions, calibration and slices.
        slices: For --report: a CSV with a column id, as in predictions.jsonl (for retrieval, of the images), and others
            to slice by.
    """
    model = resolve_demo(model, "model")
    _check_arguments(benchmark, options, loading, work=work, report=report, slices=slices)
    require("train")
    spec = custom_task(task_spec)
    benchmark_task(
        benchmark, split, options, spec, fit_two_stage=fit_two_stage, templates=templates
    )
    import torch

    from bridgetower.checkpoints import Reranking, write_reranking
    from bridgetower.data.sets.prepared_set import read_info
    from bridgetower.distributed import process_group, rank
    from bridgetower.evaluation.metrics import LEAST_IMAGES
    from bridgetower.model.cpu import pack_weights
    from bridgetower.model.layers import autocast
    from bridgetower.tasks.table import evaluate as run_benchmark

    # What can be wrong is found before the model is loaded.
    if spec is None:
        for folder in data:
            read_info(folder)
    columns = None
    if slices is not None:
        from bridgetower.reports.errors import read_slices

        columns = read_slices(slices)
    if fit_two_stage:
        write_reranking(model, None)

    with process_group(loading.device, TIMEOUT_MINUTES), ExitStack() as until_written:
        # Scores stay in float32: bfloat16 is for matrix products only.
        predictor = replace(loading, precision="fp32").load(model)
        if report is not None and benchmark == "retrieval":
            predictor.model.head("itc")
        pack_weights(predictor.model, torch.bfloat16 if loading.precision == "bf16" else None)
        until_written.enter_context(autocast(predictor.device, loading.precision))
        evaluation_options = EvaluationOptions(
            work=work or cache_folder() / "evaluations",
            until_written=until_written,
            num_workers=num_workers,
            progress=sys.stderr.isatty(),
        )
        outcome = run_benchmark(
            predictor,
            benchmark,
            data,
            split,
            options,
            evaluation_options,
            spec=spec,
            fit_two_stage=fit_two_stage,
            templates=templates,
        )
        if rank() != 0:
            return

        # The first process writes.
        if fit_two_stage:
            fitted = Reranking.from_metrics(outcome.metrics)
            if fitted.calibration is None or fitted.gain is None:
                _LOG.warning(
                    "the split is too small for a calibration and for a comparison with ITC alone, so matches stay "
                    "scores; give at least %d images with different captions, and candidates of which some match and "
                    "others do not",
                    LEAST_IMAGES,
                )
            write_reranking(model, fitted)
        settings: dict[str, Any] = {
            "benchmark": benchmark,
            "model": predictor.source,
            "fingerprint": predictor.fingerprint,
            "data": list(data),
            "split": split,
        }
        if benchmark == "retrieval":
            settings |= vars(options)
            del settings["batch_size"]
        else:
            settings["protocol"] = options.protocol
        if templates:
            settings["templates"] = templates
        settings["precision"] = loading.precision
        _write_outcome(outcome, settings, out=out, report=report, columns=columns, json=json)


def _check_arguments(
    benchmark: str,
    options: RetrievalConfig,
    loading: LoadOptions,
    *,
    work: Path | None,
    report: Path | None,
    slices: Path | None,
) -> None:
    """Refuses arguments that do not fit together."""
    if loading.engine != "torch" or loading.precision not in ("fp32", "bf16"):
        raise ValueError(
            f"engine {loading.engine}, precision {loading.precision}; evaluate takes engine torch in fp32 or bf16"
        )
    if work is not None and benchmark not in ("retrieval", "compositionality"):
        raise ValueError(
            f"work {work} is for retrieval and compositionality; leave it out for {benchmark}"
        )
    if report is None:
        if slices is not None:
            raise ValueError(f"slices {slices} is for a report of errors; add --report")
        return
    require("plot")
    require_parent(report)
    if options.fold_size or benchmark in ("regression", "compositionality"):
        raise ValueError(
            "a report is for answers, statements, classes and ranks without folds; leave report out"
        )


def _write_outcome(
    outcome: Outcome,
    settings: Mapping[str, Any],
    *,
    out: Path | None,
    report: Path | None,
    columns: Mapping[str, Mapping[str, str]] | None,
    json: bool,
) -> None:
    """Logs, prints and writes the outcome of an evaluation with these settings."""
    from bridgetower.data.sets.prepared_set import MIN_EVALUATED

    for note in outcome.notes:
        _LOG.warning(note)
    num_images = outcome.counts.get("num_images", MIN_EVALUATED)
    if num_images < MIN_EVALUATED:
        _LOG.warning(
            "recalls are over %d images: one is %.1f points; give more data to tell two models apart",
            num_images,
            100 / num_images,
        )
    if out is not None:
        outcome.write(out, settings)

    source = settings["model"]
    title = f"{source}: {settings['split']} of {', '.join(settings['data'])}"
    if is_json(json):
        emit(outcome.report(settings))
    elif settings["benchmark"] == "retrieval":
        emit_metrics(title, outcome.metrics)
        emit_next_command("index", "PHOTOS", "--out", "photos.lance", "--model", source)
    else:
        emit_metrics(title, {**outcome.counts, **outcome.metrics})
        emit_next_command("serve", "--model", source)

    if report is not None:
        from bridgetower.reports.errors import write_errors

        assert outcome.images is not None
        # A custom task may have no judgements.
        judgements = outcome.judge() if outcome.judge else []
        write_errors(report, judgements, outcome.images, title=title, slices=columns)
