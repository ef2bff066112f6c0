"""The objectives against slow references written from their formulas, and the pairs of matching."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgetower.data.batches.batch import IGNORED
from bridgetower.model.heads import ItcHead, MlmHead
from bridgetower.objectives.losses import (
    Features,
    Losses,
    _warn_once,
    class_loss,
    contrast_micro_batches,
    hard_pairs,
    itc_loss,
    matching_loss,
    mlm_loss,
    pairs_with_negatives,
    random_pairs,
    similarity,
    uniform_pairs,
)

SCALE = torch.tensor(1 / 0.07)


def random_features(count, seed=0, width=6):
    return F.normalize(
        torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def slow_itc(images, texts, index, scale, joint=None):
    """InfoNCE in all directions, pair by pair in double precision, with equal weight on every pair of one image."""
    directions = (
        [(images, texts), (texts, images)] if joint is None else [(texts, images), (texts, joint)]
    )
    directions += [] if joint is None else [(images, joint)]
    losses = []
    for rows, columns in ((first.double(), second.double()) for first, second in directions):
        for row, image in enumerate(index):
            exponents = [scale * float(rows[row] @ column) for column in columns]
            normaliser = math.log(sum(math.exp(exponent) for exponent in exponents))
            positives = [column for column, second in enumerate(index) if second == image]
            losses.append(
                sum(normaliser - exponents[column] for column in positives) / len(positives)
            )
    return sum(losses) / len(losses)


class TestItc:
    @pytest.mark.parametrize("index", [[0, 1, 2, 3, 4], [7, 7, 2, 3, 7], [1, 1, 1, 1, 1]])
    def test_equals_the_slow_reference(self, index):
        images = random_features(5, 0)
        texts = random_features(5, 1)
        loss = itc_loss((images, texts), torch.tensor(index), SCALE)
        assert loss.item() == pytest.approx(slow_itc(images, texts, index, float(SCALE)), rel=1e-5)
        joint = random_features(5, 2)
        of_three = itc_loss((images, texts, joint), torch.tensor(index), SCALE)
        assert of_three.item() == pytest.approx(
            slow_itc(images, texts, index, float(SCALE), joint), rel=1e-5
        )

    def test_bfloat16_autocast_changes_nothing(self):
        images = random_features(8, 0, 64)
        texts = random_features(8, 1, 64)
        index = torch.arange(8)
        plain = itc_loss((images, texts), index, SCALE)
        with torch.autocast("cpu", torch.bfloat16):
            assert itc_loss((images, texts), index, SCALE) == plain
            rounded = SCALE * images @ texts.T
        assert (
            rounded.float() - similarity(images, texts, SCALE)
        ).abs().max() > 1e-3  # what it would have cost

    @pytest.mark.parametrize(
        ("temperature", "clamped"), [(0.07, 0.07), (1e-5, 0.001), (-1.0, 0.001), (3.0, 0.5)]
    )
    def test_temperature_is_clamped_before_the_loss(self, temperature, clamped):
        head = ItcHead(4, 4, 4)
        with torch.no_grad():
            head.temperature.fill_(temperature)
        images = random_features(3, 0)
        texts = random_features(3, 1)
        loss = itc_loss((images, texts), torch.arange(3), head.logit_scale())
        assert head.temperature.item() == pytest.approx(clamped)
        assert loss.item() == pytest.approx(
            slow_itc(images, texts, [0, 1, 2], 1 / clamped), rel=1e-4
        )
        loss.backward()
        assert head.temperature.grad.isfinite()

    def test_gradient_is_that_of_the_formula(self):
        images, texts = (random_features(4, seed).double().requires_grad_() for seed in (0, 1))
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
            assert images.grad[row, column].item() == pytest.approx(
                (upper - lower) / (2 * step), rel=1e-3, abs=1e-5
            )


class TestMlm:
    def setup_method(self):
        torch.manual_seed(0)
        self.head = MlmHead(6, 11, 1e-12)
        self.hidden = torch.randn(3, 5, 6, requires_grad=True)
        self.labels = torch.full((3, 5), IGNORED)
        self.labels[0, 1] = 3
        self.labels[2, 0] = 10
        self.labels[2, 4] = 0

    def gradients(self, loss):
        return list(torch.autograd.grad(loss, [self.hidden, *self.head.parameters()]))

    def test_equals_full_logits_in_value_and_gradient(self):
        loss, accuracy = mlm_loss(self.head, self.hidden, self.labels)
        logits = self.head(self.hidden)
        full = F.cross_entropy(logits.flatten(0, 1), self.labels.flatten(), ignore_index=IGNORED)
        torch.testing.assert_close(loss, full)
        for ours, theirs in zip(self.gradients(loss), self.gradients(full), strict=True):
            torch.testing.assert_close(ours, theirs)
        right = [
            int(logits[b, t].argmax()) == int(self.labels[b, t])
            for b, t in ((0, 1), (2, 0), (2, 4))
        ]
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
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 3.0]])
    labels = torch.tensor([1, 0, 0])
    loss, accuracy = class_loss(logits, labels)
    expected = (
        math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))
    ) / 3
    assert loss.item() == pytest.approx(expected)
    assert accuracy.item() == pytest.approx(2 / 3)


def test_total_is_the_weighted_sum():
    terms = {
        "mlm": torch.tensor(2.0, requires_grad=True),
        "itm": torch.tensor(3.0, requires_grad=True),
    }
    losses = Losses.weigh(terms, {"mlm": 0.5, "itm": 2.0, "itc": 1.0})
    assert losses.total.item() == 0.5 * 2 + 2 * 3
    losses.total.backward()
    assert {name: term.grad for name, term in terms.items()} == {"mlm": 0.5, "itm": 2.0}
    with pytest.raises(KeyError):
        Losses.weigh({"mlm": torch.tensor(2.0)}, {"itm": 1.0})


INDEX = torch.tensor([0, 1, 2, 0, 3])
SPLITS = ([5], [2, 3], [1, 1, 1, 1, 1])


@pytest.fixture(params=[("image", "text"), ("image", "text", "joint")], ids=["towers", "fused"])
def leaves(request):
    """Features before their normalisation, and the scale."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(5, 4, generator=generator) for name in request.param} | {
        "scale": torch.tensor(3.0)
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def embedded(leaves, rows):
    return Features(
        tuple(F.normalize(leaves[n][rows], dim=-1) for n in leaves if n != "scale"), INDEX[rows]
    )


