"""The downstream tasks on small models: losses, predictions, what is encoded, and what they refuse."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bridgetower.data.batches.batch import Batch, RankingBatch
from bridgetower.objectives.classification import task_of_head
from bridgetower.objectives.config import RankingConfig
from bridgetower.objectives.losses import random_pairs
from bridgetower.objectives.pretraining import RankingTask
from helpers.models import build_model, changed_config, random_images, random_texts

LENGTHS = (5, 3, 4)


def small_model(**heads):
    changes = {
        f"heads__{name}": value for name, value in {"mlm": False, "itc": None, **heads}.items()
    }
    return build_model(
        changed_config(**changes, fusion__num_token_types=3 if heads.get("nlvr2") else 2)
    )


def token_rows(count=1):
    ids, mask = random_texts([length for length in LENGTHS for _ in range(count)])
    return {"input_ids": ids, "attention_mask": mask}


def test_accuracy_is_that_of_the_likelier_answer_to_each_class():
    network = small_model(classification=2, multi_label=True)
    with torch.no_grad():  # logits between those of probabilities 0.5 and 0.62
        network.classification_head.decoder.weight.zero_()
        network.classification_head.decoder.bias.copy_(torch.tensor([0.3, -0.3]))
    batch = Batch(
        pixel_values=random_images(3), labels=torch.tensor([[1, 0], [1, 1], [1, 0]]), **token_rows()
    )
    assert float(
        task_of_head(network, "classification")(batch).metrics["label_accuracy"]
    ) == pytest.approx(5 / 6)


def test_dropout_before_the_head_of_nlvr2():
    network = small_model(nlvr2=True, nlvr2_dropout=0.5)
    seen = []
    network.nlvr2_head.dense.register_forward_hook(
        lambda _module, args, _output: seen.append(args[0])
    )
    network.nlvr2_head.train()
    pixels = {"pixel_values": random_images(3), "pixel_values_2": random_images(3, seed=1)}
    task_of_head(network, "nlvr2")(Batch(labels=torch.tensor([0, 1, 1]), **pixels, **token_rows()))
    assert 0.2 < (seen[0] == 0).float().mean().item() < 0.8


class TestRanking:
    NUM_TEXTS = 4

    @pytest.fixture
    def batch(self):
        return RankingBatch(
            pixel_values=random_images(3),
            image_index=torch.arange(3),
            seed=1,
            **token_rows(self.NUM_TEXTS),
        )

    def test_each_image_with_each_of_its_texts(self, batch):
        network = small_model(rank=True)
        losses = RankingTask(network, RankingConfig(false_texts=3, itm=0))(batch)
        pixels = batch.pixel_values.repeat_interleave(self.NUM_TEXTS, dim=0)
        pooled = network(pixels, batch.input_ids, batch.attention_mask).pooled
        scores = network.rank_head.fc(pooled).reshape(3, self.NUM_TEXTS)
        assert losses.total.item() == pytest.approx(
            -scores.log_softmax(dim=1)[:, 0].mean().item(), rel=1e-5
        )
        assert losses.metrics["rank_accuracy"] == (scores.argmax(dim=1) == 0).float().mean()
        assert losses.terms.keys() == {"rank"}

    def test_image_is_encoded_once_and_matching_stands_beside_it(self, batch):
        network = small_model(rank=True)
        sizes = []
        network.vision.register_forward_hook(
            lambda _module, args, _output: sizes.append(len(args[0]))
        )
        losses = RankingTask(network, RankingConfig(itm=0.5))(batch)
        assert sizes == [3]
        assert losses.total.item() == pytest.approx(
            (losses.terms["rank"] + 0.5 * losses.terms["itm"]).item()
        )

    def test_of_one_image_only_matching_is_left_out(self, batch):
        batch = replace(batch, image_index=torch.ones(3, dtype=torch.long))
        losses = RankingTask(small_model(rank=True), RankingConfig(itm=0.5))(batch)
        assert losses.terms["itm"] == 0
        assert losses.total == losses.terms["rank"]

    def test_matching_is_of_true_texts_with_images_that_the_seed_draws(self, batch):
        network = small_model(rank=True)
        for seed in range(4):
            images, text_rows, labels = random_pairs(
                batch.image_index, torch.Generator().manual_seed(seed)
            )
            rows = text_rows * self.NUM_TEXTS
            pooled = network(
                batch.pixel_values[images], batch.input_ids[rows], batch.attention_mask[rows]
            ).pooled
            loss = RankingTask(network, RankingConfig())(replace(batch, seed=seed)).terms["itm"]
            torch.testing.assert_close(loss, F.cross_entropy(network.itm_logits(pooled), labels))

    def test_matching_head_stays_as_it_is(self, batch):
        """Official: it is frozen, and trains what comes before it."""
        network = small_model(rank=True)
        RankingTask(network, RankingConfig())(batch).total.backward()
        assert network.itm_head.fc.weight.grad is None
        assert network.rank_head.fc.weight.grad is not None


def test_numbers():
    task = task_of_head(small_model(classification=1, itm=False), "classification")
    batch = Batch(
        pixel_values=random_images(3), labels=torch.tensor([0.5, 4.2, 3.0]), **token_rows()
    )
    predicted = task.predict(batch)[:, 0]
    assert task(batch).total.item() == pytest.approx(
        ((predicted - batch.labels) ** 2).mean().item(), rel=1e-5
    )
    assert task(batch).metrics == {}


def test_without_labels():
    task = task_of_head(small_model(snli_ve=True), "snli_ve")
    batch = Batch(pixel_values=random_images(3), **token_rows())
    assert len(task.predict(batch)) == 3
    with pytest.raises(ValueError, match="this batch has no labels"):
        task(batch)
