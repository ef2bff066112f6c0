"""Random views of pictures and captions: decided by the generator, never mirrored, never empty."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridgetower.data.views import _matrices, augment, drop_words


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
            augment(self.halves(), "affine", torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert len({tuple(picture.flatten().tolist()) for picture in first}) == 64

    def test_nothing_is_mirrored(self):
        pixels = augment(self.halves(), "affine", torch.Generator().manual_seed(0)).float()
        left, right = pixels[..., :7].mean(dim=(1, 2, 3)), pixels[..., 13:].mean(dim=(1, 2, 3))
        assert (right > left + 50).all()
        turned = augment(self.halves().transpose(2, 3), "affine", torch.Generator().manual_seed(0)).float()
        assert (turned[:, :, 13:].mean(dim=(1, 2, 3)) > turned[:, :, :7].mean(dim=(1, 2, 3)) + 50).all()

    def test_turns_scales_and_shifts(self):
        """The ends of what is drawn, and which way a scale goes: above 1 the image is larger."""
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        pixels = torch.zeros(1000, 3, 60, 60, dtype=torch.uint8)
        pixels[..., 20:40, 20:40] = 100
        matrices = _matrices(1000, seeds[0])
        sides = augment(pixels, "affine", seeds[1]).float().mean(dim=1)
        light = sides.amax(dim=(1, 2))
        scales = (sides.sum(dim=(1, 2)) / light / 400).sqrt()
        assert scales.min() == pytest.approx(0.8, abs=0.02)
        assert scales.max() == pytest.approx(1.15, abs=0.02)
        assert torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0])).abs().max() == pytest.approx(
            10, abs=0.1
        )
        assert (matrices[:, :, 2] / 2).abs().max() == pytest.approx(0.1, abs=0.002)  # the sides are 2 long
        assert (light / 100).min() == pytest.approx(0.85, abs=0.02)
        assert (light / 100).max() == pytest.approx(1.15, abs=0.02)


class TestWords:
    WORDS = "a square that is blue on a grey ground"

    def test_none_changes_nothing(self):
        assert drop_words(" two  spaces ", 0.0, torch.Generator()) == " two  spaces "

    @given(share=st.floats(0.01, 0.99), seed=st.integers(0, 999), count=st.integers(1, 9))
    def test_keeps_order_and_at_least_one(self, share, seed, count):
        words = [str(number) for number in range(count)]
        kept = drop_words(" ".join(words), share, torch.Generator().manual_seed(seed)).split()
        assert kept
        assert kept == [word for word in words if word in kept]

    @pytest.mark.parametrize("share", [0.2, 0.7])
    def test_share(self, share):
        source = torch.Generator().manual_seed(0)
        kept = sum(len(drop_words(self.WORDS, share, source).split()) for _ in range(300))
        assert kept / (300 * 9) == pytest.approx(1 - share, abs=0.03)

    def test_generator_decides(self):
        texts = [drop_words(self.WORDS, 0.5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert texts[0] == texts[1] != texts[2]
