"""Made-up results and examples, of the right form and with round numbers."""

import io
from dataclasses import replace
from typing import Any

from PIL import Image

from bridgetower_demo.examples import AnswerExample, Hit, SearchExample
from bridgetower_demo.results import (
    PARTS,
    Arm,
    DemoAnswers,
    DemoDataset,
    DemoResults,
    DemoRun,
    Grounding,
    ModelCost,
)

STAGES = ("itc", "matching", "two_stage", "chance")
DIRECTIONS = ("image_to_text", "text_to_image")


def metrics(rsum: float = 120.0, **changes: float) -> dict[str, float]:
    """Returns all test metrics of one data set. The six recalls are equal, and `rsum` is their sum in percent."""
    rsum /= 100
    values = {
        f"{stage}_{side}_r{k}": rsum / 6
        for stage in STAGES
        for side in DIRECTIONS
        for k in (1, 5, 10)
    }
    values |= {f"{stage}_rsum": rsum for stage in STAGES} | {"chance_rsum": 0.16, "rsum": rsum}
    values |= {"itc_weight": 16.0, "itm_accuracy": 0.75}
    values |= {
        "mlm_loss": 3.0,
        "mlm_accuracy": 0.4,
        "mlm_wrong_image_loss": 4.0,
        "mlm_wrong_image_accuracy": 0.3,
    }
    return values | changes


def demo_run(
    arm: Arm = "bridgetower", seed: int = 0, rsum: float = 120.0, **changes: Any
) -> DemoRun:
    """Returns a run of 20 steps."""
    return DemoRun(
        arm=arm, seed=seed, **{"steps": 20, "test": {"shapes": metrics(rsum)}, **changes}
    )


def dataset(name: str = "shapes", **changes: Any) -> DemoDataset:
    values: dict[str, Any] = {
        "splits": {
            "train": {"images": 1000, "captions": 2000},
            "test": {"images": 50, "captions": 60},
        },
        "split_rule": "by shape",
        "sources": {"drawn": "1.0"},
        "licences": {"images": "CC0"},
    }
    return DemoDataset(name=name, **{**values, **changes})


def cost(arm: Arm = "bridgetower", fusion: int = 1_500_000) -> ModelCost:
    parameters = dict(zip(PARTS, (1_000_000, 2_000_000, fusion, 500_000), strict=True))
    return ModelCost(
        arm=arm,
        parameters=sum(parameters.values()),
        parameters_by_part=parameters,
        gflops_per_pair_by_part=dict(zip(PARTS, (0.5, 0.25, 12.5, 1e-6), strict=True)),
        milliseconds_per_pair=4.25,
    )


def demo_answers(arm: Arm = "bridgetower", seed: int = 0, right: float = 0.75) -> DemoAnswers:
    """Returns metrics of answers, alike for two topics."""
    colour = Grounding(number=500, model=right, other_image=0.5, text_only=0.55, majority=0.45)
    return DemoAnswers(
        arm=arm,
        seed=seed,
        steps=20,
        topics={"colour": colour, "overall": replace(colour, number=1000)},
    )


def answer(
    question: str = "what colour is it?", answer: str = "red", reference: str = "red"
) -> AnswerExample:
    return AnswerExample(image=png(5), question=question, answer=answer, given=reference)


def results(*runs: DemoRun, **changes: Any) -> DemoResults:
    """Returns results of the runs given, or of three seeds of both arms where bridges help a little and clearly."""
    ours = [demo_run("bridgetower", seed, 130.0 + seed) for seed in range(3)]
    theirs = [demo_run("meter", seed, 120.0 + 2 * seed) for seed in range(3)]
    values: dict[str, Any] = {
        "command": "python -m bridgetower_demo --seeds 3",
        "settings": {"steps": 20, "optimizer": {"lr": 0.001}},
        "datasets": (dataset(),),
        "tests": {"shapes": 50},
        "runs": runs or (*ours, *theirs),
        "costs": (cost("bridgetower"), cost("meter", fusion=1_250_000)),
        "answers": (demo_answers(), demo_answers("meter", right=0.625)),
        "versions": {"python": "3.11"},
        "processor": "a processor",
        "seconds_total": 3900.0,
    }
    return DemoResults(**{**values, **changes})


def png(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4), shade).save(stream, "PNG")
    return stream.getvalue()


def hit(caption: str, *, is_own: bool = False) -> Hit:
    return Hit(caption=caption, image=png(1), is_own=is_own)


def search(direction="text_to_image", *, text="a query", answer="an answer", rank=1, top=3):
    """Returns a search whose right answer has the rank."""
    hits = tuple(hit(answer, is_own=position == rank) for position in range(1, top + 1))
    own_hit = hit(answer, is_own=True)
    return SearchExample(
        direction=direction,
        text=text,
        image=png(2),
        hits=hits,
        own=own_hit,
        rank=rank,
        num_items=50,
    )
