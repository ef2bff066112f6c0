"""Random views of training pictures and captions: what each change does, and who decides."""

import io
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop, functional

from bridgetower.data.batches import views
from bridgetower.data.batches.views import (
    POLICIES,
    _random_matrices,
    augment,
    change,
    drop_words,
    rand_augment,
    random_view,
)
from bridgetower.data.config import DataConfig
from bridgetower.processor import Processor, ProcessorConfig

SIZE = 24
COLOUR = POLICIES["colour"]


def gradient_picture(width=60, height=40):
    """Random colours, dark on the left and light on the right."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 90, (3, height, width), generator=generator, dtype=torch.uint8)
    pixels[..., width // 2 :] += 150
    return functional.to_pil_image(pixels)


def jpeg_content(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def processor():
    return Processor(
        ProcessorConfig(profile="official-finetune", image_size=SIZE, max_length=8), None
    )


def augmented_view(config, seed=0):
    return random_view(
        jpeg_content(gradient_picture()), config, processor(), torch.Generator().manual_seed(seed)
    )


def crop_of(width, height, smallest, seed):
    """Returns the box that is cut out of a picture: left, top, right and bottom."""
    boxes = []

    def crop(box):
        boxes.append(box)
        return SimpleNamespace(resize=lambda *_: None)

    views._random_crop(
        SimpleNamespace(width=width, height=height, crop=crop), SIZE, smallest, generator_of(seed)
    )
    (box,) = boxes
    return box


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def mean_difference(actual, expected):
    first = functional.pil_to_tensor(actual).int()
    second = functional.pil_to_tensor(expected).int()
    return int((first - second).abs().max())


GEOMETRY_7 = {
    "brightness": 1.36,
    "sharpness": 1.36,
    "rotate": 21.0,
    "shear_x": 0.21,
    "shear_y": 0.21,
}
COLOUR_9 = {
    "posterize": 1.2,
    "solarize": 76.8,
    "solarize_add": 33.0,
    "rotate": 9.0,
    "shear_x": 0.09,
    "shear_y": 0.09,
}
ENHANCED_9 = dict.fromkeys(("colour", "contrast", "brightness", "sharpness"), 0.64)
# BLIP: level / 10 of 30 degrees, 0.3, 10 pixels, and * 1.8 + 0.1; ViLT: level / 30 between the ends of `augment_list`
PLAIN = dict.fromkeys(("autocontrast", "equalize"), 0)
OFFICIAL_VALUES = [
    (
        "geometry",
        7,
        {"identity": 0, **PLAIN, **GEOMETRY_7, "translate_x": 7.0, "translate_y": 7.0},
        128,
    ),
    ("colour", 9, {**PLAIN, **COLOUR_9, **ENHANCED_9, "translate_x": 30.0, "translate_y": 30.0}, 0),
]


class TestView:
    CROP = DataConfig(random_crop=0.5)
    OFFICIAL = DataConfig(random_crop=0.5, flip=True, rand_augment="colour", rand_magnitude=7)

    @pytest.mark.parametrize(
        "config", [CROP, OFFICIAL, DataConfig(rand_augment="geometry", rand_magnitude=5)]
    )
    def test_the_generator_decides(self, config):
        state = torch.random.get_rng_state()
        views = [augmented_view(config, seed) for seed in (0, 0, *range(1, 8))]
        assert all(
            pixels.shape == (3, SIZE, SIZE) and pixels.dtype == torch.uint8 for pixels in views
        )
        assert torch.equal(views[0], views[1])
        assert len({tuple(pixels.flatten().tolist()) for pixels in views}) > 4
        assert torch.equal(torch.random.get_rng_state(), state), (
            "torch's own generator is left alone"
        )

    def test_a_crop_of_everything_is_the_squashed_picture(self):
        """Of a square one: the crop changes the proportions by up to a third where it can."""
        square = jpeg_content(gradient_picture(40, 40))
        generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
        views = [
            random_view(square, DataConfig(random_crop=1.0), processor(), view_pixels)
            for view_pixels in generators
        ]
        plain = processor().resize(square)
        assert min(int((view_pixels.int() - plain.int()).abs().max()) for view_pixels in views) <= 1

    def test_a_smaller_share_shows_less(self):
        """A picture whose grey grows from left to right: the range of a crop is its width."""
        ramp = jpeg_content(Image.linear_gradient("L").rotate(90).convert("RGB"))
        spans = []
        for smallest in (1.0, 0.5, 0.05):
            config = DataConfig(random_crop=smallest)
            widths = []
            for seed in range(30):
                pixels = random_view(
                    ramp, config, processor(), torch.Generator().manual_seed(seed)
                ).float()
                widths.append(float(pixels.max() - pixels.min()))
            spans.append(sum(widths) / len(widths))
        assert spans[0] > spans[1] > spans[2]

    @pytest.mark.parametrize("size", [(10, 400), (400, 10)])
    def test_where_no_draw_fits_the_crop_is_that_of_torchvision(self, size):
        image = gradient_picture(*size)
        theirs = RandomResizedCrop(SIZE, scale=(1.0, 1.0), interpolation=InterpolationMode.BICUBIC)(
            image
        )
        ours = random_view(
            jpeg_content(image),
            DataConfig(random_crop=1.0),
            processor(),
            torch.Generator().manual_seed(0),
        )
        assert torch.equal(ours, functional.pil_to_tensor(theirs))

    @pytest.mark.parametrize("smallest", [0.08, 0.5])
    def test_crops_have_the_areas_and_sides_that_are_drawn(self, smallest):
        """Of the first draw that fits: a share of the area, and the logarithm of the ratio, between their ends."""
        shares = []
        ratios = []
        for seed in range(400):
            x0, y0, x1, y1 = crop_of(60, 40, smallest, seed)
            assert 0 <= x0 < x1 <= 60
            assert 0 <= y0 < y1 <= 40
            draws = torch.Generator().manual_seed(seed)
            for _ in range(10):
                area, ratio = torch.rand(2, generator=draws).tolist()
                area = 2400 * (1 - (1 - area) * (1 - smallest))
                ratio = (3 / 4) ** (1 - 2 * ratio)
                height = math.sqrt(area / ratio)
                if round(height) <= 40 and round(height * ratio) <= 60:
                    assert (x1 - x0, y1 - y0) == (round(height * ratio), round(height))
                    shares.append(area / 2400)
                    ratios.append(ratio)
                    break
                # Where a draw does not fit there are no draws of places.
        assert len(shares) > 350
        assert all(
            smallest <= share <= 1 and 3 / 4 <= ratio <= 4 / 3
            for share, ratio in zip(shares, ratios, strict=True)
        )

    def test_crops_are_as_often_where_those_of_torchvision_are(self):
        boxes = [crop_of(60, 40, 0.3, seed) for seed in range(3000)]
        ours = np.array([(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes])
        torch.manual_seed(0)
        crop = RandomResizedCrop(SIZE, scale=(0.3, 1.0))
        image = functional.pil_to_tensor(gradient_picture())
        drawn = [crop.make_params([image]) for _ in range(3000)]
        theirs = np.array(
            [[box[name] for name in ("left", "top", "width", "height")] for box in drawn]
        )
        quantiles = np.linspace(0.05, 0.95, 19)
        difference = np.quantile(ours, quantiles, axis=0) - np.quantile(theirs, quantiles, axis=0)
        assert np.abs(difference).max() <= 1

    def test_the_part_is_resized_as_by_torchvision(self):
        for seed in range(20):
            x0, y0, x1, y1 = crop_of(60, 40, 0.3, seed)
            theirs = functional.resized_crop(
                gradient_picture(),
                y0,
                x0,
                y1 - y0,
                x1 - x0,
                [SIZE, SIZE],
                InterpolationMode.BICUBIC,
            )
            assert torch.equal(
                augmented_view(DataConfig(random_crop=0.3), seed), functional.pil_to_tensor(theirs)
            )

    def test_flip(self):
        plain, mirrored = (
            processor().resize(image)
            for image in (gradient_picture(), ImageOps.mirror(gradient_picture()))
        )
        for seed in range(40):
            is_mirrored = torch.rand((), generator=torch.Generator().manual_seed(seed)) < 0.5
            assert torch.equal(
                augmented_view(DataConfig(flip=True), seed), mirrored if is_mirrored else plain
            )

    def test_a_crop_is_mirrored_and_then_changed(self, monkeypatch):
        """A picture that is changed without a crop is changed first and resized as in evaluation."""
        steps = []
        monkeypatch.setattr(
            ImageOps, "mirror", lambda image: steps.append(("mirror", image.size)) or image
        )
        monkeypatch.setattr(
            views, "change", lambda image, *_: steps.append(("change", image.size)) or image
        )
        options = {"rand_augment": "colour", "rand_magnitude": 1, "flip": True}
        for crop, size in ((0.5, (SIZE, SIZE)), (None, (60, 40))):
            del steps[:]
            seen = [
                augmented_view(DataConfig(random_crop=crop, **options), seed) for seed in range(8)
            ]
            assert {pixels.shape for pixels in seen} == {(3, SIZE, SIZE)}
            assert set(steps) == {("mirror", size), ("change", size)}
            assert steps[steps.index(("mirror", size)) + 1 :][:2] == [("change", size)] * 2

    def test_evaluation_has_no_views_no_repeats_and_only_its_own_sets(self):
        varied = replace(self.OFFICIAL, transform="torch:fliplr", word_dropout=0.5, max_length=9)
        varied = replace(varied, folders=("a",), train_only=("b",), repeats=(1, 2))
        assert varied.as_evaluated() == DataConfig(folders=("a",), max_length=9)
        assert DataConfig(augmentation="affine").as_evaluated() == DataConfig()


def warped(image, forward, fill):
    """OpenCV's `warpAffine`, bilinear with a constant border: `forward` maps centres of pixels of the input."""
    pixels = np.asarray(image, dtype=np.float64)
    height, width = pixels.shape[:2]
    inverse = np.linalg.inv(np.array([*forward, [0, 0, 1]]))
    y, x = np.mgrid[:height, :width]
    from_x, from_y, _ = np.einsum("ij,jhw->ihw", inverse, np.stack([x, y, np.ones_like(x)]))
    low_x = np.floor(from_x).astype(int)
    low_y = np.floor(from_y).astype(int)
    output = np.zeros_like(pixels)
    for right, down in ((0, 0), (0, 1), (1, 0), (1, 1)):
        column = low_x + right
        row = low_y + down
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        values = np.where(
            inside[..., None], pixels[row.clip(0, height - 1), column.clip(0, width - 1)], fill
        )
        weight = (1 - np.abs(from_x - column)) * (1 - np.abs(from_y - row))
        output += weight[..., None] * values
    return output