def slices(split):
    ends = torch.tensor(split).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, split, strict=True)]


def losses_in_parts(leaves, split):
    with torch.no_grad():
        pieces = [embedded(leaves, rows) for rows in slices(split)]
    contrasts = contrast_micro_batches(pieces, leaves["scale"])
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
    contrasts, losses = losses_in_parts(leaves, split)
    for contrast, piece_loss in zip(contrasts, losses, strict=True):
        torch.testing.assert_close(piece_loss.detach(), loss.detach())
        assert not any(
            tensor.requires_grad
            for tensor in (contrast.loss, contrast.logit_scale, *contrast.embeds)
        )
    actual = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    for ours, theirs in zip(actual, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)
        assert float(theirs.abs().max()) > 1e-3


def test_control_each_part_on_its_own_differs(leaves):
    _, gradients = of_the_whole(leaves)
    losses = []
    for rows in slices([2, 3]):
        piece = embedded(leaves, rows)
        losses.append(itc_loss(piece.embeds, piece.image_index, leaves["scale"]))
    actual = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    assert float((actual[0] - gradients[0]).abs().max()) > 1e-2


SEEDS = st.integers(0, 2**31)


@st.composite
def image_indices(draw):
    """Batches of two rows and more, with repeated images, but not of one image only."""
    index = draw(st.lists(st.integers(0, 4), min_size=2, max_size=9))
    if len(set(index)) == 1:
        index[draw(st.integers(0, len(index) - 1))] = 9
    return torch.tensor(index)


