"""Two processes that train on a set in an S3 store: the batches of one process, and one copy of each file."""

from dataclasses import replace
from pathlib import Path

import torch
from ranks import run_on_ranks
from torch import Tensor

from bridgetower.data.captions import CaptionImages, CaptionPairs
from bridgetower.data.config import DataConfig
from bridgetower.data.order import ShardOrder, StepSampler
from bridgetower.data.remote_sets import local_sets
from bridgetower.data.shards import FetchAhead
from bridgetower.distributed import rank, world_size
from bridgetower.processor import Processor
from stores import Store

WORLD = 2


def batches(config: DataConfig, processor: Processor) -> list[tuple[tuple[str, ...], Tensor]]:
    """Ids and pixels of the batches of this process in more than an epoch."""
    with local_sets(config, ("train",)) as sets:
        images = CaptionImages(sets, "train", processor)
        pairs = CaptionPairs(images, None)
        sampler = StepSampler(
            len(pairs),
            batch_size=4,
            micro_batches=1,
            steps=range(15),
            seed=3,
            order=ShardOrder(images.shards_of(pairs.image_numbers), 3, 2, FetchAhead(images.fetch)),
            rank=rank(),
            world_size=world_size(),
        )
        return [(batch.ids, batch.pixel_values) for batch in map(pairs.__getitem__, sampler)]


def test_two_processes_share_the_batches_of_one_and_the_copies(
    store: Store, sharded_dataset: Path, tiny_processor: Processor, tmp_path: Path
) -> None:
    url = store.upload(sharded_dataset, "bucket/set")
    config = DataConfig(folders=(url,), shard_cache=str(tmp_path / "one"), shuffle_shards=2)
    alone = batches(config, tiny_processor)
    store.reset()
    two = run_on_ranks(WORLD, batches, replace(config, shard_cache=str(tmp_path / "two")), tiny_processor)
    assert len(alone) == len(two[0]) == 15
    for (ids, pixels), *shares in zip(alone, *two, strict=True):
        assert ids == shares[0][0] + shares[1][0]
        assert pixels.equal(torch.cat([share for _, share in shares]))
    reads = [store.reads(f"train-{number:05}-of-00007.parquet") for number in range(7)]
    assert reads == [2] * 7  # for the texts, and for the copy
