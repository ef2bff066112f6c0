"""Heads of every kind of input and output, custom ones among them, in Python and over HTTP."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from bridgetower import BridgeTower, Extensions, HeadSpec
from bridgetower.checkpoints import Checkpoint, read_checkpoint
from bridgetower.engines.engine import TorchEngine
from bridgetower.inference.predictor import Predictor
from helpers.servers import PNGS, URIS, error_of, start_server

TEXTS = ["what colour?", "is it a bar on black"]
IMAGES = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue")]
HEADS = {
    "mood": HeadSpec(
        build=lambda config: nn.Linear(config.fusion.pooled_size, 3),
        inputs="pooled",
        outputs="sigmoid",
    ),
    "brightness": HeadSpec(
        build=lambda config: nn.Linear(config.vision.hidden_size, 1),
        inputs="image_cls",
        outputs="number",
    ),
    "language": HeadSpec(
        build=lambda config: nn.Linear(config.text.hidden_size, 2), inputs="text_cls"
    ),
    "order": HeadSpec(
        build=lambda config: nn.Linear(2 * config.fusion.pooled_size, 1),
        inputs="pooled_pair",
        outputs=lambda heads: "number",
    ),
}
LABELS = {"mood": ("calm", "loud", "sad"), "language": ("en", "de")}


@pytest.fixture(scope="module")
def headed_predictor(answering_checkpoint):
    trained = read_checkpoint(answering_checkpoint)
    heads = replace(trained.config.heads, custom=tuple(HEADS), rank=True, mlm=True)
    config = replace(trained.config, heads=heads)
    torch.manual_seed(0)
    model = BridgeTower(config, Extensions(heads=HEADS))
    tensors = model.state_dict() | trained.tensors
    checkpoint = Checkpoint(
        source="custom",
        config=config,
        tensors=tensors,
        extensions=Extensions(heads=HEADS),
        processor=trained.processor,
        labels={**trained.labels, **LABELS},
    )
    return Predictor(checkpoint, TorchEngine(checkpoint.model(), torch.device("cpu")))


@pytest.fixture(scope="module")
def head_features(headed_predictor):
    """What each kind of head reads of the images and texts."""
    model = headed_predictor.model
    processor = headed_predictor.processor
    tokens = processor.texts(TEXTS)
    with torch.no_grad():
        image = model.encode_image(processor.images(IMAGES))
        second = model.encode_image(processor.images(IMAGES[::-1]), 2)
        text = model.encode_text(tokens.input_ids, tokens.attention_mask)
        pooled = model.fuse(image, text).pooled
        pair = torch.cat([pooled, model.fuse(second, text).pooled], dim=1)
    return {"pooled": pooled, "pooled_pair": pair, "image_cls": image.cls, "text_cls": text.cls}


def logits(predictor, features, head):
    spec = predictor.model.extensions.head_specs[head]
    with torch.no_grad():
        return predictor.model.head(head)(features[spec.inputs])


def by_label(choices):
    return [{choice.label: choice.probability for choice in row} for row in choices]


def test_probabilities_and_numbers_are_as_the_head_says(headed_predictor, head_features):
    def expected(head, names, probabilities):
        return [
            pytest.approx(dict(zip(names, row, strict=True)), abs=1e-5)
            for row in probabilities(logits(headed_predictor, head_features, head)).tolist()
        ]

    mood = by_label(headed_predictor.predict("mood", IMAGES, TEXTS))
    assert mood == expected("mood", LABELS["mood"], torch.sigmoid)
    language = by_label(headed_predictor.predict("language", texts=TEXTS))
    assert language == expected("language", LABELS["language"], lambda x: x.softmax(dim=1))
    brightness = headed_predictor.predict("brightness", IMAGES)
    torch.testing.assert_close(
        brightness, logits(headed_predictor, head_features, "brightness")[:, 0]
    )
    order = headed_predictor.predict("order", IMAGES, TEXTS, IMAGES[::-1], batch_size=1)
    torch.testing.assert_close(
        order, logits(headed_predictor, head_features, "order")[:, 0], atol=1e-5, rtol=0
    )
    rank = headed_predictor.predict("rank", IMAGES, TEXTS)
    torch.testing.assert_close(
        rank, logits(headed_predictor, head_features, "rank"), atol=1e-5, rtol=0
    )


def test_verbs_are_predictions_of_their_heads(headed_predictor):
    for verb, head in (("answer", "vqa"), ("entail", "snli_ve")):
        top = {"top": 2} if verb == "answer" else {}
        verbs = getattr(headed_predictor, verb)(IMAGES, TEXTS, **top)
        assert verbs == headed_predictor.predict(head, IMAGES, TEXTS, **top)
    first, second = IMAGES[:2]
    prediction = headed_predictor.predict("nlvr2", first, TEXTS[0], second, top=1)
    assert prediction == headed_predictor.reason(first, second, TEXTS[0])[:1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("manners", IMAGES, TEXTS), "head is 'manners'; expected one of"),
        (("mlm", IMAGES, TEXTS), r"masked-language \(MLM\) head predicts no classes and no number"),
        (("vqa", IMAGES, TEXTS, IMAGES), "the vqa head reads one image"),
        (("order", IMAGES, TEXTS), "the order head reads two images"),
        (("brightness", IMAGES, TEXTS), "the brightness head reads images alone"),
        (("brightness",), "the brightness head reads images alone"),
        (("language", IMAGES), "the language head reads texts alone"),
        (("mood",), "neither images nor texts given"),
    ],
)
def test_inputs_that_a_head_does_not_read(headed_predictor, arguments, message):
    with pytest.raises(ValueError, match=message):
        headed_predictor.predict(*arguments)


def test_over_http(headed_predictor):
    with start_server(headed_predictor, name="custom") as running:
        (model,) = running.client.get("/v1/models").json()["data"]
        assert model["heads"] == ["rank", "vqa", "snli_ve", "nlvr2", *HEADS]

        def post(**body):
            return running.client.post("/v1/predict", json=body)

        rows = post(head="mood", images=URIS[:2], texts=TEXTS, top=2).json()["data"]
        expected = headed_predictor.predict("mood", list(PNGS[:2]), TEXTS, top=2)
        assert [row["index"] for row in rows] == [0, 1]
        scores = [
            {choice["label"]: choice["probability"] for choice in row["classes"]} for row in rows
        ]
        assert scores == [pytest.approx(row, abs=1e-5) for row in by_label(expected)]
        for head, numbers in (("brightness", [0]), ("order", [0, 1])):
            names = ("images", "images_2")[: len(numbers)]
            texts = {"texts": TEXTS} if head == "order" else {}
            sent = {
                name: URIS[number : number + 1] * 2
                for name, number in zip(names, numbers, strict=True)
            }
            images = {name: [PNGS[number]] * 2 for name, number in zip(names, numbers, strict=True)}
            rows = post(head=head, **sent, **texts).json()["data"]
            expected = headed_predictor.predict(head, **images, **texts).tolist()
            assert [row["number"] for row in rows] == pytest.approx(expected, abs=1e-5)
        assert len(post(head="language", texts=TEXTS).json()["data"][0]["classes"]) == 2

        assert error_of(post(head="itm", images=URIS[0], texts="a"), 400)["param"] == "head"
        assert error_of(post(head="brightness", images=URIS[0], texts="a"), 400)["param"] == "texts"
        assert error_of(post(head="language", images=URIS[0], texts="a"), 400)["param"] == "images"
        two = {"images": URIS[0], "images_2": URIS[0], "texts": "a"}
        assert error_of(post(head="mood", **two), 400)["param"] == "images_2"
        assert error_of(post(head="order", images=URIS[0], texts="a"), 400)["param"] == "images_2"
