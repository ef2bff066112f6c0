"""The predictor: one object that embeds images, texts and pairs, matches them, fills masked words and answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from bridgetower.arguments import AboveZero, AtLeast0, AtLeast1, Expected, checked
from bridgetower.checkpoints import (
    Checkpoint,
    HubOptions,
    Source,
    fingerprint,
    read_checkpoint,
    save,
)
from bridgetower.engines.config import EngineRequest, Precision
from bridgetower.engines.engine import Engine, EngineChoice, choose_engine
from bridgetower.files import cache_folder
from bridgetower.inference.items import (
    TEMPLATES,
    Item,
    Kind,
    Outcome,
    Pixels,
    Tokens,
    batched,
    choices,
    compute_batches,
    compute_items,
    decoded,
    encoded_bytes,
    encoded_images,
    encoded_texts,
    fetched,
    filled_words,
    label_choices,
    matched,
    prompts_of,
    score_pairs,
    split_rows,
)
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.model.fusion import Encoded
from bridgetower.model.hidden_states import HiddenStates, Layers, hidden_states
from bridgetower.processor import ImageLike, Processor
from bridgetower.processor.processor import (
    Images,
    Texts,
    either_lists,
    image_list,
    is_image,
    pair_lists,
    text_list,
)
from bridgetower.progress import count_bars, counted

ListOfTexts = Annotated[Collection[str], Expected("a list of texts")]
MaybeImages = Annotated[
    ImageLike | Iterable[ImageLike | None] | None,
    Expected("an image or a list of images, some of which may be None"),
]

Items = Annotated[Sequence[Item], Expected("a list of items")]


class Options(TypedDict, total=False):
    """Further arguments of every method for pairs.

    Attributes:
        batch_size: Pairs at once; 32 unless given.
        truncate: Cut texts that are too long instead of refusing them.
        num_workers: Processes that decode images while others are computed; 0 decodes here, for a GPU in threads.
        progress: Show a bar.
    """

    batch_size: AtLeast1
    truncate: bool
    num_workers: AtLeast0
    progress: bool


@checked
def load(
    source: Source,
    *,
    revision: str | None = None,
    image_size: AtLeast1 | None = None,
    device: str | int | torch.device | None = None,
    precision: Precision = "fp32",
    engine: EngineRequest = "torch",
    cache: str | Path | None = None,
    compile: bool = False,  # noqa: A002 - as torch calls it
    tokenizer: str | Path | None = None,
    answers: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    fast_decode: bool = False,
    extensions: Extensions = NO_EXTENSIONS,
    **hub: Unpack[HubOptions],
) -> Predictor:
    """Loads a model for use.

    Args:
        source: Hub id (also `owner/name/FILE.ckpt`) or its address at huggingface.co, folder (of this package, exported
            or not, of transformers, or of a training run), or official `.ckpt`.
        revision: Branch, tag or commit of a hub id; the commit that was loaded is in `Predictor.source`.
        image_size: Pixels; position embeddings are resized if it is not the checkpoint's own.
        device: Such as `cpu`, `cuda` or `cuda:1`, for which 1 stands; None and `auto` take a GPU if there is one.
        precision: `fp32`; `bf16` (engines `torch` and `openvino`), `fp16` (on a GPU) and `int8` (engine `onnxruntime`)
            take less time on hardware that has them, and give other numbers.
        engine: `torch`, or `onnxruntime` or `openvino`, which run exported parts on the CPU. A source that was not
            exported is exported once, to `cache`. `auto` takes the fastest that is installed, see docs/engines.md.
        cache: Folder of such exports; None is `~/.cache/bridgetower`.
        compile: With engine `torch`: let `torch.compile` make kernels at the first use, which takes minutes and a C++
            compiler.
        tokenizer: Folder or file with a tokenizer, needed for an official `.ckpt`, which has none.
        answers: JSON file with the list of answers, needed for an official `.ckpt` with a VQA head.
        overrides: Model config fields that an official `.ckpt` of unpublished towers does not contain.
        fast_decode: Decode large JPEG files at reduced scale, which changes pixels a little; a model that was trained
            so does it anyway.
        extensions: Custom towers, bridges and heads that the model's config names.
        hub: For hub ids: `token`, `subfolder`, `cache_dir` and `local_files_only`, as in `huggingface_hub`.

    Raises:
        FileNotFoundError: Nothing is there, or the engine's packages are not installed.
        ValueError: What is there is damaged, unknown, or does not fit together, or there is no such device or engine.
    """
    choice = EngineChoice(
        engine=choose_engine(engine, precision, device),
        precision=precision,
        device=device,
        cache=cache_folder() if cache is None else Path(cache),
        compile=compile,
    )
    # The fingerprint is of weights in bfloat16, which differ if they are rounded to float16, or before a resize.
    needs_exact_weights = choice.dtype == torch.float16 or (
        choice.dtype == torch.bfloat16 and image_size is not None
    )
    checkpoint = read_checkpoint(
        source,
        revision=revision,
        tokenizer=tokenizer,
        answers=answers,
        overrides=overrides,
        dtype=torch.float32 if needs_exact_weights else choice.dtype,
        extensions=extensions,
        **hub,
    )
    is_resized = image_size not in (None, checkpoint.config.vision.image_size)
    if image_size is not None:
        checkpoint = checkpoint.resized(image_size)
    if fast_decode and checkpoint.processor is not None:
        config = replace(checkpoint.processor.config, fast_decode=True)
        processor = Processor(config, checkpoint.processor.tokenizer)
        checkpoint = replace(checkpoint, processor=processor)
    started = choice.start(checkpoint, None if is_resized else Path(source))
    predictor = Predictor(checkpoint, started, precision)
    if needs_exact_weights:
        predictor.fingerprint = fingerprint(
            checkpoint.config, checkpoint.tensors, predictor.processor
        )
    return predictor


class Predictor:
    """A loaded model with its preprocessing.

    Images are paths, URLs, bytes, open files, PIL images, uint8 arrays or tensors, one or a sequence; image n goes with
    text n, and one image with several texts, or one text with several images, is a pair with each. Results are
    float32 tensors on the CPU, one row per input, whatever the batch size; lists of classes or words begin with the
    likeliest, and are of a single input if neither images nor texts are a sequence. Several threads may call a
    predictor at once, and it can be pickled.

    Every method raises ValueError if the model lacks the head, or the names of its classes; if there are no inputs,
    unreadable ones, too long texts, or different numbers of them; and if an argument is of another kind or out of
    range. A name of an argument that a method does not have is a TypeError, as everywhere in Python.

    Attributes:
        source: What was loaded; a hub id carries its commit.
        engine: What computes.
        processor: Preprocessing that travels with the checkpoint.
        reranking: What validation found for reranking and for probabilities of matches, as the checkpoint has it.
        precision: What the engine computes in.
    """

    def __init__(
        self, checkpoint: Checkpoint, engine: Engine, precision: Precision = "fp32"
    ) -> None:
        if checkpoint.processor is None:
            raise ValueError(
                f"{checkpoint.source} has no preprocessing; expected processor.json or preprocessor_config.json"
            )
        self.source = checkpoint.source
        self.engine = engine
        self.precision = precision
        self.processor: Processor = checkpoint.processor
        self.reranking = checkpoint.reranking
        self._checkpoint = replace(checkpoint, tensors={}, extra_tensors={})

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that the vectors depend on, which is the same in every precision."""
        return fingerprint(self.model.config, self.model.state_dict(), self.processor)

    @property
    def model(self) -> BridgeTower:
        """The network in PyTorch, in evaluation mode. Once used on a CPU, its weights are packed."""
        return self.engine.model

    @checked
    def save(self, folder: str | Path) -> None:
        """Writes a folder for `load`: weights as they are computed with, preprocessing, labels and calibration.

        Args:
            folder: New or empty; it appears as a whole or not at all.

        Raises:
            FileExistsError: The folder holds something else.
        """
        save(self.model, folder)

    @property
    def device(self) -> torch.device:
        """Where the engine's results are."""
        return self.engine.device

    @checked
    def embed_images(
        self,
        images: Images,
        *,
        batch_size: AtLeast1 = 32,
        num_workers: AtLeast0 = 0,
        progress: bool = False,
    ) -> Float[Tensor, "n c"]:
        """Returns L2-normalised vectors that can be compared with those of texts. For the options see `Options`."""
        self.model.head("itc")
        options = Options(batch_size=batch_size, num_workers=num_workers, progress=progress)
        return torch.stack(self._compute("embedding", image_list(images), None, **options))

    @checked
    def embed_texts(
        self,
        texts: Texts,
        *,
        batch_size: AtLeast1 = 32,
        truncate: bool = False,
        progress: bool = False,
    ) -> Float[Tensor, "n c"]:
        """Returns L2-normalised vectors that can be compared with those of images. For the options see `Options`."""
        self.model.head("itc")
        options = Options(batch_size=batch_size, truncate=truncate, progress=progress)
        return torch.stack(self._compute("embedding", None, text_list(texts), **options))

    @checked
    def embed_pairs(
        self, images: Images, texts: Texts, **options: Unpack[Options]
    ) -> Float[Tensor, "n c"]:
        """Returns L2-normalised joint vectors of image n with text n.

        They are comparable with the vectors of images and texts only in transformers' contrastive models, which have a
        head for them; elsewhere they are the pooled fusion output.
        """
        return torch.stack(self._compute("embedding", *pair_lists(images, texts), **options))

    @checked
    @torch.inference_mode()
    def match(
        self,
        images: Images,
        texts: Texts,
        *,
        all_pairs: bool = False,
        memory_gib: AboveZero = 4.0,
        **options: Unpack[Options],
    ) -> Float[Tensor, "..."]:
        """Returns how well image and text match, from 0 to 1.

        It is the probability that they belong together if the checkpoint has a calibration (`reranking.calibration`).
        Otherwise it is the score of the matching head, which ranks pairs but can be far from a probability.

        Args:
            images, texts: Image n goes with text n.
            all_pairs: Score every image with every text instead. Each image is still encoded only once, and so is each
                text if all of them fit into memory together; otherwise it is once for every block of images.
            memory_gib: With `all_pairs`: memory for encodings; half is for a block of images, a quarter for texts.
            **options: See `Options`.

        Returns:
            [n], or [images, texts] with `all_pairs`.
        """
        self.model.head("itm")
        if not all_pairs:
            pairs = pair_lists(
                images, texts, ", or all_pairs=True to match every image with every text"
            )
            return self.reranking.match(torch.tensor(self._compute("match", *pairs, **options)))
        num_bytes = int(memory_gib * 2**30)
        log_odds = self._match_all(image_list(images), text_list(texts), num_bytes, **options)
        return self.reranking.match(log_odds)

    @checked
    def fill_mask(
        self, images: Images, texts: Texts, *, top: AtLeast1 = 5, **options: Unpack[Options]
    ) -> Any:
        """Returns the `top` likeliest words (lists of `FilledWord`) for each mask of each text, given its image.

        Args:
            images, texts: Image n goes with text n; each text has one or more mask tokens (`processor.mask_token`,
                usually `<mask>`), also after cutting.
            top: Candidates per mask.
            **options: See `Options`.
        """
        paired_images, paired_texts, _ = pair_lists(images, texts)
        ids = self.processor.token_ids(paired_texts, truncate=options.get("truncate", False))
        for text, tokens in zip(paired_texts, ids, strict=True):
            if self.processor.mask_token_id not in tokens:
                raise ValueError(
                    f"no mask in {text!r}; put {self.processor.mask_token} where a word is missing"
                )
        likeliest = self._compute("fill_mask", paired_images, paired_texts, top=top, **options)
        filled = [filled_words(self.processor, tokens) for tokens in likeliest]
        return filled[0] if _is_single(images, texts) else filled

    @checked
    @torch.inference_mode()
    def hidden_states(
        self,
        images: Images,
        texts: Texts,
        *,
        layers: Layers | None = None,
        attentions: bool = False,
        truncate: bool = False,
    ) -> HiddenStates:
        """Returns hidden states of layers for pairs, which run together.

        The model runs in PyTorch, whatever the engine is. Pass many pairs in several calls, or name few layers.

        Args:
            images, texts: Image n goes with text n.
            layers: Such as `{"vision": [0, 12], "text": [12], "fusion": [1, 6]}`; see `bridgetower.hidden_states`.
            attentions: The attention weights of these layers too.
            truncate: Cut longer texts instead of refusing them.
        """
        paired_images, paired_texts, _ = pair_lists(images, texts)
        batch = self.processor.texts(paired_texts, truncate=truncate)
        pixel_values = self.processor.images(list(map(fetched, paired_images)))
        model = self.model
        mask = batch.attention_mask
        states = hidden_states(
            model,
            pixel_values.to(model.device, model.token_type_embedding.weight.dtype),
            batch.input_ids.to(model.device),
            None if mask is None else mask.to(model.device),
            layers=layers,
            attentions=attentions,
        )
        return tree_map(lambda tensor: tensor.float().cpu(), states)

    @checked
    def class_names(self, head: str) -> tuple[str, ...]:
        """Returns the names of the classes of a head, in its order."""
        self.model.head(head)
        return self._checkpoint.class_names(head)

    @checked
    def predict(
        self,
        head: str,
        images: MaybeImages = None,
        texts: Texts | None = None,
        images_2: Images | None = None,
        *,
        top: AtLeast1 | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """Returns what a head predicts: classes (lists of `Choice`) by its names, or without names a number.

        Args:
            head: Such as `vqa`, or a custom one.
            images: Image n goes with text n; None in the place of an image is none. None: texts alone.
            texts: An empty text is none. None: images alone.
            images_2: The second images, for a head that reads two.
            top: Classes per input; None: all of them.
            **options: See `Options`.
        """
        model = self.model
        model.head(head)
        spec = model.extensions.head_specs[head]
        if model.head_outputs(head) == "other":
            raise ValueError(
                f"the {spec.title or head} head predicts no classes and no number; use match, fill_mask or embed_images"
            )
        reads_two = spec.inputs == "pooled_pair"
        if reads_two != (images_2 is not None):
            count = "two images" if reads_two else "one image"
            raise ValueError(f"the {head} head reads {count}; expected images_2 for two alone")

        # The lists of images and texts that the head reads.
        inputs: Any
        if reads_two:
            inputs = pair_lists(cast(Images, images), cast(Texts, texts), images_2=images_2)
        elif spec.inputs == "pooled":
            inputs = either_lists(images, texts, self.processor.blank_image())
        else:
            reads_images = spec.inputs == "image_cls"
            if (images is None) == reads_images or (texts is None) != reads_images:
                modality = "images" if reads_images else "texts"
                raise ValueError(f"the {head} head reads {modality} alone; give nothing else")
            inputs = (
                image_list(cast(Images, images)) if reads_images else None,
                None if texts is None else text_list(texts),
            )

        outputs = torch.stack(self._compute("prediction", *inputs, head=head, **options))
        names = self.class_names(head)
        if not names:
            return outputs[:, 0]
        lists = choices(outputs, names, top)
        return lists[0] if _is_single(images, texts, images_2) else lists

    @checked
    def answer(
        self, images: Images, questions: Texts, *, top: AtLeast1 = 5, **options: Unpack[Options]
    ) -> Any:
        """Returns the `top` likeliest answers (lists of `Choice`) to each question about its image."""
        return self.predict("vqa", images, questions, top=top, **options)

    @checked
    def entail(self, images: Images, statements: Texts, **options: Unpack[Options]) -> Any:
        """Returns whether each image contradicts its statement, leaves it open (neutral), or entails it."""
        return self.predict("snli_ve", images, statements, **options)

    @checked
    def reason(
        self, images: Images, images_2: Images, statements: Texts, **options: Unpack[Options]
    ) -> Any:
        """Returns whether statement n, about the left image n and the right image n of `images_2`, is `True`."""
        return self.predict("nlvr2", images, statements, images_2, **options)

    @checked
    def classify(
        self,
        images: MaybeImages = None,
        texts: Texts | None = None,
        *,
        labels: ListOfTexts | None = None,
        templates: ListOfTexts = TEMPLATES,
        top: AtLeast1 | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """Returns the classes (lists of `Choice`) of images by `labels`, or of images, texts or both by a trained head.

        Args:
            images: Image n goes with text n; None in the place of an image is none. None: texts alone.
            texts: An empty text is none. None: images alone.
            labels: Two or more classes, compared with images alone (zero-shot); None: those of the classification head.
            templates: Texts with `{}` where a label goes; its vector is the mean over them.
            top: Classes per input; None: all of them.
            **options: See `Options`.
        """
        if labels is None:
            recipe = "classification; or give labels, which need none"
            self.model.head("classification", recipe=recipe)
            if self.model.head_outputs("classification") == "number":
                raise ValueError(
                    "the classification head of this model predicts a number, not classes; use estimate"
                )
            return self.predict("classification", images, texts, top=top, **options)
        if images is None or texts is not None:
            raise ValueError("labels are compared with images alone; give images and no texts")
        names = list(labels)
        prompts = prompts_of(names, list(templates))
        self.model.head("itc")
        label_vectors = torch.stack(self._compute("embedding", None, prompts, **options))
        image_vectors = torch.stack(
            self._compute("embedding", image_list(cast(Images, images)), None, **options)
        )
        lists = label_choices(self.model, image_vectors, label_vectors, names, top)
        return lists[0] if _is_single(images) else lists

    @checked
    def estimate(
        self,
        images: MaybeImages = None,
        texts: Texts | None = None,
        **options: Unpack[Options],
    ) -> Float[Tensor, " n"]:
        """Returns a number for each image, text, or both, after training on a table of numbers. See `classify`."""
        self.model.head("classification")
        if self.model.head_outputs("classification") != "number":
            raise ValueError(
                "the classification head of this model has classes, not a number; use classify"
            )
        return self.predict("classification", images, texts, **options)

    @checked
    def compute(self, items: Items) -> list[Outcome]:
        """Computes items of any kind together, with each image and text encoded once."""
        return compute_items(self.engine, self.processor, items)

    def _compute(
        self,
        kind: Kind,
        images: Sequence[ImageLike] | None,
        texts: Sequence[str] | None,
        images_2: Sequence[ImageLike] | None = None,
        *,
        head: str = "",
        top: int = 1,
        batch_size: int = 32,
        truncate: bool = False,
        num_workers: int = 0,
        progress: bool = False,
    ) -> list[Any]:
        """Computes items of images, of texts, or of images and second images with their texts."""
        processor = self.processor
        count = len(images if images is not None else texts or ())
        ids: list[Tokens | None] = [None] * count
        if texts is not None:
            ids = [tuple(tokens) for tokens in processor.token_ids(texts, truncate=truncate)]
        order = list(range(count))
        if images is None:  # sorted by length, so that batches hold little padding
            order.sort(key=lambda row: len(ids[row] or ()))

        def pixels(images: Sequence[ImageLike] | None) -> Iterable[Pixels | None]:
            if images is None:
                return repeat(None)
            return decoded(processor, images, batch_size, num_workers, self.device)

        items = (
            Item(kind=kind, head=head, image=image, image_2=image_2, ids=ids[row], top=top)
            for row, image, image_2 in zip(order, pixels(images), pixels(images_2), strict=False)
        )
        num_batches = -(-count // batch_size)
        batches = counted(
            batched(items, batch_size),
            "batches",
            enabled=progress and num_batches > 1,
            total=num_batches,
        )
        outcomes = chain.from_iterable(compute_batches(self.engine, processor, batches))
        outcome_of_row = dict(zip(order, outcomes, strict=True))
        return [outcome_of_row[row] for row in range(count)]

    def _match_all(
        self,
        images: Sequence[ImageLike],
        texts: Sequence[str],
        num_bytes: int,
        *,
        batch_size: int = 32,
        truncate: bool = False,
        num_workers: int = 0,
        progress: bool = False,
    ) -> Float[Tensor, "i t"]:
        """Returns the log-odds of a match of every image with every text. Encodes each image once."""
        engine = self.engine
        model = engine.model
        processor = self.processor
        ids = processor.token_ids(texts, truncate=truncate)
        by_length = sorted(range(len(ids)), key=lambda text: len(ids[text]))

        def encode_texts(rows: tuple[int, ...]) -> Encoded:
            batch_ids = [ids[by_length[row]] for row in rows]
            return engine.cache_text(encoded_texts(engine, processor, batch_ids))

        # A block of images takes half of the memory, and texts that are encoded once a quarter.
        text_of = encode_texts
        if len(ids) * encoded_bytes(model, "text", max(map(len, ids))) <= num_bytes // 4:
            text_of = cache(encode_texts)
        image_bytes = encoded_bytes(model, "vision", model.config.vision.num_tokens)
        blocks = split_rows(range(len(images)), max(1, num_bytes // 2 // image_bytes))

        pixels = decoded(processor, images, batch_size, num_workers, self.device)
        scores = torch.empty(len(images), len(ids))
        with count_bars(enabled=progress) as bars:
            bar = bars.add_task("pairs", total=scores.numel())
            for block in blocks:
                encoded = []
                for rows in split_rows(block, batch_size):
                    batch = list(islice(pixels, len(rows)))
                    encoded.append(engine.cache_image(encoded_images(engine, processor, batch)))
                outputs = score_pairs(
                    engine,
                    model.itm_logits,
                    Encoded.cat(encoded),
                    text_of,
                    image_rows=torch.arange(len(block)).repeat(len(ids)),
                    text_rows=torch.arange(len(ids)).repeat_interleave(len(block)),
                    batch_size=batch_size,
                )
                logits = []
                for pair_logits in outputs:
                    logits.append(pair_logits)
                    bars.advance(bar, len(pair_logits))
                by_text = matched(torch.cat(logits)).reshape(len(ids), len(block))
                scores[block.start : block.stop, by_length] = by_text.T
        return scores


def _is_single(*inputs: Any) -> bool:
    """Whether no input is a sequence."""
    return all(value is None or isinstance(value, str) or is_image(value) for value in inputs)
