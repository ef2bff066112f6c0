"""The whole model: encodings are cut, joined, repeated, padded and fused in any order without a change."""

import inspect
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bridgetower.model.bridges import BRIDGES
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.fusion import Encoded, Fused, IndexedLayers
from bridgetower.model.presets import meter, meter_with_norms
from helpers.models import (
    SMALL_CONFIG,
    build_model,
    changed_config,
    max_difference,
    output_weights,
    random_encodings,
    random_images,
    random_texts,
)


@pytest.fixture(scope="module", autouse=True)
def double_precision():
    """Only a real difference is then a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


ATOL = 1e-9
LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=4)
VARIANTS = {
    "bridges": SMALL_CONFIG,
    "meter": meter(SMALL_CONFIG),
    "norms": meter_with_norms(SMALL_CONFIG),
    "distilled": changed_config(vision__distillation_token=True),
    "scaled": changed_config(fusion__bridge="scaled_add"),
    "interpolated": changed_config(fusion__bridge="interpolate", fusion__separate_projections=True),
    "bert and timm": changed_config(
        text__positions="bert",
        vision__activation="gelu",
        vision__pre_norm=False,
        vision__patch_bias=True,
    ),
    "gated": changed_config(fusion__bridge="gated"),
    "static": changed_config(
        fusion__bridge="static_manager", fusion__vision_layers=(2, 3, 4), fusion__text_layers=(2,)
    ),
    "adaptive manager": changed_config(
        fusion__bridge="adaptive_manager", fusion__layer_embeddings=True
    ),
    "three layers": changed_config(fusion__num_layers=3),
    "one layer": changed_config(fusion__num_layers=1),
    "chosen layers": changed_config(fusion__vision_layers=(1, 4), fusion__text_layers=(1, 3)),
}


@cache
def built_variant(name="bridges"):
    return build_model(VARIANTS[name])


@pytest.fixture(params=VARIANTS)
def variant_model(request):
    return built_variant(request.param)


def close(actual, expected):
    return all(
        max_difference(getattr(actual, name), getattr(expected, name)) < ATOL
        for name in ("text", "image", "pooled")
    )


class TestComposition:
    def test_forward_is_encode_and_fuse(self, variant_model):
        image, text = random_encodings(variant_model)
        fused = variant_model.fuse(image, text, "all")
        whole = variant_model(random_images(3), *random_texts([5, 3, 4]))
        assert all(
            torch.equal(getattr(fused, name), getattr(whole, name))
            for name in ("text", "image", "pooled")
        )

    def test_pooled_is_text_then_image(self, variant_model):
        fused = variant_model.fuse(*random_encodings(variant_model), "all")
        expected = [variant_model.text_pooler(fused.text), variant_model.image_pooler(fused.image)]
        assert torch.equal(fused.pooled, torch.cat(expected, dim=-1))

    def test_encodings(self, variant_model):
        def vector(embedding, layer):
            return 0.0 if embedding is None else embedding.weight[layer - 1]

        config = variant_model.config
        pixels = random_images(2)
        (ids, mask) = random_texts([5, 3])
        image = variant_model.encode_image(pixels)
        text = variant_model.encode_text(ids, mask)
        states = (
            variant_model.vision(pixels, config.vision_layers),
            variant_model.text(ids, mask.bool(), config.text_layers),
        )
        for encoded, hidden, kind, layers, projections, embedding in (
            (
                image,
                states[0],
                1,
                config.vision_layers,
                variant_model.image_projections,
                variant_model.image_layer_embedding,
            ),
            (
                text,
                states[1],
                0,
                config.text_layers,
                variant_model.text_projections,
                variant_model.text_layer_embedding,
            ),
        ):
            for index, layer in enumerate(encoded.layers):
                expected = projections[index if config.fusion.separate_projections else 0](
                    hidden[index]
                )
                expected = (
                    expected
                    + variant_model.token_type_embedding.weight[kind]
                    + vector(embedding, layers[index])
                )
                assert max_difference(layer, expected) < ATOL
            assert torch.equal(encoded.cls, hidden[-1][:, 0])
            assert len(encoded.layers) == len(layers)
        assert image.mask is None
        assert torch.equal(text.mask, mask.bool())


class TestBatches:
    @settings(max_examples=15, deadline=None)
    @given(lengths=LENGTHS, padding=st.integers(0, 6), name=st.sampled_from(list(VARIANTS)))
    def test_padding_changes_nothing(self, lengths, padding, name):
        model = built_variant(name)
        pixels = random_images(len(lengths))
        (ids, mask) = random_texts(lengths)
        wider = random_texts(lengths, width=max(lengths) + padding)
        single = model(pixels, ids, mask)
        other = model(pixels, *wider)
        assert max_difference(single.pooled, other.pooled) < ATOL
        assert max_difference(single.image, other.image) < ATOL
        assert max_difference(single.text[mask.bool()], other.text[wider[1].bool()]) < ATOL

    def test_masks(self, variant_model):
        pixels = random_images(2)
        (ids, mask) = random_texts([5, 3])
        full = random_texts([5, 5])
        assert (
            max_difference(
                variant_model(pixels, ids, mask).pooled, variant_model(pixels, ids).pooled
            )
            > 1e-3
        )
        assert close(variant_model(pixels, *full), variant_model(pixels, full[0]))
        assert torch.equal(
            variant_model.encode_text(ids, mask).cls,
            variant_model.encode_text(ids, mask.bool()).cls,
        )

    @settings(max_examples=15, deadline=None)
    @given(
        order=st.permutations(range(4)), cut=st.integers(1, 3), name=st.sampled_from(list(VARIANTS))
    )
    def test_order_and_batching_change_nothing(self, order, cut, name):
        model = built_variant(name)
        pixels = random_images(4)
        (ids, mask) = random_texts([5, 3, 4, 1])
        whole = model(pixels, ids, mask)
        for rows in (order[:cut], order[cut:]):
            selected = Fused(whole.text[rows], whole.image[rows], whole.pooled[rows])
            assert close(model(pixels[rows], ids[rows], mask[rows]), selected)


def gradients_of_loss(model, outputs, loss):
    pixels = random_images(3).requires_grad_()
    image = model.encode_image(pixels)
    text = model.encode_text(*random_texts([5, 3, 4]))
    leaves = {**dict(model.named_parameters()), "pixel_values": pixels}
    leaves |= {f"image layer {number}": layer for number, layer in enumerate(image.layers)}
    leaves |= {f"text layer {number}": layer for number, layer in enumerate(text.layers)}
    grads = torch.autograd.grad(
        loss(model.fuse(image, text, outputs)), list(leaves.values()), allow_unused=True
    )
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), grads, strict=True)
    }


class TestReading:
    @pytest.mark.parametrize("outputs", ["pooled", "text"])
    def test_gradients(self, variant_model, outputs):
        shape = {"pooled": (3, 32), "text": (3, 5, 16)}[outputs]
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        gradients_alone, everything = (
            gradients_of_loss(
                variant_model, requested, lambda fused: (getattr(fused, outputs) * weights).sum()
            )
            for requested in (outputs, "all")
        )
        assert gradients_alone.keys() == everything.keys()
        assert [
            name
            for name in gradients_alone
            if max_difference(gradients_alone[name], everything[name]) > ATOL
        ] == []
        assert gradients_alone["pixel_values"].abs().max() > 1e-6

    def test_control_other_reads_have_other_gradients(self):
        model = build_model()
        pooled = gradients_of_loss(model, "all", lambda fused: fused.pooled.sum())
        text = gradients_of_loss(model, "all", lambda fused: fused.text.sum())
        assert max(max_difference(pooled[name], text[name]) for name in pooled) > 0.1

    @pytest.mark.parametrize(
        ("outputs", "missing"),
        [("pooled", ["text", "image"]), ("text", ["image", "pooled"]), ("all", [])],
    )
    def test_what_was_not_asked_for_is_none(self, outputs, missing):
        fused = build_model().fuse(*random_encodings(build_model()), outputs)
        assert [name for name, output in fused._asdict().items() if output is None] == missing
        assert all(len(output) == 3 for output in fused if output is not None)

    def test_a_name_that_is_not_there(self):
        # without the annotations' own check
        fuse = inspect.unwrap(BridgeTower.fuse)
        model = build_model()
        with pytest.raises(
            ValueError, match="outputs is 'typo'; expected one of pooled, text, all"
        ):
            fuse(model, *random_encodings(model), outputs="typo")


class TestTokenTypes:
    def test_second_image(self):
        model = build_model(changed_config(fusion__num_token_types=3))
        first, second = (
            model.encode_image(random_images(2), token_type=number) for number in (1, 2)
        )
        types = model.token_type_embedding.weight
        for first_layer, second_layer in zip(first.layers, second.layers, strict=True):
            assert (
                max_difference(
                    second_layer - first_layer, (types[2] - types[1]).expand_as(first_layer)
                )
                < ATOL
            )
        assert torch.equal(first.cls, second.cls)

    def test_a_type_that_is_not_there(self):
        for kind in (2, -1):
            with pytest.raises(
                ValueError,
                match=rf"token type {kind}; this model has 2: set fusion\.num_token_types",
            ):
                build_model().encode_image(random_images(1), token_type=kind)


class TestErrors:
    def test_unequal_numbers(self):
        image, text = random_encodings(build_model())
        with pytest.raises(
            ValueError, match="1 images and 2 texts; expected one text per image: index them first"
        ):
            build_model().fuse(image[:1], text[:2])

    def test_annotations_are_checked_in_these_tests(self):
        """Else none of the shapes above would be."""
        ids, mask = random_texts([5, 3])
        with pytest.raises(TypeCheckError):
            build_model().encode_text(ids, mask[:, :4])
        with pytest.raises(TypeCheckError):
            build_model().encode_image(random_images(2)[0])


def test_texts_padded_for_compiled_layers_end_with_the_position_table():
    model = build_model()
    model.text_multiple = 8
    longest = model.config.text.max_length
    assert longest % 8
    for length, padded in ((7, 8), (8, 8), (longest - 1, longest), (longest, longest)):
        assert model.encode_text(torch.full((1, length), 5)).layers[0].shape[1] == padded
    with pytest.raises(
        ValueError, match=f"text of {longest + 1} tokens; the position table holds {longest}"
    ):
        model.encode_text(torch.full((1, longest + 1), 5))


class TestModes:
    def test_dropout_in_training_only(self):
        model = build_model()
        assert torch.equal(
            model.fuse(*random_encodings(model)).pooled,
            model.fuse(*random_encodings(model)).pooled,
        )
        image = model.encode_image(random_images(3))
        model.train()
        assert (
            max_difference(
                model.fuse(*random_encodings(model)).pooled,
                model.fuse(*random_encodings(model)).pooled,
            )
            > 1e-3
        )
        assert torch.equal(model.encode_image(random_images(3)).cls, image.cls), (
            "the image tower has none"
        )

    def test_every_parameter_learns(self):
        model = build_model()
        image, text = random_encodings(model)
        fused = model.fuse(image, text, "all")
        outputs = [fused.text.sum(), fused.image.sum(), model.mlm_logits(fused.text).sum()]
        outputs += [
            model.itm_logits(fused.pooled).sum(),
            model.head("itc").logit_scale(),
        ]
        outputs += [model.image_embeds(image).sum(), model.text_embeds(text).sum()]
        torch.stack(outputs).sum().backward()
        assert [name for name, value in model.named_parameters() if value.grad is None] == []

    def test_half_precision(self):
        model = build_model().to(torch.bfloat16)
        fused = model(random_images(2).to(torch.bfloat16), *random_texts([5, 3]))
        assert fused.pooled.dtype == torch.bfloat16
        assert (
            max_difference(
                fused.pooled.double(), build_model()(random_images(2), *random_texts([5, 3])).pooled
            )
            < 0.15
        )


ROWS = torch.tensor([0, 1, 2, 2, 0, 1, 0, 1, 2])
OTHERS = torch.tensor([0, 1, 2, 0, 1, 2, 1, 2, 0])


OUTPUTS = {"pooled": "pooled", "text": "text", "all": "image"}


def fused_with_cache(model, image, text):
    return model.cache_image(image), model.cache_text(text)


def gradients_of_output(output, parameters):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(
        (output * weights).sum(), list(parameters.values()), allow_unused=True
    )
    return {
        name: torch.zeros(()) if grad is None else grad
        for name, grad in zip(parameters, grads, strict=True)
    }


def same_encoded(first, second):
    is_token = (
        torch.ones(first.layers[0].shape[:2], dtype=torch.bool)
        if first.mask is None
        else first.mask
    )
    layers = all(
        max_difference(a[is_token], b[is_token]) < ATOL
        for a, b in zip(first.layers, second.layers, strict=True)
    )
    return layers and max_difference(first.cls, second.cls) < ATOL


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_indexing_with_repeats_is_encoding_repeats(rows):
    model = built_variant()
    pixels = random_images(3)
    (ids, mask) = random_texts([5, 3, 4])
    index = torch.tensor(rows)
    assert same_encoded(model.encode_image(pixels)[index], model.encode_image(pixels[index]))
    assert same_encoded(
        model.encode_text(ids, mask)[index],
        model.encode_text(ids[index], mask[index]),
    )
    pairs = model.fuse(
        model.encode_image(pixels)[index],
        model.encode_text(ids, mask)[index.flip(0)],
    )
    expected = model(pixels[index], ids[index.flip(0)], mask[index.flip(0)])
    assert max_difference(pairs.pooled, expected.pooled) < ATOL


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
        (slice(1, None), [1, 2]),
        (torch.tensor([], dtype=torch.long), []),
    ],
    ids=["numbers", "choice", "slice", "nothing"],
)
def test_kinds_of_index(index, rows):
    for encoded in random_encodings(build_model()):
        selected = encoded[index]
        assert len(selected) == len(rows)
        assert torch.equal(selected.cls, encoded.cls[rows])
        assert all(
            torch.equal(layer, many[rows])
            for layer, many in zip(selected.layers, encoded.layers, strict=True)
        )
        assert (selected.mask is None) == (encoded.mask is None)


def test_gradients_of_repeats_add_up():
    image, _ = random_encodings(build_model())
    image = image.map(lambda tensor: tensor.detach().requires_grad_())
    image[torch.tensor([0, 0, 2])].cls.sum().backward()
    assert image.cls.grad[:, 0].tolist() == [2, 0, 1]


@settings(max_examples=15, deadline=None)
@given(rows_of_pieces=st.lists(LENGTHS, min_size=1, max_size=3), masked=st.booleans())
def test_cat_of_different_lengths(rows_of_pieces, masked):
    """Pieces with unequal texts have a mask, and pieces without one have one length."""
    model = built_variant()
    if not masked:
        rows_of_pieces = [[piece[0]] * len(piece) for piece in rows_of_pieces]
    lengths = [length for piece in rows_of_pieces for length in piece]
    whole = model.encode_text(*random_texts(lengths))
    ids, mask = random_texts(lengths)
    pieces = []
    start = 0
    for piece in rows_of_pieces:
        rows = slice(start, start + len(piece))
        width = max(piece)
        pieces.append(model.encode_text(ids[rows, :width], mask[rows, :width] if masked else None))
        start += len(piece)
    joined = Encoded.cat(pieces)
    assert len(joined) == len(lengths)
    assert same_encoded(whole, joined)
    assert (joined.mask is None) == (not masked and len(set(lengths)) == 1)
    assert joined.mask is None or torch.equal(joined.mask, mask.bool())
    image = model.encode_image(random_images(len(lengths)))
    assert max_difference(model.fuse(image, joined).pooled, model.fuse(image, whole).pooled) < ATOL


def test_cat_of_images_or_nothing():
    model = build_model()
    pixels = random_images(4)
    joined = Encoded.cat([model.encode_image(pixels[:1]), model.encode_image(pixels[1:])])
    assert joined.mask is None
    assert same_encoded(joined, model.encode_image(pixels))
    with pytest.raises(ValueError, match="no encodings given; expected at least one"):
        Encoded.cat([])


def test_padded():
    _, text = random_encodings(build_model())
    longer = text.padded(9)
    assert longer.mask.sum(dim=1).tolist() == [5, 3, 4]
    assert all(layer.shape[1] == 9 for layer in longer.layers)
    without = Encoded(text.layers, text.cls).padded(6)
    assert without.mask.tolist() == [[True] * 5 + [False]] * 3
    assert same_encoded(text.padded(5), text)
    with pytest.raises(ValueError, match="5 tokens do not fit into 4"):
        text.padded(4)


class LiveBytes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        size = storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def copied_rows(encoded, rows):
    return replace(encoded.map(lambda tensor: tensor[rows]), first_layer_cache=None)


@pytest.mark.parametrize("kind", BRIDGES)
@pytest.mark.parametrize("cached", [False, True])
def test_numbers_and_gradients_are_those_of_copies(kind, cached):
    results = {}
    for name, take in (("copied", copied_rows), ("taken", Encoded.__getitem__)):
        model = build_model(changed_config(fusion__bridge=kind))
        image, text = random_encodings(model)
        if cached and name == "taken":
            image = model.cache_image(image)
            text = model.cache_text(text)
        fused = model.fuse(take(image, ROWS), take(text, OTHERS), outputs="all")
        outputs = {"text": fused.text, "image": fused.image, "pooled": fused.pooled}
        weights = output_weights(outputs)
        sum((outputs[kind] * weights[kind]).sum() for kind in outputs).backward()
        gradients = {
            key: value.grad for key, value in model.named_parameters() if value.grad is not None
        }
        results[name] = outputs, gradients
    (first, one_gradients), (second, other_gradients) = results.values()
    assert all(
        max_difference(first[name], second[name]) <= (1e-5 if cached else 0) for name in first
    )
    assert one_gradients.keys() == other_gradients.keys()
    assert all(
        max_difference(one_gradients[name], other_gradients[name]) < 1e-4 for name in one_gradients
    )


def test_rows_of_rows():
    image, text = random_encodings(build_model())
    again = text[ROWS][torch.tensor([8, 3, 3])][slice(1, None)]
    assert isinstance(again.layers, IndexedLayers)
    assert not isinstance(again.layers.layers, IndexedLayers)
    expected = copied_rows(copied_rows(text, ROWS), torch.tensor([3, 3]))
    assert all(
        torch.equal(actual, wanted_layer)
        for actual, wanted_layer in zip(again.layers, expected.layers, strict=True)
    )
    assert torch.equal(again.mask, expected.mask)
    assert len(again.layers[1:]) == len(text.layers) - 1
    assert torch.equal(again.layers[-1:][0], expected.layers[-1])
    joined = Encoded.cat([image[ROWS], image])
    assert torch.equal(joined.layers[0], torch.cat([image.layers[0][ROWS], image.layers[0]]))


@pytest.mark.parametrize("train", [False, True])
def test_less_memory(train):
    """Six fusion layers read six tower layers of each modality, one after the other."""
    config = changed_config(
        **{
            "vision__num_layers": 6,
            "text__num_layers": 6,
            "fusion__num_layers": 6,
            "fusion__hidden_size": 64,
        },
        **{"vision__image_size": 64, "fusion__dropout": 0.0},
    )
    model = build_model(config).train(train)
    with torch.set_grad_enabled(train):
        image, text = random_encodings(model)
        rows = ROWS.repeat(2)
        takes = {"copied": copied_rows, "taken": Encoded.__getitem__}
        most = {}
        for name, take in takes.items():
            with LiveBytes() as live:
                model.fuse(take(image, rows), take(text, rows)).pooled.sum()
            most[name] = live.most
        layer = image.layers[0][rows].nbytes
    assert most["copied"] > 6 * layer
    # of the six layers of images, all but the one that is read
    assert most["copied"] - most["taken"] > 4 * layer


class TestFirstLayerCache:
    @settings(max_examples=15, deadline=None)
    @given(
        pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=6),
        name=st.sampled_from(list(VARIANTS)),
        outputs=st.sampled_from(list(OUTPUTS)),
    )
    def test_pairs_that_share_caches(self, pairs, name, outputs):
        model = built_variant(name)
        image = model.encode_image(random_images(3))
        text = model.encode_text(*random_texts([5, 3, 4, 1]))
        rows, columns = torch.tensor(pairs).T
        plain = model.fuse(image[rows], text[columns], outputs)
        image, text = fused_with_cache(model, image, text)
        shared = model.fuse(image[rows], text[columns], outputs)
        assert (
            max_difference(getattr(plain, OUTPUTS[outputs]), getattr(shared, OUTPUTS[outputs]))
            < ATOL
        )

    @pytest.mark.parametrize("outputs", OUTPUTS)
    def test_gradients(self, variant_model, outputs):
        rows = torch.tensor([0, 0, 1, 2, 2])
        columns = torch.tensor([0, 1, 1, 2, 0])

        outcomes = []
        for encoded in (
            random_encodings(variant_model),
            fused_with_cache(variant_model, *random_encodings(variant_model)),
        ):
            output = getattr(
                variant_model.fuse(encoded[0][rows], encoded[1][columns], outputs), OUTPUTS[outputs]
            )
            outcomes.append(gradients_of_output(output, dict(variant_model.named_parameters())))
        plain, shared = outcomes
        assert [name for name in plain if max_difference(plain[name], shared[name]) > ATOL] == []
        assert max(float(gradient.abs().max()) for gradient in plain.values()) > 1e-3

    def test_the_first_self_attention_runs_once_per_item(self):
        model = build_model()
        counts = []
        for layers in (model.fusion.image_layers, model.fusion.text_layers):
            layers[0].self_attention.register_forward_hook(
                lambda _, inputs, __: counts.append(len(inputs[0]))
            )
        image, text = fused_with_cache(model, *random_encodings(model))
        rows = torch.tensor([0, 1, 2, 0, 1, 2])
        model.fuse(image[rows], text[rows.flip(0)])
        assert counts == [3, 3]

    def test_one_cache_is_enough(self, variant_model):
        image, text = random_encodings(variant_model)
        expected = variant_model.fuse(image, text).pooled
        assert (
            max_difference(
                variant_model.fuse(variant_model.cache_image(image), text).pooled, expected
            )
            < ATOL
        )
        assert (
            max_difference(
                variant_model.fuse(image, variant_model.cache_text(text)).pooled, expected
            )
            < ATOL
        )

    def test_padding_and_joining_keep_it(self, variant_model):
        image, text = random_encodings(variant_model)
        pieces = [
            variant_model.cache_text(variant_model.encode_text(*random_texts([5, 3, 4]))[rows])
            for rows in (slice(1), slice(1, 3))
        ]
        joined = Encoded.cat([pieces[0], pieces[1].padded(8)])
        assert joined.first_layer_cache.query.shape[:2] == (3, 8)
        assert (
            max_difference(
                variant_model.fuse(image, joined).pooled, variant_model.fuse(image, text).pooled
            )
            < ATOL
        )

    def test_a_part_without_cache_takes_it_from_all(self):
        text = random_encodings(build_model())[1]
        assert Encoded.cat([build_model().cache_text(text), text]).first_layer_cache is None

    def test_control_another_items_cache(self, variant_model):
        image, text = random_encodings(variant_model)
        wrong = variant_model.cache_image(image).map(lambda tensor: tensor.flip(0))
        mixed = Encoded(image.layers, image.cls, first_layer_cache=wrong.first_layer_cache)
        assert (
            max_difference(
                variant_model.fuse(mixed, text).pooled, variant_model.fuse(image, text).pooled
            )
            > 1e-3
        )

    @pytest.mark.parametrize("bridge", ["add", "static_manager"])
    def test_draws_of_every_pair_are_apart(self, bridge):
        for dropout in (0.0, 0.2):
            model = build_model(
                changed_config(fusion__dropout=dropout, fusion__bridge=bridge)
            ).train()
            draws = dropout > 0 or bridge == "static_manager"
            for encoded in fused_with_cache(model, *random_encodings(model)):
                assert (encoded.first_layer_cache is None) == draws
            for encoded in fused_with_cache(model.eval(), *random_encodings(model)):
                assert encoded.first_layer_cache is not None


class TestCls:
    @pytest.mark.parametrize(
        "config",
        [
            SMALL_CONFIG,
            changed_config(heads__itc="fused"),
            changed_config(fusion__separate_projections=True, heads__itc="fused"),
            changed_config(
                text__positions="bert", vision__activation="gelu", vision__pre_norm=False
            ),
        ],
        ids=["tower", "fused", "separate", "bert_and_timm"],
    )
    def test_embeddings_and_gradients(self, config):
        model = build_model(config)
        pixels = random_images(3)
        words = random_texts([5, 3, 4])
        results = []
        for outputs in ("layers", "cls"):
            image = model.encode_image(pixels, outputs=outputs)
            text = model.encode_text(*words, outputs=outputs)
            embeds = torch.cat([model.image_embeds(image), model.text_embeds(text)])
            reached = {
                n: p
                for n, p in model.named_parameters()
                if n.startswith(("vision.", "text.", "itc_head."))
            }
            results.append((embeds, gradients_of_output(embeds, reached)))
        (all_embeds, all_found), (cls_embeds, cls_found) = results
        assert max_difference(all_embeds, cls_embeds) < ATOL
        assert [
            name for name in all_found if max_difference(all_found[name], cls_found[name]) > ATOL
        ] == []

    def test_the_last_layer_runs_at_the_cls_only(self):
        model = build_model()
        lengths = []

        def count(_, inputs, __):
            lengths.append(inputs[0].shape[1])

        for tower in (model.vision, model.text):
            for layer in tower.layers[-2:]:
                layer.mlp.register_forward_hook(count)
        model.encode_image(random_images(2), outputs="cls")
        model.encode_text(*random_texts([5, 3]), outputs="cls")
        assert lengths == [10, 1, 5, 1]

    def test_cannot_be_fused(self):
        model = build_model()
        image = model.encode_image(random_images(3), outputs="cls")
        text = random_encodings(model)[1]
        with pytest.raises(ValueError, match='hold the CLS only; encode with outputs="layers"'):
            model.fuse(image, text)