@st.composite
def random_similarities(draw, rows, columns, scale):
    """Returns random similarities. At the larger scales the softmax underflows nearly everywhere."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return scale * torch.randn(rows, columns, generator=generator)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labels_of(pairs, images, texts):
    return (images[pairs.image_rows] == texts[pairs.text_rows]).long()


class TestRandom:
    @given(index=image_indices(), seed=SEEDS)
    def test_labels_are_true_and_half_are_positive(self, index, seed):
        pairs = random_pairs(index, generator(seed))
        count = len(index)
        assert torch.equal(pairs.labels, labels_of(pairs, index, index))
        assert int(pairs.labels.sum()) == count // 2
        assert torch.equal(pairs.text_rows, torch.arange(count))
        is_positive = pairs.labels == 1
        assert torch.equal(pairs.image_rows[is_positive], pairs.text_rows[is_positive])

    def test_positives_and_negatives_fall_everywhere(self):
        index = torch.tensor([0, 0, 1, 2])
        source = generator()
        drawn = [random_pairs(index, source) for _ in range(300)]
        positives = torch.stack([pairs.labels for pairs in drawn]).float().mean(dim=0)
        assert (positives - 0.5).abs().max() < 0.12
        negatives = torch.cat([pairs.image_rows[:1][pairs.labels[:1] == 0] for pairs in drawn])
        shares = torch.bincount(negatives, minlength=4) / len(negatives)
        assert shares[:2].tolist() == [0, 0]  # the text's own image, twice in the batch
        assert (shares[2:] - 0.5).abs().max() < 0.15


def test_uniform_negatives_fall_everywhere():
    index = torch.tensor([0, 0, 1, 2])
    source = generator()
    drawn = [uniform_pairs(index, source) for _ in range(300)]
    assert all(pairs.labels.tolist() == [1] * 4 + [0] * 8 for pairs in drawn)
    images_of_first_text = torch.stack([pairs.image_rows[4] for pairs in drawn])
    texts_of_first_image = torch.stack([pairs.text_rows[8] for pairs in drawn])
    for rows in (images_of_first_text, texts_of_first_image):
        shares = torch.bincount(rows, minlength=4) / len(rows)
        assert shares[:2].tolist() == [0, 0]
        assert (shares[2:] - 0.5).abs().max() < 0.15


class TestHard:
    @settings(deadline=None)
    @given(
        data=st.data(),
        index=image_indices(),
        other=st.just(torch.tensor([], dtype=torch.long)) | image_indices(),  # of other ranks
        scale=st.sampled_from([0.0, 1.0, 14.0, 1000.0, 1e6]),
        seed=SEEDS,
        first=st.booleans(),
    )
    def test_labels_are_true(self, data, index, other, scale, seed, first):
        count = len(index)
        start = 0 if first else len(other)
        everything = torch.cat([index, other] if first else [other, index])
        local_rows = slice(start, start + count)
        scores = [data.draw(random_similarities(count, len(everything), scale)) for _ in range(2)]
        pairs = hard_pairs(*scores, index, everything, local_rows, generator(seed))
        assert torch.equal(pairs.labels, labels_of(pairs, everything, everything))
        assert pairs.labels.tolist() == [1] * count + [0] * 2 * count
        assert torch.equal(
            pairs.image_rows[:count], torch.arange(local_rows.start, local_rows.stop)
        )
        assert torch.equal(
            pairs.text_rows[count : 2 * count], torch.arange(local_rows.start, local_rows.stop)
        )
        assert torch.equal(
            pairs.image_rows[2 * count :], torch.arange(local_rows.start, local_rows.stop)
        )

    def test_own_pair_far_ahead_does_not_hide_the_order_of_the_rest(self):
        """exp(-200) is 0 in single precision, so a softmax over all columns could not tell the others apart."""
        scores = torch.tensor([[200.0, 5.0, 0.0], [0.0, 200.0, 5.0], [5.0, 0.0, 200.0]])
        source = generator()
        drawn = [
            hard_pairs(scores, scores, torch.arange(3), torch.arange(3), slice(0, 3), source)
            for _ in range(100)
        ]
        harder = torch.stack([pairs.image_rows[3:6] for pairs in drawn]) == torch.tensor([1, 2, 0])
        assert harder.float().mean() > 0.95

    def test_texts_choose_images_and_images_choose_texts(self):
        far = 50 * torch.eye(3)
        # the next but one, and the next
        image_to_text = far.roll(2, dims=1)
        text_to_image = far.roll(1, dims=1)
        pairs = hard_pairs(
            image_to_text, text_to_image, torch.arange(3), torch.arange(3), slice(0, 3), generator()
        )
        assert pairs.image_rows.tolist() == [0, 1, 2, 1, 2, 0, 0, 1, 2]
        assert pairs.text_rows.tolist() == [0, 1, 2, 0, 1, 2, 2, 0, 1]

    def test_frequencies_follow_the_softmax_over_the_others(self):
        scores = torch.tensor([0.0, 1.0, 2.0, 9.0]).expand(4, 4)
        source = generator()
        index = torch.arange(4)
        drawn = [hard_pairs(scores, scores, index, index, slice(0, 4), source) for _ in range(600)]
        # of image 3, whose own text scores 9
        texts = torch.stack([pairs.text_rows[8:] for pairs in drawn])[:, 3]
        shares = torch.bincount(texts, minlength=4) / len(texts)
        torch.testing.assert_close(shares[:3], scores[0, :3].softmax(dim=0), atol=0.06, rtol=0)
        assert shares[3] == 0

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_scores_that_are_not_finite_leave_the_error_to_the_loss(self, value):
        scores = torch.full((3, 3), value)
        index = torch.tensor([0, 0, 1])
        pairs = hard_pairs(scores, scores, index, index, slice(0, 3), generator())
        assert torch.equal(pairs.labels, labels_of(pairs, index, index))


def pairs_of(negatives, index):
    if negatives == "hard":
        scores = torch.randn(len(index), len(index))
        return hard_pairs(scores, scores, index, index, slice(0, len(index)), generator())
    return (random_pairs if negatives == "random" else uniform_pairs)(index, generator())


@pytest.mark.parametrize("negatives", ["random", "uniform", "hard"])
class TestOneImageOnly:
    @pytest.mark.parametrize("index", [[3], [3, 3], [5, 5, 5, 5]])
    def test_all_pairs_are_true_and_nothing_is_learnt(self, negatives, index, caplog):
        _warn_once.cache_clear()
        for _ in range(2):
            pairs = pairs_of(negatives, torch.tensor(index))
            assert pairs.labels.tolist() == [1] * len(pairs.labels)
            assert max(*pairs.image_rows.tolist(), *pairs.text_rows.tolist(), 0) < len(index)
            logits = torch.randn(len(pairs.labels), 2, requires_grad=True)
            loss, accuracy = matching_loss(logits, pairs.labels)
            loss.backward()
            assert loss.item() == 0
            assert logits.grad.tolist() == [[0, 0]] * len(pairs.labels)
            assert accuracy == (logits[:, 1] > logits[:, 0]).float().mean()
        assert caplog.text.count("has no negatives") == 1

    def test_two_images_are_learnt_from(self, negatives, caplog):
        _warn_once.cache_clear()
        pairs = pairs_of(negatives, torch.tensor([3, 4]))
        logits = torch.randn(len(pairs.labels), 2)
        loss, _ = matching_loss(logits, pairs.labels)
        assert loss == F.cross_entropy(logits, pairs.labels)
        assert not caplog.records


def test_layout_of_positives_and_negatives():
    pairs = pairs_with_negatives(torch.tensor([5, 4]), torch.tensor([0, 1]), slice(2, 4))
    assert pairs.image_rows.tolist() == [2, 3, 5, 4, 2, 3]
    assert pairs.text_rows.tolist() == [2, 3, 2, 3, 0, 1]
    assert pairs.labels.tolist() == [1, 1, 0, 0, 0, 0]
