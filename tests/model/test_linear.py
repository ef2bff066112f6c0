"""Products in oneDNN against those of PyTorch: values, gradients, packed weights, and where they stay PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from bridgetower.model.activation import activated
from bridgetower.model.config import Activation
from bridgetower.model.linear import Linear, in_onednn, linear, pack_weights

ATOL = 1e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(output: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, leaves, random(*output.shape, seed=9))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (2, 5, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients(shape: tuple[int, ...], biased: bool) -> None:
    hidden, weight = random(*shape).requires_grad_(), random(10, 24, seed=1).requires_grad_()
    bias = random(10, seed=2).requires_grad_() if biased else None
    leaves = [hidden, weight] if bias is None else [hidden, weight, bias]
    ours, theirs = linear(hidden, weight, bias), F.linear(hidden, weight, bias)
    assert in_onednn(hidden, weight)
    assert tiny.off(ours, theirs) < ATOL
    for one, other in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        assert tiny.off(one, other) < ATOL


def test_parts_of_tensors() -> None:
    """Operands that are not dense: the first tokens of each text, the first rows of a weight, a transposed gradient."""
    hidden, weight = random(3, 6, 24).requires_grad_(), random(30, 24, seed=1).requires_grad_()
    ours, theirs = (product(hidden[:, :2], weight[10:20], None).mT for product in (linear, F.linear))
    assert tiny.off(ours, theirs) < ATOL
    for one, other in zip(gradients(ours, [hidden, weight]), gradients(theirs, [hidden, weight]), strict=True):
        assert tiny.off(one, other) < ATOL


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["input", "weight", "bias"])
def test_frozen_parts_get_no_gradient(frozen: int) -> None:
    leaves = [random(4, 8), random(6, 8, seed=1), random(6, seed=2)]
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number != frozen)
    linear(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [number == frozen for number in range(3)]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
class TestActivatedInput:
    """A feed-forward layer's second product, whose input is an activation."""

    def test_values_and_gradients(self, activation: Activation) -> None:
        hidden, weight = random(2, 5, 24).requires_grad_(), random(10, 24, seed=1).requires_grad_()
        leaves = [hidden, weight, random(10, seed=2).requires_grad_()]
        ours = linear(hidden, weight, leaves[2], activation)
        theirs = F.linear(activated(hidden, activation), weight, leaves[2])
        assert tiny.off(ours, theirs) < ATOL
        wanted = gradients(theirs, leaves)
        for one, other in zip(gradients(ours, leaves), wanted, strict=True):
            assert tiny.off(one, other) < ATOL
        plain = linear(hidden, weight, leaves[2])
        assert tiny.off(gradients(plain, leaves)[0], wanted[0]) > 0.1, "control: without the activation"

    def test_it_is_not_kept_for_the_gradient(self, activation: Activation) -> None:
        up, down = Linear(8, 6), Linear(6, 4)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda it: it):
            hidden = up(random(5, 8))
            down(hidden, activation)
            assert [tensor.shape for tensor in kept if tensor.shape[0] == 5] == [(5, 8), (5, 6)]
            F.linear(activated(hidden, activation), down.weight)
        assert len([tensor for tensor in kept if tensor.shape == (5, 6)]) > 2, "control: apart, both are kept"

    def test_a_packed_weight_elsewhere_and_without_gradients(self, activation: Activation) -> None:
        layer, hidden = Linear(24, 10), random(3, 24)
        given, expected = hidden.clone(), F.linear(activated(hidden, activation), layer.weight, layer.bias)
        with torch.no_grad():
            assert tiny.off(layer(hidden, activation), expected) < ATOL
        assert tiny.off(layer.double()(hidden.double(), activation), expected.double()) < ATOL
        pack_weights(layer.float())
        assert layer.is_packed
        assert tiny.off(layer(hidden, activation), expected) < ATOL
        assert torch.equal(hidden, given)


def test_control_a_transposed_weight_is_another_product() -> None:
    hidden, weight = random(3, 8), random(8, 8, seed=1)
    assert tiny.off(linear(hidden, weight.T, None), F.linear(hidden, weight)) > 0.1