class TestBilinear:
    COS = math.cos(math.radians(15))
    SIN = math.sin(math.radians(15))
    # BLIP's functions; getRotationMatrix2D around W / 2, H / 2
    FORWARD: ClassVar = {
        "shear_x": (0.15, [[1, -0.15, 0], [0, 1, 0]]),
        "shear_y": (-0.15, [[1, 0, 0], [0.15, 1, 0]]),
        "translate_x": (3.5, [[1, 0, 3.5], [0, 1, 0]]),
        "translate_y": (-5.25, [[1, 0, 0], [0, 1, -5.25]]),
        "rotate": (
            15.0,
            [[COS, SIN, (1 - COS) * 30 - SIN * 20], [-SIN, COS, SIN * 30 + (1 - COS) * 20]],
        ),
    }

    @pytest.mark.parametrize("name", FORWARD)
    def test_pixels_are_interpolated_as_by_opencv(self, name):
        """Pillow cuts where OpenCV rounds, so values differ by up to one level. A move of one column is off by tens."""
        value, forward = self.FORWARD[name]
        image = gradient_picture()
        assert image.size == (60, 40)
        ours = np.asarray(change(image, name, value, POLICIES["geometry"]), dtype=np.float64)
        assert np.abs(ours - warped(image, forward, 128)).max() <= 1.01
        nearest = np.asarray(
            change(image, name, value, replace(POLICIES["geometry"], bilinear=False)),
            dtype=np.float64,
        )
        assert np.abs(nearest - warped(image, forward, 128)).max() > 10


