"""Gathering over two processes against one process that holds everything."""

import warnings

import pytest
import torch
from ranks import run_on_ranks

from bridgetower.distributed import all_gather, gather_by_id, rank, world_size

WORLD = 2
ROWS = 3


def features():
    return torch.randn(WORLD * ROWS, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loss_of(gathered, weight_seed=0):
    """A loss in which every row acts on every other."""
    weights = torch.randn(len(gathered), generator=torch.Generator().manual_seed(weight_seed), dtype=torch.float64)
    return ((gathered @ gathered.T).softmax(dim=1).diagonal().log() * weights).sum()


def single_gradient(weight_seed=0):
    whole = features().requires_grad_()
    loss_of(whole, weight_seed).backward()
    return whole.grad


def gather_and_differentiate(gather_with_grads, own_loss):
    """Values and gradient in this process; its loss is its own, or the one that all share."""
    mine = features().chunk(WORLD)[rank()].clone().requires_grad_()
    gathered = all_gather(mine, gather_with_grads=gather_with_grads)
    loss_of(gathered, rank() if own_loss else 0).backward()
    return gathered.detach(), mine.grad


def gather_all_ways():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a collective that is on its way out of torch
        results = {
            (with_grads, own_loss): gather_and_differentiate(with_grads, own_loss)
            for with_grads in (True, False)
            for own_loss in (True, False)
        }
    position = (rank(), world_size())
    dtypes = (torch.int64, torch.bool, torch.bfloat16, torch.float16)
    typed = {dtype: all_gather(torch.tensor([[0, rank()]]).to(dtype)) for dtype in dtypes}
    strided = all_gather(torch.arange(6).reshape(2, 3).T + 10 * rank())
    empty = all_gather(torch.zeros(0, 5), gather_with_grads=False)
    return results, position, typed, strided, empty


@pytest.fixture(scope="module")
def gathered():
    return run_on_ranks(WORLD, gather_all_ways)


class TestAllGather:
    def test_values_and_places(self, gathered):
        assert [position for _, position, *_ in gathered] == [(0, WORLD), (1, WORLD)]
        for results, *_ in gathered:
            for values, _ in results.values():
                assert torch.equal(values, features())

    def test_gradients(self, gathered):
        """Of a shared loss `world_size` times that of one process; of losses of their own the sum."""
        shared, own = (torch.cat([results[True, each][1] for results, *_ in gathered]) for each in (False, True))
        torch.testing.assert_close(shared / WORLD, single_gradient())
        torch.testing.assert_close(own, single_gradient(0) + single_gradient(1))

    def test_without_grads_only_the_own_loss_counts(self, gathered):
        for own_loss in (True, False):
            for position, (results, *_) in enumerate(gathered):
                expected = single_gradient(position if own_loss else 0).chunk(WORLD)[position]
                torch.testing.assert_close(results[False, own_loss][1], expected)
        with_grads, without = (gathered[0][0][key][1] for key in ((True, True), (False, True)))
        assert not torch.allclose(with_grads, without)

    def test_other_types_layouts_and_no_rows(self, gathered):
        for _, _, typed, strided, empty in gathered:
            for dtype, values in typed.items():
                assert torch.equal(values, torch.tensor([[0, 0], [0, 1]]).to(dtype))
            part = torch.arange(6).reshape(2, 3).T
            assert torch.equal(strided, torch.cat([part, part + 10]))
            assert empty.shape == (0, 5)

    def test_single_process_keeps_the_tensor(self):
        tensor = torch.randn(3, 2, requires_grad=True)
        assert (rank(), world_size()) == (0, 1)
        assert all_gather(tensor) is tensor
        assert all_gather(tensor, gather_with_grads=False) is tensor


SHARDS = {
    "padded": ([4, 0, 2], [3, 1, 4]),  # a sampler filled five rows up to six
    "uneven": ([7, 5, 6, 1], [0]),
    "nothing on one": ([], [2, 1]),
    "nothing": ([], []),
}


def rows_of(ids):
    """Ids with a float and a boolean tensor that follow from them."""
    ids = torch.tensor(ids, dtype=torch.long)
    return ids, torch.stack([ids * 0.5, -ids.float()], dim=1).requires_grad_(), ids % 2 == 0


def gather_shards():
    results = {}
    for name, shards in SHARDS.items():
        ids, vectors, flags = rows_of(shards[rank()])
        results[name] = gather_by_id(ids, vectors, flags)
    results["which"] = gather_by_id(torch.tensor([[6, 5], [4, 6]][rank()]), torch.full((2,), rank()))
    try:
        gather_by_id(torch.tensor([5, 6]))
    except ValueError as error:
        results["error"] = str(error)
    return results


@pytest.fixture(scope="module")
def gathered_by_id():
    return run_on_ranks(WORLD, gather_shards)


class TestGatherById:
    @pytest.mark.parametrize("name", SHARDS)
    def test_equals_one_process_with_every_row_once(self, gathered_by_id, name):
        every_id = sorted({number for shard in SHARDS[name] for number in shard})
        expected = [tensor.detach() for tensor in rows_of(every_id)]
        for results in gathered_by_id:
            for result, wanted in zip(results[name], expected, strict=True):
                assert torch.equal(result, wanted)
                assert result.dtype == wanted.dtype
                assert not result.requires_grad

    def test_of_two_rows_the_lowest_rank_stays_and_more_repeats_are_an_error(self, gathered_by_id):
        for results in gathered_by_id:
            ids, ranks = results["which"]
            assert ids.tolist() == [4, 5, 6]
            assert ranks.tolist() == [1, 0, 0]
            assert results["error"].startswith("2 of 4 ids are repeats; expected at most 1")

    def test_in_a_single_process(self):
        ids, values = gather_by_id(torch.tensor([3, 1, 2]), torch.tensor([[30.0], [10.0], [20.0]]))
        assert ids.tolist() == [1, 2, 3]
        assert values.tolist() == [[10.0], [20.0], [30.0]]
        with pytest.raises(ValueError, match="1 of 3 ids are repeats"):
            gather_by_id(torch.tensor([3, 1, 3]))


def fail_on_one():
    if rank() == 1:
        raise RuntimeError("rank one failed on purpose")


def test_a_failing_process_is_reported():
    with pytest.raises(RuntimeError, match="rank one failed on purpose"):
        run_on_ranks(WORLD, fail_on_one)
