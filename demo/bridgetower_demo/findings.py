"""Numbers in a form for readers, and sentences that follow from the numbers."""

from __future__ import annotations

from bridgetower.reports.numbers import Difference, count, mean_std, number, paired_difference, range_of, verdict
from bridgetower_demo.results import Arm, DemoResults

ARM_NAMES: dict[Arm, str] = {"bridgetower": "BridgeTower", "meter": "METER"}


def millions(value: int) -> str:
    """Returns a number of parameters in millions, `3.67 M`."""
    return f"{value / 1e6:.2f} M"


def duration(seconds: float) -> str:
    """Returns `41 s`, `12 min` or `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def ordinal(place: int) -> str:
    """Returns `1st`, `2nd`, `11th`."""
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def listing(words: list[str]) -> str:
    """Returns `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def gflops(value: float) -> str:
    """Returns 10⁹ operations, with three digits after the point below 10 and one above."""
    return "< 0.001" if 0 < value < 0.0005 else number(value, digits=3 if value < 10 else 1)


def method(results: DemoResults) -> str:
    """Returns a sentence on what was done."""
    models = [f"{ARM_NAMES[cost.arm]} ({millions(cost.parameters)} parameters)" for cost in results.costs]
    train = [dataset.splits["train"] for dataset in results.datasets]
    images, captions = (sum(split[name] for split in train) for name in ("images", "captions"))
    tests = [f"{count(num_images)} {test}" for test, num_images in results.tests.items()]
    seeds = max(len(results.seeds(arm)) for arm in results.arms)
    runs = f"{seeds} seeds each" if seeds > 1 else "one seed each"
    meter = " METER is the same network without bridges and input LayerNorms." if "meter" in results.arms else ""
    return (
        f"{listing(models) or 'The models'} were trained on {count(images)} images with {count(captions)} captions "
        f"({listing([dataset.name for dataset in results.datasets])}) for {count(results.runs[0].steps)} steps, with "
        f"{runs}.{meter} All test metrics are on images outside of the training data: {listing(tests)}."
    )


def retrieval_finding(results: DemoResults, dataset: str) -> str:
    """Compares the arms and a random ranking by RSUM on one data set."""
    summary = results.summary()[dataset]
    reached = [f"{ARM_NAMES[arm]} {mean_std(summary['rsum'][arm], scale=100)}" for arm in results.arms]
    chance = number(100 * summary["chance_rsum"][results.arms[0]]["mean"])
    sentence = f"RSUM on {dataset}: {listing(reached)}; a random ranking gives {chance}, a perfect one 600."
    difference = results.differences().get(dataset, {}).get("rsum")
    return sentence if difference is None else f"{sentence} {comparison(difference)}"


def matching_finding(results: DemoResults, dataset: str) -> str:
    """Returns a sentence on how often the matching heads are right on one data set; empty if it was not measured."""
    accuracy = results.summary()[dataset].get("itm_accuracy")
    if accuracy is None:
        return ""
    reached = [f"{ARM_NAMES[arm]} {mean_std(accuracy[arm], scale=100)} %" for arm in results.arms]
    return f"Telling right pairs from wrong ones: {listing(reached)}; guessing gives 50 %."


def image_finding(results: DemoResults, dataset: str) -> str:
    """Returns a sentence on the gain from the right image for masked words; empty if it was not measured."""
    gains = {arm: image_gain(results, dataset, arm) for arm in results.arms}
    reached = [
        f"{ARM_NAMES[arm]} {mean_std(gain, scale=100, sign=True)} points ({image_reading(gain)})"
        for arm, gain in gains.items()
        if gain is not None
    ]
    return f"Masked words found with the right image rather than a wrong one: {listing(reached)}." if reached else ""


def comparison(difference: Difference) -> str:
    """Returns a sentence on how bridgetower − meter, shown in percent, is to be read."""
    seeds, mean = len(difference["values"]), number(100 * difference["mean"], sign=True)
    bounds = difference["interval_95"]
    if bounds is None:
        return f"The difference is {mean}; with one seed it could be chance."
    evidence = f"{mean}, 95 % interval {range_of(bounds, scale=100)} over {seeds} paired seeds"
    if verdict(difference) == "unclear":
        return f"No clear difference between the two ({evidence})."
    better, worse = ("BridgeTower", "METER") if difference["mean"] > 0 else ("METER", "BridgeTower")
    return f"{better} is ahead of {worse} ({evidence})."


def image_gain(results: DemoResults, dataset: str, arm: Arm) -> Difference | None:
    """Returns accuracy on masked words with the right image minus with a wrong one; None if it was not measured."""
    tests = [run.test[dataset] for run in results.arm_runs(arm)]
    if any("mlm_accuracy" not in test or "mlm_wrong_image_accuracy" not in test for test in tests):
        return None
    return paired_difference(*([test[f"mlm_{beside}accuracy"] for test in tests] for beside in ("", "wrong_image_")))


def image_reading(gain: Difference) -> str:
    """Returns how a gain from the right image is to be read."""
    return {
        "higher": "the image helps",
        "lower": "the image misleads",
        "unclear": "no clear difference",
        "untested": "one seed: open",
    }[verdict(gain)]
