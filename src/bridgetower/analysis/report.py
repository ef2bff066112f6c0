"""One self-contained HTML page about a finished comparison; it loads nothing and runs no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from bridgetower.analysis.answer_examples import AnswerExample
from bridgetower.analysis.charts import learning_curve
from bridgetower.analysis.examples import SearchExample
from bridgetower.analysis.findings import matching_finding, method, picture_finding, retrieval_finding
from bridgetower.analysis.formats import ARM_NAMES, count, duration, listing, number
from bridgetower.analysis.markup import Section, bar, definitions, heading, paragraph
from bridgetower.analysis.masked_examples import MaskExample
from bridgetower.analysis.report_examples import answer_cards, mask_cards, search_cards
from bridgetower.analysis.report_tables import (
    answers_table,
    cost_tables,
    hidden_words_table,
    matching_table,
    recall_table,
)
from bridgetower.analysis.results import DemoDataset, DemoResults
from bridgetower.files import write_text

PERFECT_RSUM = 600.0


def write_report(
    path: Path,
    results: DemoResults,
    searches: Mapping[str, Sequence[SearchExample]],
    masks: Sequence[MaskExample],
    answers: Sequence[AnswerExample] = (),
    *,
    examples_from: str,
) -> None:
    """Writes the page, atomically.

    Args:
        path: File to write.
        results: Everything measured.
        searches: Data set → its example searches.
        masks: Captions with a hidden word.
        answers: Questions about scenes with what the model answers.
        examples_from: The model that made the examples, such as "BridgeTower, seed 0".
    """
    write_text(path, render_report(results, searches, masks, answers, examples_from=examples_from))


def render_report(
    results: DemoResults,
    searches: Mapping[str, Sequence[SearchExample]],
    masks: Sequence[MaskExample],
    answers: Sequence[AnswerExample] = (),
    *,
    examples_from: str,
) -> str:
    """Returns the page; arguments as for `write_report`."""
    sections = [
        _curves(results),
        _retrieval(results),
        _searches(searches, examples_from),
        _hidden_words(results, masks, examples_from),
        *([_answers(results, answers, examples_from)] if results.answers else []),
        _cost(results),
        _basis(results),
    ]
    return Template(_resource("report.html")).substitute(
        title=escape(_title(results)),
        style=_resource("report.css"),
        lead=escape(method(results)),
        verdicts="".join(_verdict(results, dataset) for dataset in results.summary()),
        links="".join(section.link() for section in sections),
        sections="\n".join(section.render() for section in sections),
    )


def _title(results: DemoResults) -> str:
    return f"{' against '.join(ARM_NAMES[arm] for arm in results.arms)} on {listing(list(results.runs[0].test))}"


def _verdict(results: DemoResults, dataset: str) -> str:
    """The headline of one data set: RSUM as bars, and how it is to be read."""
    figures = results.summary()[dataset]
    values = {ARM_NAMES[arm]: (figures["rsum"][arm]["mean"], arm) for arm in results.arms}
    bars = values | {"random": (figures["chance_rsum"][results.arms[0]]["mean"], "chance")}
    rows = "".join(
        f'<li><span class="word">{name}</span>{bar(value / PERFECT_RSUM, style)}<span>{number(value)}</span></li>'
        for name, (value, style) in bars.items()
    )
    findings = (retrieval_finding, matching_finding, picture_finding)
    text = "".join(paragraph(sentence) for find in findings if (sentence := find(results, dataset)))
    label = paragraph(f"RSUM on {dataset}", "label")
    return (
        f'<div class="verdict"><div>{label}<ul class="bars" aria-hidden="true">{rows}</ul></div><div>{text}</div></div>'
    )


def _curves(results: DemoResults) -> Section:
    chances = [
        point.figures["chance_rsum"] for run in results.runs for point in run.curve if "chance_rsum" in point.figures
    ]
    drawings = {
        "RSUM of the validation pictures (600 is perfect)": learning_curve(
            results, "rsum", label="RSUM", chance=chances[0] if chances else None
        ),
        "Matching accuracy on the validation pictures": learning_curve(
            results, "itm_accuracy", label="matching accuracy (%)", chance=0.5, scale=100
        ),
    }
    legend = "".join(f'<span class="{arm}">{ARM_NAMES[arm]}</span>' for arm in results.arms)
    figures = "".join(
        f'<figure class="chart">{drawing}<figcaption>{escape(caption)}</figcaption></figure>'
        for caption, drawing in drawings.items()
        if drawing is not None
    )
    body = (
        paragraph(_seeds(results, "Lines are means over the seeds, bands go from the lowest to the highest seed."))
        + f'<p class="legend">{legend}<span class="chance">guessing</span></p><div class="charts">{figures}</div>'
        if figures
        else paragraph("The runs were not evaluated while they trained.")
    )
    return Section(name="curves", title="Learning curves", body=body)


def _retrieval(results: DemoResults) -> Section:
    intro = (
        "Test pictures and their texts look for each other. ITC compares two vectors; two-stage lets the fusion "
        "encoder reorder the best candidates. "
    ) + _seeds(
        results, "± is the standard deviation over seeds, in the last but one row that of the paired differences."
    )
    matching = (
        "Is this the text of this picture? Each text is asked about with its own picture and with one other, so that "
        "guessing is right in 50 %."
    )
    body = (
        paragraph(intro)
        + "".join(recall_table(results, dataset) for dataset in results.summary())
        + paragraph(matching)
        + matching_table(results)
    )
    return Section(name="retrieval", title="Retrieval and matching", body=body)


def _searches(searches: Mapping[str, Sequence[SearchExample]], examples_from: str) -> Section:
    intro = (
        f"By {examples_from}. Queries are chosen by rule: half with the right answer first, half without, from near to "
        "far misses, as far as there are enough of both. Under each answer stand the probability that it matches and "
        "the cosine of the two vectors; the order is that of the benchmark, by the matching head's logit among the "
        "candidates. A check mark in green shows the right answer."
    )
    cards = "".join(search_cards(dataset, examples) for dataset, examples in searches.items())
    return Section(
        name="searches", title="Example searches", body=paragraph(intro) + (cards or paragraph("No examples."))
    )


def _hidden_words(results: DemoResults, masks: Sequence[MaskExample], examples_from: str) -> Section:
    question = (
        "If a model looks at the picture, it finds more hidden words beside the right picture than beside a wrong one. "
        "The reading is that of the 95 % interval over seeds."
    )
    examples = (
        f"By {examples_from}. The marked word is hidden from the model, which sees the rest and one of two pictures; "
        "the bars are its five likeliest words."
    )
    body = (
        heading("Does it look at the picture?", 3)
        + paragraph(question)
        + hidden_words_table(results)
        + heading("Examples", 3)
        + (paragraph(examples) if masks else "")
        + mask_cards(masks)
    )
    return Section(name="hidden-words", title="Hidden words", body=body)


def _answers(results: DemoResults, examples: Sequence[AnswerExample], examples_from: str) -> Section:
    intro = (
        "After pre-training, each model learnt from questions about generated scenes for "
        f"{count(results.answers[0].steps)} steps, and is asked about scenes that it has not seen. Every possible "
        "answer to a question is right equally often, so that the question alone says little: what it gives stands "
        "below, and what the model says when it is shown the picture of another question."
    )
    chosen = (
        f"By {examples_from}: of each topic the first test questions that it answers right, and the first that it does "
        "not."
    )
    body = (
        paragraph(intro)
        + answers_table(results)
        + heading("Examples", 3)
        + (paragraph(chosen) + answer_cards(examples) if examples else paragraph("No examples."))
    )
    return Section(name="answers", title="Questions about scenes", body=body)


def _seeds(results: DemoResults, several: str) -> str:
    return several if any(len(results.seeds(arm)) > 1 for arm in results.arms) else "Each model was trained once."


def _cost(results: DemoResults) -> Section:
    intro = (
        "Operations are multiplications and additions of matrix products and convolutions, for one picture, one text "
        "and the matching head. Projections and poolers count as fusion encoder."
    )
    return Section(name="cost", title="Cost", body=paragraph(intro) + cost_tables(results))


def _basis(results: DemoResults) -> Section:
    versions = [*results.versions.items(), ("whole demo", duration(results.seconds_total))]
    body = (
        heading("Run it again", 3)
        + f"<pre><code>{escape(results.command)}</code></pre>"
        + heading("Data and licences", 3)
        + definitions([pair for dataset in results.datasets for pair in _data(dataset)])
        + heading("Versions", 3)
        + definitions(versions)
        + heading("Settings", 3)
        + f"<details><summary>{len(list(_flat(results.settings)))} values</summary>"
        + definitions(list(_flat(results.settings)))
        + "</details>"
    )
    return Section(name="basis", title="Settings, data and versions", body=body)


def _data(dataset: DemoDataset) -> Iterator[tuple[str, str]]:
    counts = (
        f"{name} {count(split['images'])} pictures with {count(split['captions'])} captions"
        for name, split in dataset.splits.items()
    )
    yield dataset.name, "; ".join(counts)
    yield f"{dataset.name}, split", dataset.split_rule
    yield f"{dataset.name}, sources", ", ".join(f"{name} {version}" for name, version in dataset.sources.items())
    for part, licence in dataset.licences.items():
        yield f"{dataset.name}, {part}", licence


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names nested values with dots."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _resource(name: str) -> str:
    return files("bridgetower.analysis").joinpath(name).read_text(encoding="utf-8")