class TestChanges:
    def test_pillow_agrees(self):
        """What the official code calls."""
        image = gradient_picture()
        expected = {
            "autocontrast": ImageOps.autocontrast(image),
            "equalize": ImageOps.equalize(image),
            "posterize": ImageOps.posterize(image, 3),
            "solarize": ImageOps.solarize(image, 100),
            "colour": ImageEnhance.Color(image).enhance(0.5),
            "contrast": ImageEnhance.Contrast(image).enhance(0.5),
            "brightness": ImageEnhance.Brightness(image).enhance(0.5),
            "sharpness": ImageEnhance.Sharpness(image).enhance(0.5),
            "shear_x": image.transform(image.size, Image.Transform.AFFINE, (1, 0.2, 0, 0, 1, 0)),
            "shear_y": image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, 0.2, 1, 0)),
            "translate_x": image.transform(image.size, Image.Transform.AFFINE, (1, 0, -7, 0, 1, 0)),
            "translate_y": image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, -7)),
            "rotate": image.rotate(20),
        }
        values = {"posterize": 3, "solarize": 100, "shear_x": 0.2, "shear_y": 0.2, "rotate": 20}
        values |= {"translate_x": 7, "translate_y": 7}
        for name, theirs in expected.items():
            ours = functional.pil_to_tensor(
                change(image, name, values.get(name, 0.5), COLOUR)
            ).int()
            differing = (ours - functional.pil_to_tensor(theirs).int()).abs().amax(dim=0) > 1
            assert differing.float().mean() < 0.02, name  # a row of pixels at the edge of a shear

    def test_solarize_add(self):
        levels = Image.new("RGB", (3, 1))
        levels.putdata([(10, 10, 10), (120, 120, 120), (250, 250, 250)])
        changed = functional.pil_to_tensor(change(levels, "solarize_add", 20.0, COLOUR))[
            0, 0
        ].tolist()
        assert changed == [30, 255 - 140, 0]


