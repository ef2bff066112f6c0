"""An objective and a metric from outside the package, in a file of a user's own: their values, and a run of theirs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bridgetower import BridgeTower
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.extras import load_object
from bridgetower.inference.predictor import load
from bridgetower.model.extensions import Extensions
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.run_config import read_metrics
from bridgetower.tasks.table import evaluate
from bridgetower.training.run import train
from helpers.models import SMALL_CONFIG, off_defaults, random_caption_batch
from helpers.shapes import shapes_run_config, shapes_train_command

MODULE = '''
import torch.nn.functional as F
from torch import nn

from bridgetower import Extensions, HeadSpec
from bridgetower.objectives.pretraining import Objective


def sigmoid(task, step):
    """Each pair of an image and a text on its own: do they belong together?"""
    similarities = task.model.image_embeds(step.image) @ task.model.text_embeds(step.texts["plain"]).T
    right = (step.batch.image_index[:, None] == step.batch.image_index[None]).float()
    loss = F.binary_cross_entropy_with_logits(10 * similarities - 5, right)
    return loss, {"sigmoid_accuracy": ((similarities > 0.5) == (right > 0.5)).float().mean()}


def count(task, step):
    """How many words are hidden, told from the image and what is left of the text."""
    fused = task.model.fuse(step.image, step.texts["masked"], outputs="pooled")
    hidden = (step.batch.mlm_labels >= 0).sum(dim=1)
    return F.mse_loss(task.model.head("count")(fused.pooled)[:, 0], hidden.float()), {}


def mean_rank(evaluation):
    """The negative mean rank of the right image, since higher is better."""
    result = evaluation.retrieval
    scores = result.text_vectors @ result.image_vectors.T
    own = scores.gather(1, result.truth.text_image_index[:, None])
    return -float((scores >= own).sum(dim=1).double().mean())


OWN = Extensions(
    heads={"count": HeadSpec(build=lambda config: nn.Linear(config.fusion.pooled_size, 1), inputs="pooled")},
    objectives={
        "sigmoid": Objective(loss=sigmoid, heads=("itc",), fuses=False),
        "count": Objective(loss=count, heads=("count",), texts=("masked",)),
    },
    metrics={"mean_rank": mean_rank},
)
'''


@pytest.fixture
def extensions_path(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    return f"{tmp_path / 'mine.py'}:OWN"


@pytest.fixture
def extensions(extensions_path):
    return load_object("extensions", extensions_path, Extensions)


class TestTask:
    CONFIG = replace(SMALL_CONFIG, heads=replace(SMALL_CONFIG.heads, custom=("count",)))

    def task(self, extensions, *phases):
        model = off_defaults(BridgeTower(self.CONFIG, extensions)).eval()
        return PretrainingTask(model, PretrainingConfig(phases=phases))

    def test_values_and_weights(self, extensions):
        batch = random_caption_batch((0, 1, 2, 2), [7, 4, 6, 5], self.CONFIG, seed=3)
        phase = Phase(mlm=1, itm=0, itc=2, objectives={"sigmoid": 0.5, "count": 3})
        task = self.task(extensions, phase)
        losses = task(batch)
        model = task.model
        image = model.image_embeds(model.encode_image(batch.pixel_values))
        cosines = (
            image @ model.text_embeds(model.encode_text(batch.input_ids, batch.attention_mask)).T
        )
        signs = 2 * (batch.image_index[:, None] == batch.image_index[None]).float() - 1
        torch.testing.assert_close(
            losses.terms["sigmoid"], -F.logsigmoid(signs * (10 * cosines - 5)).mean()
        )
        pooled = model(batch.pixel_values, batch.masked_input_ids, batch.attention_mask).pooled
        hidden = (batch.mlm_labels >= 0).sum(dim=1)
        expected = (model.count_head(pooled)[:, 0] - hidden).square().mean()
        torch.testing.assert_close(losses.terms["count"], expected, atol=1e-5, rtol=1e-4)
        plain = PretrainingTask(model, PretrainingConfig(phases=(replace(phase, objectives={}),)))(
            batch
        ).terms
        assert losses.terms.keys() == {"itc", "mlm", "sigmoid", "count"}
        torch.testing.assert_close({name: losses.terms[name] for name in plain}, plain)
        weighed = (
            plain["mlm"]
            + 2 * plain["itc"]
            + 0.5 * losses.terms["sigmoid"]
            + 3 * losses.terms["count"]
        )
        torch.testing.assert_close(losses.total, weighed)
        assert losses.metrics.keys() == {"mlm_accuracy", "sigmoid_accuracy"}

    @pytest.mark.parametrize(("objectives", "fusions"), [({"sigmoid": 1}, 0), ({"count": 1}, 1)])
    def test_no_more_is_computed_than_is_read(self, extensions, objectives, fusions):
        task = self.task(extensions, Phase(mlm=0, itm=0, objectives=objectives))
        calls = []
        model = task.model
        modules = {
            "vision": model.vision.patch_embedding,
            "text": model.text.word_embedding,
            "fusion": model.fusion,
        }
        for name, module in modules.items():
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
        task(random_caption_batch((0, 1, 2), [7, 4, 6], self.CONFIG, seed=3)).total.backward()
        assert [calls.count(name) for name in modules] == [1, 1, fusions]

    def test_errors(self, extensions):
        with pytest.raises(
            ValueError,
            match=r"phases is 'sigmiod'; expected one of itc, itm, mlm, sigmoid, count, or",
        ):
            self.task(extensions, Phase(objectives={"sigmiod": 1}))
        with pytest.raises(ValueError, match="no count head"):
            PretrainingTask(
                BridgeTower(SMALL_CONFIG, extensions),
                PretrainingConfig(phases=(Phase(objectives={"count": 1}),)),
            )
        with pytest.raises(
            ValueError, match=r"extensions\.objectives has 'itm', a name of the package"
        ):
            Extensions(objectives={"itm": extensions.objectives["sigmoid"]})


def test_by_the_command_line(run, extensions_path, tiny_dataset, tmp_path):
    """Trained with all of it, continued, selected by the metric, and measured."""
    out = tmp_path / "run"
    weights = ["--task.phases.0.itc", "0", "--task.phases.0.objectives", "sigmoid", "1"]
    weights += [
        "--task.phases.1.objectives",
        "sigmoid",
        "0.5",
        "count",
        "2",
        "--model.heads.custom",
        "count",
    ]
    options = ["--extensions", extensions_path, "--select-by", "mean_rank", *weights]
    options += [
        "--evaluate-every",
        "2",
        "--checkpoint-every",
        "2",
        "--data.num-workers",
        "0",
        "--device",
        "cpu",
    ]
    command = shapes_train_command(tiny_dataset, out, *options)
    run(*command, "--max-steps", 4)
    run(*command, "--max-steps", 6, "--resume")
    steps = read_metrics(out, "train")
    objectives = {"itc", "itm", "mlm", "sigmoid", "count"}
    assert [steps[number].keys() & objectives for number in (0, -1)] == [{"sigmoid"}, objectives]
    assert all("sigmoid_accuracy" in step for step in steps)
    ranks = [entry["mean_rank"] for entry in read_metrics(out, "validation")]
    assert len(ranks) == 3
    assert all(-9 <= rank <= -1 for rank in ranks)
    measured = (
        "evaluate",
        out / "best",
        "retrieval",
        "--data",
        tiny_dataset,
        "--split",
        "validation",
    )
    (report,) = run(
        *measured, "--max-captions", 1, "--extensions", extensions_path, "--device", "cpu"
    )
    assert report["mean_rank"] == pytest.approx(max(ranks), abs=1e-6)


def test_a_metric_that_nobody_has(tiny_dataset, tmp_path, extensions):
    config = shapes_run_config(tiny_dataset, select_by="mean_rnak")
    with pytest.raises(
        ValueError, match=r"select_by is 'mean_rnak'; expected one of rsum, .*, mean_rank"
    ):
        train(config, tmp_path / "run", extensions=extensions, progress=False)


def test_a_metric_of_the_package_is_not_replaced(tiny_checkpoint, tiny_dataset):
    model = load(
        tiny_checkpoint,
        extensions=Extensions(metrics={"rsum": lambda evaluation: 6.0}),
        device="cpu",
    )
    with pytest.raises(
        ValueError, match=r"extensions\.metrics has rsum, of the package; give it another name"
    ):
        evaluate(model, "retrieval", [tiny_dataset], "test", RetrievalConfig(candidates=2))
