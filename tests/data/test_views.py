"""Random views of training pictures: what each change does, who decides, and what the settings refuse."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop, functional

from bridgetower.data.config import DataConfig, RandAugment
from bridgetower.data.views import POLICIES, change, rand_augment, random_view
from bridgetower.processor import Processor, ProcessorConfig

SIZE = 24


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Random colours, dark on the left and light on the right."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 90, (3, height, width), generator=generator, dtype=torch.uint8)
    pixels[..., width // 2 :] += 150
    return functional.to_pil_image(pixels)


def content(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def processor() -> Processor:
    return Processor(ProcessorConfig(profile="official-finetune", image_size=SIZE, max_length=8), None)


def view(config: DataConfig, seed: int = 0) -> Tensor:
    return random_view(content(picture()), config, processor(), torch.Generator().manual_seed(seed))


def off(one: Image.Image, other: Image.Image) -> int:
    first, second = functional.pil_to_tensor(one).int(), functional.pil_to_tensor(other).int()
    return int((first - second).abs().max())


class TestView:
    CROP = DataConfig(random_crop=0.5)
    OFFICIAL = DataConfig(random_crop=0.5, flip=True, rand_augment="colour", rand_magnitude=7)

    @pytest.mark.parametrize("config", [CROP, OFFICIAL, DataConfig(rand_augment="geometry", rand_magnitude=5)])
    def test_the_generator_decides(self, config: DataConfig) -> None:
        state = torch.random.get_rng_state()
        views = [view(config, seed) for seed in (0, 0, *range(1, 8))]
        assert all(each.shape == (3, SIZE, SIZE) and each.dtype == torch.uint8 for each in views)
        assert torch.equal(views[0], views[1])
        assert len({tuple(each.flatten().tolist()) for each in views}) > 4
        assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator is left alone"

    def test_a_crop_of_everything_is_the_squashed_picture(self) -> None:
        """Of a square one: the crop changes the proportions by up to a third where it can."""
        square = content(picture(40, 40))
        generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
        views = [random_view(square, DataConfig(random_crop=1.0), processor(), each) for each in generators]
        plain = processor().resize(square)
        assert min(int((each.int() - plain.int()).abs().max()) for each in views) <= 1

    def test_a_smaller_share_shows_less(self) -> None:
        """A picture whose grey grows from left to right: the range of a crop is its width."""
        ramp = content(Image.linear_gradient("L").rotate(90).convert("RGB"))
        spans = []
        for smallest in (1.0, 0.5, 0.05):
            config, widths = DataConfig(random_crop=smallest), []
            for seed in range(30):
                pixels = random_view(ramp, config, processor(), torch.Generator().manual_seed(seed)).float()
                widths.append(float(pixels.max() - pixels.min()))
            spans.append(sum(widths) / len(widths))
        assert spans[0] > spans[1] > spans[2]

    @pytest.mark.parametrize("size", [(10, 400), (400, 10)])
    def test_where_no_draw_fits_the_crop_is_that_of_torchvision(self, size: tuple[int, int]) -> None:
        image = picture(*size)
        theirs = RandomResizedCrop(SIZE, scale=(1.0, 1.0), interpolation=InterpolationMode.BICUBIC)(image)
        ours = random_view(content(image), DataConfig(random_crop=1.0), processor(), torch.Generator().manual_seed(0))
        assert torch.equal(ours, functional.pil_to_tensor(theirs))

    def test_flip(self) -> None:
        views = [view(DataConfig(flip=True), seed) for seed in range(40)]
        plain = processor().resize(content(picture()))
        mirrored = [torch.equal(each, processor().resize(ImageOps.mirror(picture()))) for each in views]
        assert all(torch.equal(each, plain) != flipped for each, flipped in zip(views, mirrored, strict=True))
        assert 8 < sum(mirrored) < 32

    def test_without_flip_left_stays_left(self) -> None:
        for seed in range(30):
            pixels = view(DataConfig(random_crop=0.5, rand_augment="geometry", rand_magnitude=5), seed).float()
            assert pixels[..., -3:].mean() > pixels[..., :3].mean()

    def test_evaluation_has_no_views(self) -> None:
        assert self.OFFICIAL.has_views
        assert not self.OFFICIAL.as_evaluated().has_views
        assert replace(self.OFFICIAL, random_crop=None, flip=False).as_evaluated() == DataConfig()


class TestChanges:
    @pytest.mark.parametrize("kind", POLICIES)
    @pytest.mark.parametrize("high", [False, True])
    def test_every_one_of_them_works_at_both_ends(self, kind: RandAugment, high: bool) -> None:
        image = picture()
        for name, values in POLICIES[kind].ops.items():
            changed = change(image, name, values[high], POLICIES[kind].fill)
            assert (changed.size, changed.mode) == (image.size, "RGB")

    @pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y", "identity"])
    def test_nothing_moves_at_zero(self, name: str) -> None:
        assert off(change(picture(), name, 0.0, 128), picture()) == 0

    @pytest.mark.parametrize("name", ["colour", "contrast", "brightness", "sharpness"])
    def test_a_factor_of_one_changes_nothing(self, name: str) -> None:
        assert off(change(picture(), name, 1.0, 0), picture()) == 0

    def test_pillow_agrees(self) -> None:
        """What the official code calls."""
        image = picture()
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
            ours = functional.pil_to_tensor(change(image, name, values.get(name, 0.5), 0)).int()
            differing = (ours - functional.pil_to_tensor(theirs).int()).abs().amax(dim=0) > 1
            assert differing.float().mean() < 0.02, name  # a row of pixels at the edge of a shear

    def test_solarize_add(self) -> None:
        levels = Image.new("RGB", (3, 1))
        levels.putdata([(10, 10, 10), (120, 120, 120), (250, 250, 250)])
        changed = functional.pil_to_tensor(change(levels, "solarize_add", 20.0, 0))[0, 0].tolist()
        assert changed == [30, 255 - 140, 0]

    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match="there is no change 'cutout' of an image"):
            change(picture(), "cutout", 1.0, 0)


class TestRandAugment:
    def test_none(self) -> None:
        image = picture()
        assert rand_augment(image, "none", 0, torch.Generator()) is image

    def test_without_colour_grey_stays_grey(self) -> None:
        grey = picture().convert("L").convert("RGB")
        for seed in range(40):
            changed = rand_augment(grey, "geometry", 9, torch.Generator().manual_seed(seed))
            pixels = functional.pil_to_tensor(changed).int()
            assert (pixels[0] == pixels[1]).all()

    def test_half_of_the_changes_are_made_without_colour(self) -> None:
        """A quarter of the pictures, and the identity's share of the rest, stays as it is."""
        image = picture()
        same = [
            off(rand_augment(image, "geometry", 9, torch.Generator().manual_seed(n)), image) == 0 for n in range(300)
        ]
        assert 0.2 < sum(same) / len(same) < 0.42
        same = [off(rand_augment(image, "colour", 9, torch.Generator().manual_seed(n)), image) == 0 for n in range(100)]
        assert sum(same) < 5

    def test_both_directions(self) -> None:
        edges = set()
        for seed in range(200):
            changed = functional.pil_to_tensor(
                rand_augment(Image.new("RGB", (50, 50), "white"), "colour", 9, torch.Generator().manual_seed(seed))
            )
            corner = [
                bool((changed[:, row, column] == 0).all()) for row, column in ((0, 25), (49, 25), (25, 0), (25, 49))
            ]
            edges |= {side for side, black in zip(("top", "bottom", "left", "right"), corner, strict=True) if black}
        assert edges == {"top", "bottom", "left", "right"}


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"random_crop": 0.0}, r"random_crop is 0.0; expected a share in \(0, 1\], or None"),
            ({"random_crop": 1.5}, "random_crop is 1.5"),
            ({"rand_augment": "colours", "rand_magnitude": 3}, "rand_augment is 'colours'; expected one of none"),
            ({"rand_magnitude": 3}, "rand_magnitude is 3 for rand_augment 'none'; expected 0"),
            ({"rand_augment": "colour"}, "rand_magnitude is 0 for rand_augment 'colour'; expected 1 to 30"),
            ({"rand_augment": "geometry", "rand_magnitude": 11}, "expected 1 to 10"),
            ({"random_crop": 0.5, "cache": True}, "start from the image files; leave cache and augmentation out"),
            ({"flip": True, "augmentation": "affine"}, "leave cache and augmentation out"),
        ],
    )
    def test_refused(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DataConfig(**changes)
