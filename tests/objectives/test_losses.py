"""The objectives against slow references written from their formulas; the contrastive loss in parts and whole."""

import math

import pytest
import torch
import torch.nn.functional as F

from bridgetower.data.batch import IGNORED
from bridgetower.model.heads import ItcHead, MlmHead
from bridgetower.objectives.losses import Features, Losses, class_loss, contrast_parts, itc_loss, mlm_loss, similarity

SCALE = torch.tensor(1 / 0.07)


def features(count, seed=0, width=6):
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow_itc(images, texts, index, scale, joint=None):
    """InfoNCE in all directions, pair by pair in double precision, with equal weight on every pair of one image."""
    directions = [(images, texts), (texts, images)] if joint is None else [(texts, images), (texts, joint)]
    directions += [] if joint is None else [(images, joint)]
    losses = []
    for rows, columns in ((one.double(), other.double()) for one, other in directions):
        for row, own in enumerate(index):
            exponents = [scale * float(rows[row] @ column) for column in columns]
            normaliser = math.log(sum(math.exp(exponent) for exponent in exponents))
            positives = [column for column, other in enumerate(index) if other == own]
            losses.append(sum(normaliser - exponents[column] for column in positives) / len(positives))
    return sum(losses) / len(losses)


class TestItc:
    @pytest.mark.parametrize(
        "index", [[0, 1, 2, 3, 4], [7, 7, 2, 3, 7], [1, 1, 1, 1, 1]], ids=["distinct", "some", "all"]
    )
    def test_equals_the_slow_reference(self, index):
        images, texts = features(5, 0), features(5, 1)
        loss = itc_loss((images, texts), torch.tensor(index), SCALE)
        assert loss.item() == pytest.approx(slow_itc(images, texts, index, float(SCALE)), rel=1e-5)
        joint = features(5, 2)
        of_three = itc_loss((images, texts, joint), torch.tensor(index), SCALE)
        assert of_three.item() == pytest.approx(slow_itc(images, texts, index, float(SCALE), joint), rel=1e-5)

    def test_bfloat16_autocast_changes_nothing(self):
        images, texts, index = features(8, 0, 64), features(8, 1, 64), torch.arange(8)
        plain = itc_loss((images, texts), index, SCALE)
        with torch.autocast("cpu", torch.bfloat16):
            assert itc_loss((images, texts), index, SCALE) == plain
            rounded = SCALE * images @ texts.T
        assert (rounded.float() - similarity(images, texts, SCALE)).abs().max() > 1e-3  # what it would have cost

    @pytest.mark.parametrize(("given", "clamped"), [(0.07, 0.07), (1e-5, 0.001), (-1.0, 0.001), (3.0, 0.5)])
    def test_temperature_is_clamped_before_the_loss(self, given, clamped):
        head = ItcHead(4, 4, 4)
        with torch.no_grad():
            head.temperature.fill_(given)
        images, texts = features(3, 0), features(3, 1)
        loss = itc_loss((images, texts), torch.arange(3), head.logit_scale())
        assert head.temperature.item() == pytest.approx(clamped)
        assert loss.item() == pytest.approx(slow_itc(images, texts, [0, 1, 2], 1 / clamped), rel=1e-4)
        loss.backward()
        assert head.temperature.grad.isfinite()

    def test_gradient_is_that_of_the_formula(self):
        images, texts = (features(4, seed).double().requires_grad_() for seed in (0, 1))
        index = torch.tensor([0, 0, 2, 3])
        # The loss itself computes in single precision: central differences of the slow reference judge it.
        itc_loss((images, texts), index, SCALE.double()).backward()
        step = 1e-5
        for row, column in ((0, 0), (2, 3)):
            moved = images.detach().clone()
            moved[row, column] += step
            upper = slow_itc(moved, texts.detach(), index.tolist(), float(SCALE))
            moved[row, column] -= 2 * step
            lower = slow_itc(moved, texts.detach(), index.tolist(), float(SCALE))
            assert images.grad[row, column].item() == pytest.approx((upper - lower) / (2 * step), rel=1e-3, abs=1e-5)


