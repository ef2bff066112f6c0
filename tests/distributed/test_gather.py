"""What processes exchange and have in common: rows, arguments, data, states, and features of frozen towers."""

import itertools
import math
import warnings

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor, nn

from bridgetower.data.batches import frozen
from bridgetower.distributed import (
    all_gather,
    broadcast_object,
    gather_by_id,
    rank,
    require_same,
    world_size,
)
from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.training.optim import build_optimizer
from bridgetower.training.state import StateSaver, TrainingState, load_state, newest

WORLD = 2
ROWS = 3


def rank_features():
    return torch.randn(
        WORLD * ROWS, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def loss_of(gathered, weight_seed=0):
    weights = torch.randn(
        len(gathered), generator=torch.Generator().manual_seed(weight_seed), dtype=torch.float64
    )
    return ((gathered @ gathered.T).softmax(dim=1).diagonal().log() * weights).sum()


def single_gradient(weight_seed=0):
    whole = rank_features().requires_grad_()
    loss_of(whole, weight_seed).backward()
    return whole.grad


def gather_and_differentiate(gather_with_grads, own_loss):
    """Returns values and gradients in this process, of its local loss or of one that all share."""
    mine = rank_features().chunk(WORLD)[rank()].clone().requires_grad_()
    gathered = all_gather(mine, gather_with_grads=gather_with_grads)
    loss_of(gathered, rank() if own_loss else 0).backward()
    return gathered.detach(), mine.grad


def gather_all_ways():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a collective that is on its way out of torch
        results = {
            way: gather_and_differentiate(*way)
            for way in itertools.product((True, False), repeat=2)
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
                assert torch.equal(values, rank_features())

    def test_gradients(self, gathered):
        """A shared loss gives `world_size` times the gradient of one process, local losses give the sum."""
        shared, local = (
            torch.cat([results[True, is_shared][1] for results, *_ in gathered])
            for is_shared in (False, True)
        )
        torch.testing.assert_close(shared / WORLD, single_gradient())
        torch.testing.assert_close(local, single_gradient(0) + single_gradient(1))

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
            transposed = torch.arange(6).reshape(2, 3).T
            assert torch.equal(strided, torch.cat([transposed, transposed + 10]))
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


def rows_by_id(ids):
    ids = torch.tensor(ids, dtype=torch.long)
    return ids, torch.stack([ids * 0.5, -ids.float()], dim=1).requires_grad_(), ids % 2 == 0


def gather_shards():
    results = {}
    for name, shards in SHARDS.items():
        ids, vectors, flags = rows_by_id(shards[rank()])
        results[name] = gather_by_id(ids, vectors, flags)
    results["which"] = gather_by_id(
        torch.tensor([[6, 5], [4, 6]][rank()]), torch.full((2,), rank())
    )
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
        expected = [tensor.detach() for tensor in rows_by_id(every_id)]
        for results in gathered_by_id:
            for result, expected_rows in zip(results[name], expected, strict=True):
                assert torch.equal(result, expected_rows)
                assert result.dtype == expected_rows.dtype
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


CONDITIONS = {"number of processes": WORLD, "data": {}, "held-out data": {}, "optimiser": "adamw"}

CONTENT = {
    1: [torch.arange(6).reshape(2, 3).T, ("a", 0.1, None)],
    "half": torch.tensor([0.1, -2.0]).bfloat16(),
    "true": torch.tensor(True),
    "none": torch.zeros(0, 4),
    "nested": {"é": [], "step": torch.tensor(3.0)},
}


def share():
    return (
        broadcast_object(CONTENT if rank() == 0 else None),
        broadcast_object(None),
        broadcast_object(rank() == 0),
    )


def equal_objects(first, second):
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            equal_objects(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple):
        return (
            type(first) is type(second)
            and len(first) == len(second)
            and all(map(equal_objects, first, second))
        )
    return bool(first == second)


def test_every_process_gets_what_the_first_has():
    for content, nothing, true in run_on_ranks(WORLD, share):
        assert equal_objects(content, CONTENT)
        assert (nothing, true) == (None, True)
    assert broadcast_object(CONTENT) is CONTENT  # alone


VALUES = {"out": "runs/é", "optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}, "seed": 3}


def compare_values(changes):
    try:
        require_same(VALUES | changes[rank()])
    except ValueError as error:
        return str(error)
    return "the same"


def test_values_that_differ_are_named():
    end = "; start every process with the same options and data"
    assert run_on_ranks(WORLD, compare_values, [{}, {}]) == ["the same"] * WORLD
    message = (
        "out is runs/é in process 0 and other in process 1; seed is 3 in process 0 and None in process 1"
        + end
    )
    assert (
        run_on_ranks(WORLD, compare_values, [{}, {"out": "other", "seed": None}])
        == [message] * WORLD
    )
    changes = [
        {"seed": 4, "content of a/b.parquet": "12"},
        {"optimizer": {"lr": 0.2, "betas": (0.8, 0.99)}},
    ]
    message = (
        "optimizer.lr is 0.1 in process 0 and 0.2 in process 1; optimizer.betas is (0.9, 0.99) in process 0 and "
        "(0.8, 0.99) in process 1; seed is 4 in process 0 and 3 in process 1; and 1 more differ"
    )
    assert run_on_ranks(WORLD, compare_values, changes) == [message + end] * WORLD
    require_same(VALUES)  # alone


def trained_linear(seed, rule):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    names, parameters = zip(*model.named_parameters(), strict=True)
    group = {"params": list(parameters), "names": list(names), "lr": 0.1, "weight_decay": 0.1}
    optimizer = build_optimizer([group], OptimizerConfig(lr=0.1, rule=rule))
    for _ in range(seed):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def resume_in_process(folders, rule):
    model, optimizer = trained_linear(rank(), rule)
    state = load_state(folders[rank()], model, optimizer, CONDITIONS)
    return vars(state), model.state_dict(), optimizer.state_dict()["state"]


@pytest.mark.parametrize("rule", ["adamw", "hf_adamw"])
def test_the_state_is_that_of_the_first_process(tmp_path, rule):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    StateSaver(folders[1], CONDITIONS).save(*trained_linear(2, rule), TrainingState(step=2))
    assert [
        state["step"] for state, *_ in run_on_ranks(WORLD, resume_in_process, folders, rule)
    ] == [0, 0]
    assert newest(folders[0]) is None
    model, optimizer = trained_linear(3, rule)
    StateSaver(folders[0], CONDITIONS).save(model, optimizer, TrainingState(step=3, best=0.5))
    expected = (
        {**vars(TrainingState(step=3, best=0.5))},
        model.state_dict(),
        optimizer.state_dict()["state"],
    )
    for elsewhere in (folders[1], tmp_path / "nothing"):
        for resumed in run_on_ranks(WORLD, resume_in_process, [folders[0], elsewhere], rule):
            assert equal_objects(resumed, expected)


def computed_and_read(folder):
    """The rows that this process computed, and what it reads of all, for two contents and for the last one again."""
    frozen._COMMIT_BYTES = 1  # so that processes write at the same time
    results = []
    for num_rows in (7, 10, 10):
        computed = []

        def compute(rows, computed=computed):
            for row in rows:
                computed.append(row)
                yield torch.full((1, 2, 3), float(row))

        shape = {"num_layers": 1, "width": 3, "dtype": torch.float32}
        features = frozen.cached_features(folder, {"rows": num_rows}, num_rows, 2, compute, **shape)
        results.append((computed, features.read(range(num_rows))[:, 0, 1, 2].tolist()))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_row_is_computed_once_and_read_by_all(world_size, tmp_path):
    results = run_on_ranks(world_size, computed_and_read, tmp_path)
    seven_rows, ten_rows, ten_rows_again = zip(*results, strict=True)
    for num_rows, result in ((7, seven_rows), (10, ten_rows)):
        numbers = list(range(num_rows))
        computed_rows, read_rows = zip(*result, strict=True)
        assert sorted(itertools.chain.from_iterable(computed_rows)) == numbers
        assert max(map(len, computed_rows)) == math.ceil(num_rows / world_size)
        assert list(read_rows) == [numbers] * world_size
    assert list(ten_rows_again) == [([], list(range(10)))] * world_size
