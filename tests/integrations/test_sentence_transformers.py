"""sentence-transformers loads folders of this package: the same vectors and scores as of the predictor."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from bridgetower.checkpoints import UNMEASURED, Calibration, Reranking, write_reranking
from bridgetower.inference.predictor import load
from bridgetower.integrations import write_modules
from helpers.models import assert_close

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402

from bridgetower.integrations.sentence_transformers import EmbeddingModule, MatchingModule  # noqa: E402

CALIBRATION = Calibration(
    slope=0.5, intercept=-2.0, pairs=9, matching=1, ece_before=0.4, ece_after=0.1
)
TEXTS = ["red circle on black", "a bar", "a square that is blue " * 9]  # the last one is cut


@pytest.fixture(scope="module")
def embedder(comparable_checkpoint):
    return sentence_transformers.SentenceTransformer(
        modules=[EmbeddingModule(comparable_checkpoint)], device="cpu"
    )


class TestEncode:
    def test_texts_images_and_both_in_one_call(self, embedder, comparable_predictor, image_files):
        texts = comparable_predictor.embed_texts(TEXTS, truncate=True)
        pictures = comparable_predictor.embed_images(image_files)
        pairs = comparable_predictor.embed_pairs(image_files[:2], TEXTS[:2])
        opened = Image.open(image_files[2])
        inputs = [
            TEXTS[2],
            opened,
            {"text": TEXTS[0], "image": image_files[0]},
            image_files[1],
            {"image": opened},
            TEXTS[0],
        ]
        expected = [texts[2], pictures[2], pairs[0], pictures[1], pictures[2], texts[0]]
        assert_close(embedder.encode(inputs, batch_size=4), np.stack(expected))
        assert_close(embedder.encode(TEXTS[0]), texts[0])
        assert_close(
            embedder.encode({"text": TEXTS[1], "image": np.asarray(Image.open(image_files[1]))}),
            pairs[1],
        )

    def test_similarity_and_prompts(self, embedder, comparable_predictor):
        assert_close(
            embedder.encode([TEXTS[0]], prompt="a picture of "),
            comparable_predictor.embed_texts(f"a picture of {TEXTS[0]}"),
        )
        vectors = embedder.encode_query(TEXTS[:2])
        assert_close(
            embedder.similarity(vectors, vectors),
            comparable_predictor.embed_texts(TEXTS[:2])
            @ comparable_predictor.embed_texts(TEXTS[:2]).T,
        )
        assert embedder.max_seq_length == 24
        assert embedder.get_embedding_dimension() == comparable_predictor.embed_texts("a").shape[1]

    def test_a_copy_for_another_process(self, embedder):
        copy = pickle.loads(pickle.dumps(embedder))  # as a pool of processes gets it
        assert_close(copy.encode(TEXTS), embedder.encode(TEXTS))

    def test_what_it_cannot_embed(self, embedder, tiny_checkpoint):
        cases = [
            (
                [("a", "b"), Image.new("RGB", (8, 8))],
                "an input is text; expected a text, an image, or a dict",
            ),
            ([[{"role": "user", "content": "a"}]], "an input is message; expected a text"),
            (
                [{"text": ["a", "b"], "image": "a.png"}],
                "expected a text, an image, or a dict with text, image or both",
            ),
            ([{"text": "a", "picture": "a.png"}], "unrecognized modality keys"),
            ([np.zeros(9)], "audio"),
        ]
        for inputs, words in cases:
            with pytest.raises(ValueError, match=words):
                embedder.encode(inputs)
        model = sentence_transformers.SentenceTransformer(
            modules=[EmbeddingModule(tiny_checkpoint)], device="cpu"
        )
        pair = {"text": "a bar", "image": Image.new("RGB", (8, 8))}
        assert model.encode([pair]).shape == (1, 16)
        with pytest.raises(
            ValueError, match=r"vectors of \[8, 16\] numbers; encode images with texts in a call"
        ):
            model.encode([pair, "a bar"])


class TestFolders:
    def test_convert_writes_what_it_loads(self, run, comparable_predictor, image_files, tmp_path):
        for kind in ("sentence-transformers", "cross-encoder"):
            (line,) = run("convert", comparable_predictor.source, tmp_path / kind, "--to", kind)
            assert line["format"] == kind
        embedder = sentence_transformers.SentenceTransformer(
            str(tmp_path / "sentence-transformers"), trust_remote_code=True, device="cpu"
        )
        assert_close(embedder.encode(image_files), comparable_predictor.embed_images(image_files))
        ranker = sentence_transformers.CrossEncoder(
            str(tmp_path / "cross-encoder"), trust_remote_code=True, device="cpu"
        )
        expected = comparable_predictor.match(image_files, TEXTS[0:1] * 3)
        assert_close(ranker.predict([(TEXTS[0], image) for image in image_files]), expected)

        embedder.save_pretrained(str(tmp_path / "again"))
        again = sentence_transformers.SentenceTransformer(
            str(tmp_path / "again"), trust_remote_code=True, device="cpu"
        )
        assert_close(again.encode(TEXTS), embedder.encode(TEXTS))
        assert load(tmp_path / "again").fingerprint == comparable_predictor.fingerprint

    def test_options_of_loading(self, comparable_predictor, tmp_path):
        with pytest.raises(ValueError, match="expected model_kwargs, as of"):
            EmbeddingModule.load(comparable_predictor.source, processor_kwargs={"a": 1})
        larger = EmbeddingModule.load(comparable_predictor.source, model_kwargs={"image_size": 30})
        assert larger.predictor.processor.config.image_size == 30
        with pytest.raises(FileNotFoundError, match="expected the folder of a model"):
            write_modules(tmp_path)


@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_images_for_a_text_and_texts_for_an_image(
    tiny_checkpoint, image_files, calibration, tmp_path
):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    write_reranking(folder, Reranking(calibration=calibration))
    ranker = sentence_transformers.CrossEncoder(modules=[MatchingModule(folder)], device="cpu")
    scores = load(folder, device="cpu").match(image_files, TEXTS[:2], all_pairs=True)
    for query, documents, expected in (
        (TEXTS[0], image_files, scores[:, 0]),
        (Image.open(image_files[1]), TEXTS[:2], scores[1]),
    ):
        scores_by_id = {hit["corpus_id"]: hit["score"] for hit in ranker.rank(query, documents)}
        assert_close([scores_by_id[number] for number in range(len(documents))], expected)
        assert list(scores_by_id.values()) == sorted(scores_by_id.values(), reverse=True)
    image = Image.new("RGB", (8, 8))
    for pair in (("a", "b"), (image, image), ("a", {"text": "a", "image": "b.png"})):
        with pytest.raises(ValueError, match="expected an image and a text"):
            ranker.predict([pair])


st = sentence_transformers
OPTIONS = {
    "max_steps": 12,
    "learning_rate": 5e-3,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
}
OPTIONS |= {"per_device_train_batch_size": 9}
NAMES = ["red", "green", "blue"]


def started(kind, checkpoint, folder):
    shutil.copytree(checkpoint, folder / "start")
    write_reranking(folder / "start", Reranking(calibration=CALIBRATION))
    write_modules(
        folder / "start",
        "sentence-transformers" if kind is st.SentenceTransformer else "cross-encoder",
    )
    return kind(str(folder / "start"), trust_remote_code=True, device="cpu")


class TestTraining:
    @pytest.mark.parametrize("matryoshka", [False, True])
    def test_vectors(self, comparable_checkpoint, image_files, tmp_path, matryoshka):
        model = started(st.SentenceTransformer, comparable_checkpoint, tmp_path)
        assert not model.encode(
            image_files, convert_to_tensor=True
        ).requires_grad  # of packed weights, which cannot train
        start = {name: weight.clone() for name, weight in model.state_dict().items()}
        loss = losses.MultipleNegativesRankingLoss(model)
        loss = losses.MatryoshkaLoss(model, loss, [8, 4]) if matryoshka else loss

        @torch.no_grad()
        def lost():
            return float(loss([model.preprocess(column) for column in (NAMES, image_files)], None))

        untrained = lost()
        options = st.SentenceTransformerTrainingArguments(tmp_path / "run", **OPTIONS)
        data = Dataset.from_dict({"text": NAMES, "image": image_files})
        st.SentenceTransformerTrainer(model, options, train_dataset=data, loss=loss).train()
        vectors = model.encode(image_files)  # also ends dropout
        assert lost() < 0.7 * untrained
        moved = [
            name
            for name, weight in model.state_dict().items()
            if not torch.equal(weight, start[name])
        ]
        for prefix in ("vision.layers.0.", "text.layers.0.", "itc_head.image.", "itc_head.text."):
            assert any(name.startswith(f"0.network.{prefix}") for name in moved)
        model.save_pretrained(str(tmp_path / "saved"))
        again = st.SentenceTransformer(
            str(tmp_path / "saved"), trust_remote_code=True, device="cpu"
        )
        for other in (
            again.encode(image_files),
            pickle.loads(pickle.dumps(model)).encode(image_files),
        ):
            assert_close(other, vectors)
        assert_close(load(tmp_path / "saved", device="cpu").embed_images(image_files), vectors)

    def test_a_loss_that_cuts_batches_has_the_same_gradients(
        self, comparable_checkpoint, image_files
    ):
        gradients = []
        for options in ({}, {"mini_batch_size": 2}):
            model = st.SentenceTransformer(
                modules=[EmbeddingModule(comparable_checkpoint)], device="cpu"
            ).eval()
            kind = (
                losses.CachedMultipleNegativesRankingLoss
                if options
                else losses.MultipleNegativesRankingLoss
            )
            kind(model, **options)(
                [model.preprocess(column) for column in (TEXTS, image_files)], None
            ).backward()
            gradients.append(
                {
                    name: parameter.grad
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                }
            )
        assert gradients[0].keys() == gradients[1].keys() != set()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)

    def test_scores(self, comparable_checkpoint, image_files, tmp_path):
        model = started(st.CrossEncoder, comparable_checkpoint, tmp_path)
        pairs = [(name, image) for name in NAMES for image in image_files]
        right = torch.eye(3).flatten()

        def lost():
            scores = model.predict(pairs, activation_fn=torch.nn.Identity(), convert_to_tensor=True)
            return float(torch.nn.functional.binary_cross_entropy_with_logits(scores, right))

        untrained = lost()
        options = st.CrossEncoderTrainingArguments(tmp_path / "run", **OPTIONS)
        texts, pictures = map(list, zip(*pairs, strict=True))
        data = Dataset.from_dict({"text": texts, "image": pictures, "label": right.tolist()})
        st.CrossEncoderTrainer(
            model, options, train_dataset=data, loss=BinaryCrossEntropyLoss(model)
        ).train()
        assert lost() < 0.9 * untrained
        model.save_pretrained(str(tmp_path / "saved"))
        scores = model.predict(pairs)
        saved = load(tmp_path / "saved", device="cpu")
        assert_close(saved.match(pictures, texts), scores)
        assert saved.reranking == UNMEASURED  # its calibration was of other weights
        assert_close(
            st.CrossEncoder(str(tmp_path / "saved"), trust_remote_code=True, device="cpu").predict(
                pairs
            ),
            scores,
        )
        with pytest.raises(ValueError, match="a text has no image; expected pairs"):
            model(model.preprocess(["a red flag"]))