class TestMlm:
    def setup_method(self):
        torch.manual_seed(0)
        self.head = MlmHead(6, 11, 1e-12)
        self.hidden = torch.randn(3, 5, 6, requires_grad=True)
        self.labels = torch.full((3, 5), IGNORED)
        self.labels[0, 1], self.labels[2, 0], self.labels[2, 4] = 3, 10, 0

    def gradients(self, loss):
        return list(torch.autograd.grad(loss, [self.hidden, *self.head.parameters()]))

    def test_equals_full_logits_in_value_and_gradient(self):
        loss, accuracy = mlm_loss(self.head, self.hidden, self.labels)
        logits = self.head(self.hidden)
        full = F.cross_entropy(logits.flatten(0, 1), self.labels.flatten(), ignore_index=IGNORED)
        torch.testing.assert_close(loss, full)
        for ours, theirs in zip(self.gradients(loss), self.gradients(full), strict=True):
            torch.testing.assert_close(ours, theirs)
        right = [int(logits[b, t].argmax()) == int(self.labels[b, t]) for b, t in ((0, 1), (2, 0), (2, 4))]
        assert accuracy.item() == pytest.approx(sum(right) / 3)
        assert not accuracy.requires_grad

    def test_logits_are_computed_at_labelled_positions_only(self):
        seen = []
        self.head.register_forward_hook(lambda head, inputs, output: seen.append(output.shape))
        mlm_loss(self.head, self.hidden, self.labels)
        assert seen == [(3, 11)]

    def test_nothing_labelled_is_zero_with_zero_gradient(self):
        loss, accuracy = mlm_loss(self.head, self.hidden, torch.full_like(self.labels, IGNORED))
        assert (loss.item(), accuracy.item()) == (0.0, 0.0)
        (gradient,) = torch.autograd.grad(loss, [self.hidden])
        assert torch.equal(gradient, torch.zeros_like(self.hidden))


def test_itm_is_cross_entropy_with_accuracy():
    logits, labels = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 3.0]]), torch.tensor([1, 0, 0])
    loss, accuracy = class_loss(logits, labels)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 3
    assert loss.item() == pytest.approx(expected)
    assert accuracy.item() == pytest.approx(2 / 3)


def test_total_is_the_weighted_sum():
    parts = {"mlm": torch.tensor(2.0, requires_grad=True), "itm": torch.tensor(3.0, requires_grad=True)}
    losses = Losses.weigh(parts, {"mlm": 0.5, "itm": 2.0, "itc": 1.0})
    assert losses.total.item() == 0.5 * 2 + 2 * 3
    losses.total.backward()
    assert {name: part.grad for name, part in parts.items()} == {"mlm": 0.5, "itm": 2.0}
    with pytest.raises(KeyError):
        Losses.weigh({"mlm": torch.tensor(2.0)}, {"itm": 1.0})


INDEX = torch.tensor([0, 1, 2, 0, 3])
SPLITS = ([5], [2, 3], [1, 1, 1, 1, 1])


@pytest.fixture(params=[("image", "text"), ("image", "text", "joint")], ids=["towers", "fused"])
def leaves(request):
    """Features before their normalisation, and the scale."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(5, 4, generator=generator) for name in request.param} | {"scale": torch.tensor(3.0)}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def embedded(leaves, rows):
    return Features(tuple(F.normalize(leaves[n][rows], dim=-1) for n in leaves if n != "scale"), INDEX[rows])


def slices(split):
    ends = torch.tensor(split).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, split, strict=True)]


def in_parts(leaves, split):
    with torch.no_grad():
        parts = [embedded(leaves, rows) for rows in slices(split)]
    contrasts = contrast_parts(parts, leaves["scale"])
    return contrasts, [
        contrast.through(embedded(leaves, rows).embeds, leaves["scale"])
        for contrast, rows in zip(contrasts, slices(split), strict=True)
    ]


def of_the_whole(leaves):
    loss = itc_loss(embedded(leaves, slice(0, 5)).embeds, INDEX, leaves["scale"])
    return loss, torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.parametrize("split", SPLITS)
def test_the_mean_over_the_parts_has_the_loss_and_the_gradients_of_the_whole(leaves, split):
    loss, gradients = of_the_whole(leaves)
    contrasts, losses = in_parts(leaves, split)
    for contrast, part in zip(contrasts, losses, strict=True):
        torch.testing.assert_close(part.detach(), loss.detach())
        assert not any(each.requires_grad for each in (contrast.loss, contrast.logit_scale, *contrast.embeds))
    found = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)
        assert float(theirs.abs().max()) > 1e-3


def test_control_each_part_on_its_own_differs(leaves):
    _, gradients = of_the_whole(leaves)
    losses = []
    for rows in slices([2, 3]):
        part = embedded(leaves, rows)
        losses.append(itc_loss(part.embeds, part.image_index, leaves["scale"]))
    found = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    assert float((found[0] - gradients[0]).abs().max()) > 1e-2
