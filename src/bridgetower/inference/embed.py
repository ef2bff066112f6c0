"""Vectors and scores of any number of examples, computed in order in this process or on a Ray cluster."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from bridgetower.data.sources.example import Example, Image
from bridgetower.data.sources.fetch import is_url
from bridgetower.distributed import available_cores
from bridgetower.extras import require
from bridgetower.inference.config import Content, SourceConfig
from bridgetower.inference.items import Item, Pixels, Tokens, batched
from bridgetower.inference.predictor import Predictor, load
from bridgetower.processor import Processor
from bridgetower.processor.loading import load_items
from bridgetower.progress import counting

Model = Predictor | str | Path | Callable[[], Predictor]
"""A loaded model, what to load, or what returns one."""

Of = Content | Literal["all", "classes", "scores"] | None
"""What is computed of an example.

None: vectors of its image, or of its texts without one; "all": vectors of its image, its texts and its pairs;
"classes": outputs of the classification head; "scores": outputs of the matching and contrastive heads for its pairs."""

Task = Callable[[], Iterable[Example]]
"""A part of the work, which any process can do."""

T = TypeVar("T")

MIN_FOR_WORKERS = 500  # examples that take as long to decode as processes take to start

# Items that are not embedded.
_ITEMS: dict[Of, Item] = {
    "classes": Item(kind="prediction", head="classification"),
    "scores": Item(kind="score"),
}
_LOCAL = "local"  # address of a Ray cluster that starts and ends with the run
_MAX_WAITING = 2**16  # examples in memory
# Writing takes at most this share of the time, so that the versions of a Lance table stay few.
_WRITING_SHARE = 0.01
_IMAGE_BYTES = re.compile(r"^the image of \d+ bytes")
_LASTING_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Embedded:
    """An example with its vectors, or with the reason why it has none."""

    example: Example  # without the bytes of its image
    digest: str = ""  # SHA-256 of the image file
    size: int = 0  # of the image file, in bytes
    width: int = 0  # of the upright image, in pixels; 0 without an image
    height: int = 0
    frame: bytes | None = field(default=None, repr=False)  # image file, of a moment of a video
    ids: list[Tokens] = field(default_factory=list)  # token ids of each text
    num_cut: int = 0  # texts that were too long
    vectors: dict[str, list[np.ndarray]] = field(default_factory=dict)  # by images, texts, pairs
    problem: str = ""
    may_pass: bool = False  # another attempt may succeed, as after an error of a network
    # The file may change, which the version of the source does not tell.
    may_be_mended: bool = False


def embed_tasks(
    tasks: Iterable[Task],
    of: Of,
    model: Model,
    config: SourceConfig,
    write: Callable[[Sequence[Embedded]], None],
    *,
    num_done: int = 0,
    total: int | None = None,
    progress: bool = False,
) -> int:
    """Embeds the examples of tasks and writes them every few seconds. Returns how many texts were cut."""
    if config.ray is None:
        examples = chain.from_iterable(task() for task in tasks)
        batches = embed_examples(load_model(model), examples, of, config)
    else:
        batches = _embed_on_ray(tasks, of, model, config)
    waiting = []
    num_cut = 0
    start_time = write_time = time.monotonic()
    with counting("embedding", total=total, enabled=progress) as advance:
        advance(num_done)
        try:
            for batch in batches:
                waiting += batch
                num_cut += sum(result.num_cut for result in batch)
                advance(len(batch))
                now = time.monotonic()
                pause = config.commit_seconds
                if pause:
                    pause = max(pause, _WRITING_SHARE * (now - start_time))
                if len(waiting) >= _MAX_WAITING or now - write_time >= pause:
                    ready = waiting
                    waiting = []
                    write_time = now
                    write(ready)
        finally:
            write(waiting)
    if num_cut:
        logger.warning("%d texts were longer than the model takes and were cut", num_cut)
    return num_cut


def embed_examples(
    predictor: Predictor, examples: Iterable[Example], of: Of, config: SourceConfig
) -> Iterator[list[Embedded]]:
    """Yields batches of examples, in order, with their vectors or with the reason why they have none."""
    item = _ITEMS.get(of, Item())
    if of not in ("pairs", *_ITEMS):
        predictor.model.head("itc")  # raises if the model has none
    blank = predictor.processor.blank_image().pixels  # of an example that has a text alone

    # Few examples are decoded before processes would have started.
    remaining = iter(examples)
    num_workers = config.num_workers
    if num_workers is None:
        num_workers = 0
        if config.ray is None:
            first = list(islice(remaining, MIN_FOR_WORKERS))
            remaining = chain(first, remaining)
            if len(first) >= MIN_FOR_WORKERS:
                num_workers = available_cores()

    batches = batched(remaining, config.batch_size)
    decode = partial(decode_examples, predictor.processor, of, config.truncate)
    for results, pixels in load_items(decode, batches, num_workers=num_workers):
        rows = iter(pixels)
        images = [next(rows) if result.width else blank for result in results]

        # Vectors of one kind of content are computed together, and added to the examples that have it.
        for content in ("images", "texts", "pairs"):
            items = []
            vectors = []  # to which the vector of each item is added
            for result, image in zip(results, images, strict=True):
                if content in result.vectors:
                    item_image = None if content == "texts" else image
                    texts = [None] if content == "images" else result.ids
                    items += [replace(item, image=item_image, ids=ids) for ids in texts]
                    vectors += [result.vectors[content]] * len(texts)
            outputs: Any = map(predictor.compute, batched(items, config.batch_size))
            for output, destination in zip(chain.from_iterable(outputs), vectors, strict=True):
                destination.append(output.numpy())
        yield results


def decode_examples(
    processor: Processor, of: Of, truncate: bool, batch: Sequence[Example]
) -> tuple[list[Embedded], UInt8[Tensor, "n 3 h w"]]:
    """Reads the images and tokenizes the texts of examples. Returns the pixels of all images in one tensor."""
    results = []
    pixels: list[Pixels] = []
    for example in batch:
        contents = _contents(example, of)
        images = tuple(replace(image, content=None) for image in example.images)
        result = Embedded(example=replace(example, images=images), problem=example.problem)
        needs_image = contents != ("texts",) and (example.images or of != "classes")
        if needs_image and not result.problem:
            pixels += _read_only_image(result, example.images, processor)
        if contents != ("images",) and not result.problem:
            _tokenize_texts(result, processor, truncate)
        if not result.problem:
            result.vectors = {content: [] for content in contents}
        results.append(result)
    return results, torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8)


def _contents(example: Example, of: Of) -> tuple[str, ...]:
    """Returns the kinds of vectors of an example."""
    if of in _ITEMS:
        return ("pairs",)
    if of == "all":
        return ("images", "texts", "pairs") if example.texts else ("images",)
    return (of or ("images" if example.images else "texts"),)


def _read_only_image(
    result: Embedded, images: Sequence[Image], processor: Processor
) -> Iterator[Pixels]:
    """Yields the pixels of the only image of an example, or notes why it has none."""
    if len(images) != 1:
        result.problem = "it has no image"
        if images:
            result.problem = (
                f"it has {len(images)} images; expected one: name its column as image_column"
            )
        return
    image = images[0]
    try:
        content = image.read()
        resized = processor.prepare(content)
    except (ValueError, OSError) as error:
        result.problem = _IMAGE_BYTES.sub("it", str(error))
        if isinstance(error, FileNotFoundError) and error.filename:
            result.problem = f"no image file at {image.location}"
        elif image.is_file and result.problem.startswith(image.location):
            result.problem = f"it{result.problem.removeprefix(image.location)}"
        result.may_pass = isinstance(error, OSError) and not isinstance(error, _LASTING_ERRORS)
        has_version = image.version or is_url(image.location)
        result.may_be_mended = image.is_file and not has_version
        return
    result.digest = hashlib.sha256(content).hexdigest()
    result.size = len(content)
    result.width = resized.width
    result.height = resized.height
    if image.moment:
        result.frame = content
    yield resized.pixels


def _tokenize_texts(result: Embedded, processor: Processor, truncate: bool) -> None:
    """Adds the token ids of the texts of an example, or notes why it has none."""
    if not result.example.texts:
        result.problem = "it has no text"
    try:
        for text in result.example.texts:
            try:
                (ids,) = processor.token_ids([text])
            except ValueError:
                (ids,) = processor.token_ids([text], truncate=truncate)
                result.num_cut += 1
            result.ids.append(tuple(ids))
    except ValueError as error:
        result.problem = f"caption {error}"
        result.num_cut = 0


def _embed_on_ray(
    tasks: Iterable[Task], of: Of, model: Model, config: SourceConfig
) -> Iterator[list[Embedded]]:
    """Yields the results of tasks in any order. Tasks of a worker that died are done again."""
    import ray
    from ray.util import ActorPool

    with connect_to_ray(config):
        resources = ray.cluster_resources()
        num_cores = 1 + (config.num_workers or 0)  # of a worker
        num_gpus = int(resources.get("GPU", 0))
        max_workers = num_gpus or int(resources["CPU"]) // num_cores
        num_workers = config.ray_workers or max_workers
        unit = "GPU" if num_gpus else "core"
        if num_workers > max_workers:
            raise ValueError(
                f"ray_workers is {num_workers}, but the cluster has {max_workers} {unit}s, one for each worker"
            )
        options = {"max_restarts": -1, "max_task_retries": -1}
        remote = ray.remote(num_cpus=num_cores, num_gpus=int(num_gpus > 0), **options)
        worker_class: Any = remote(_Worker)

        # Workers start with the first tasks, so that few tasks take few of them.
        workers: list[Any] = []
        pool = ActorPool([])
        for task in tasks:
            if len(workers) < num_workers:
                workers.append(worker_class.remote(model, of, config))
                pool.push(workers[-1])
            elif not pool.has_free():
                yield pool.get_next_unordered()
            pool.submit(lambda worker, task: worker.run.remote(task), task)
        logger.info("workers on Ray: %d, with a %s each", len(workers), unit)
        while pool.has_next():
            yield pool.get_next_unordered()
        for worker in workers:
            ray.kill(worker)


class _Worker:
    """A model in a process of a Ray cluster."""

    def __init__(self, model: Model, of: Of, config: SourceConfig) -> None:
        self._embed = partial(embed_examples, load_model(model), of=of, config=config)

    def run(self, task: Task) -> list[Embedded]:
        return list(chain.from_iterable(self._embed(examples=task())))


def connect_to_ray(config: SourceConfig) -> AbstractContextManager[Any]:
    """Connects to a cluster, or starts one. A cluster that this process is connected to already stays."""
    import ray

    if ray.is_initialized():
        return nullcontext()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if config.ray == _LOCAL:
        options["include_dashboard"] = False
        options["num_cpus"] = max(available_cores(), config.ray_workers or 1)
    try:
        return ray.init(address=config.ray, **options)
    except ConnectionError as error:
        raise OSError(
            f"no Ray cluster at {config.ray} ({error}); start one, or give {_LOCAL}"
        ) from error


def number_items(items: Iterable[T]) -> Iterator[tuple[int, T, bool]]:
    """Yields items with their numbers, and whether each is the last."""
    end: Any = object()
    for number, (item, following) in enumerate(pairwise(chain(items, [end]))):
        yield number, item, following is end


def load_model(model: Model) -> Predictor:
    """Loads a model unless it is loaded."""
    if isinstance(model, str | Path):
        return load(model)
    return model if isinstance(model, Predictor) else model()


def example_name(example: Example) -> str:
    """Returns the id of an example, or the name of its image in a tar shard, where ids may repeat."""
    return example.images[0].name if example.images and example.images[0].piece else example.id


def check_ray(config: SourceConfig, model: Model) -> None:
    """Checks that workers of a cluster, if there is to be one, can load the model."""
    if config.ray is not None:
        require("ray")
        if isinstance(model, Predictor):
            raise ValueError(
                "on Ray every worker loads the model; give what to load, not a loaded model"
            )