@pytest.mark.parametrize(("kind", "magnitude", "values", "fill"), OFFICIAL_VALUES)
def test_values_are_the_official_ones(kind, magnitude, values, fill, monkeypatch):
    """Each of two changes of an image is any of them, and what has a direction goes in both as often."""
    made = {}

    def note(image, name, value, policy):
        made.setdefault(name, []).append(value)
        assert policy.fill == fill
        return image

    monkeypatch.setattr(views, "change", note)
    for seed in range(1500):
        rand_augment(gradient_picture(2, 2), kind, magnitude, torch.Generator().manual_seed(seed))
    assert made.keys() == values.keys()
    share = {"geometry": 0.5, "colour": 1.0}[kind]
    assert sum(map(len, made.values())) == pytest.approx(2 * 1500 * share, rel=0.05)
    signed = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
    for name, actual in made.items():
        assert len(actual) == pytest.approx(3000 * share / len(values), rel=0.25)
        expected = {values[name], -values[name]} if name in signed else {values[name]}
        assert {round(value, 9) for value in actual} == {round(value, 9) for value in expected}
        if name in signed:
            assert 0.35 < sum(value > 0 for value in actual) / len(actual) < 0.65


class TestPictures:
    @staticmethod
    def halves():
        """Pictures that are dark on the left and light on the right."""
        pixels = torch.full((64, 3, 20, 20), 40, dtype=torch.uint8)
        pixels[..., 10:] = 200
        return pixels

    def test_none_changes_nothing(self):
        pixels = self.halves()
        assert augment(pixels, "none", torch.Generator()) is pixels

    def test_generator_decides(self):
        first, again, other = (
            augment(self.halves(), "affine", torch.Generator().manual_seed(n)) for n in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert len({tuple(picture.flatten().tolist()) for picture in first}) == 64

    def test_nothing_is_mirrored(self):
        pixels = augment(self.halves(), "affine", torch.Generator().manual_seed(0)).float()
        left_edge = pixels[..., :7].mean(dim=(1, 2, 3))
        right = pixels[..., 13:].mean(dim=(1, 2, 3))
        assert (right > left_edge + 50).all()
        turned = augment(
            self.halves().transpose(2, 3), "affine", torch.Generator().manual_seed(0)
        ).float()
        assert (
            turned[:, :, 13:].mean(dim=(1, 2, 3)) > turned[:, :, :7].mean(dim=(1, 2, 3)) + 50
        ).all()

    def test_pixels_are_where_the_matrix_says(self, monkeypatch):
        """Pixels go where the matrix says, and the border is repeated outside."""
        pixels = torch.randint(
            0, 200, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        matrices = [[[1, 0, 0.5], [0, 1, 0]], [[-1, 0, 0], [0, -1, 0]], [[1, 0, 0], [0, 1, -0.125]]]
        monkeypatch.setattr(
            views, "_random_matrices", lambda *_: torch.tensor(matrices, dtype=torch.float32)
        )
        monkeypatch.setattr(views, "_uniform", lambda *_: torch.tensor([1.0, 1.3, 0.5]))
        moved = augment(pixels, "affine", torch.Generator()).int()
        right = torch.cat([pixels[0, :, :, 2:], pixels[0, :, :, -1:], pixels[0, :, :, -1:]], dim=2)
        assert torch.equal(moved[0], right.int())
        assert torch.equal(
            moved[1], (pixels[1].flip(1, 2).float() * 1.3).round().clamp(0, 255).int()
        )
        half_down = (
            torch.cat([pixels[2, :, :1], pixels[2, :, :-1]], dim=1).float() + pixels[2]
        ) / 2
        assert torch.equal(moved[2], (half_down * 0.5).round().int())

    def test_turns_scales_and_shifts(self):
        """The ends of what is drawn, and which way a scale goes: above 1 the image is larger."""
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        pixels = torch.zeros(1000, 3, 60, 60, dtype=torch.uint8)
        pixels[..., 20:40, 20:40] = 100
        matrices = _random_matrices(1000, seeds[0])
        sides = augment(pixels, "affine", seeds[1]).float().mean(dim=1)
        light = sides.amax(dim=(1, 2))
        scales = (sides.sum(dim=(1, 2)) / light / 400).sqrt()
        assert scales.min() == pytest.approx(0.8, abs=0.02)
        assert scales.max() == pytest.approx(1.15, abs=0.02)
        angles = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]))
        assert angles.abs().max() == pytest.approx(10, abs=0.1)
        # the sides are 2 long
        assert (matrices[:, :, 2] / 2).abs().max() == pytest.approx(0.1, abs=0.002)
        assert (light / 100).min() == pytest.approx(0.85, abs=0.02)
        assert (light / 100).max() == pytest.approx(1.15, abs=0.02)


class TestWords:
    WORDS = "a square that is blue on a grey ground"

    def test_none_changes_nothing(self):
        assert drop_words(" two  spaces ", 0.0, torch.Generator()) == " two  spaces "

    @given(share=st.floats(0.01, 0.99), seed=st.integers(0, 999), count=st.integers(1, 9))
    def test_keeps_order_and_at_least_one(self, share, seed, count):
        words = [str(number) for number in range(count)]
        remaining = drop_words(" ".join(words), share, torch.Generator().manual_seed(seed)).split()
        assert remaining
        assert remaining == [word for word in words if word in remaining]

    @pytest.mark.parametrize("share", [0.2, 0.7])
    def test_share(self, share):
        source = torch.Generator().manual_seed(0)
        num_words = sum(len(drop_words(self.WORDS, share, source).split()) for _ in range(300))
        assert num_words / (300 * 9) == pytest.approx(1 - share, abs=0.03)

    def test_generator_decides(self):
        texts = [
            drop_words(self.WORDS, 0.5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        ]
        assert texts[0] == texts[1] != texts[2]