class TestElsewhere:
    """Where oneDNN is not asked, the results are PyTorch's own."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_other_number_formats(self, dtype: torch.dtype) -> None:
        layer, hidden = Linear(8, 6).to(dtype), random(3, 8).to(dtype)
        assert torch.equal(layer(hidden), F.linear(hidden, layer.weight, layer.bias))

    def test_autocast(self) -> None:
        layer, hidden = Linear(8, 6), random(3, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(hidden)
        assert output.dtype == torch.bfloat16

    def test_no_rows(self) -> None:
        layer = Linear(8, 6)
        output = layer(random(0, 5, 8))
        assert output.shape == (0, 5, 6)
        output.sum().backward()
        assert layer.weight.grad is not None
        assert not layer.weight.grad.any()

    def test_graphs_hold_plain_products(self) -> None:
        graph = torch.export.export(Linear(8, 6), (random(3, 8),)).graph
        calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert calls == ["aten.linear.default"]


class TestPacked:
    """Weights in the order in which oneDNN reads them."""

    @staticmethod
    def made(dtype: torch.dtype = torch.float32) -> tuple[Linear, Linear]:
        """A layer, and the same one packed."""
        plain, packed = (tiny.off_defaults(Linear(24, 10)).to(dtype) for _ in range(2))
        pack_weights(packed)
        return plain, packed

    @pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 5, 24), (0, 24), (2, 0, 24)], ids=str)
    def test_values(self, shape: tuple[int, ...]) -> None:
        plain, packed = self.made()
        assert packed.is_packed
        assert not plain.is_packed
        with torch.inference_mode():
            ours = packed(random(*shape))
        assert ours.shape == plain(random(*shape)).shape
        torch.testing.assert_close(ours, F.linear(random(*shape), plain.weight, plain.bias), atol=ATOL, rtol=0)

    def test_gradients_of_inputs(self) -> None:
        plain, packed = self.made()
        hidden = random(2, 5, 24).requires_grad_()
        (ours,), (theirs,) = (gradients(layer(hidden), [hidden]) for layer in (packed, plain))
        assert tiny.off(ours, theirs) < ATOL

    def test_bfloat16_is_as_near_to_float32_as_pytorch_is(self) -> None:
        plain, packed = self.made(torch.bfloat16)
        hidden = random(50, 24).bfloat16()
        exact = F.linear(hidden.double(), plain.weight.double(), plain.bias.double())
        ours = packed(hidden)
        assert ours.dtype == torch.bfloat16
        assert tiny.off(ours.double(), exact) < 2 * tiny.off(plain(hidden).double(), exact)

    @pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16")
    @pytest.mark.parametrize("autocast", [True, False])
    def test_bfloat16_products_of_a_float32_model(self, autocast: bool) -> None:
        """What autocast does, with the weights cast once."""
        plain, packed = self.made()
        pack_weights(packed, torch.bfloat16)
        hidden = random(2, 5, 24)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            expected = plain(hidden)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            ours = packed(hidden)
        assert ours.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(ours, expected)
        assert not torch.equal(ours.float(), plain(hidden))

    def test_state_dict_is_what_it_was(self) -> None:
        plain, packed = self.made()
        ours, theirs = packed.state_dict(), plain.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_in_inference_mode(self) -> None:
        model = tiny.build()
        with torch.inference_mode():
            pack_weights(model)
        assert not any(parameter.is_inference() for parameter in model.parameters())
        tiny.build(seed=1).load_state_dict(model.state_dict(), assign=True)

    def test_control_packing_is_of_these_weights(self) -> None:
        plain, packed = self.made()
        with torch.no_grad():
            plain.weight.add_(0.1)
        assert tiny.off(packed(random(3, 24)), plain(random(3, 24))) > 0.01

    def test_nothing_stays_of_what_was_loaded(self) -> None:
        layer = Linear(24, 10)
        loaded = {parameter.data_ptr() for parameter in layer.parameters()}
        pack_weights(layer)
        assert layer.bias.data_ptr() not in loaded

    def test_other_number_formats_are_left_alone(self) -> None:
        layer = Linear(24, 10).double()
        pack_weights(layer)
        assert not layer.is_packed
