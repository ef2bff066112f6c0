"""Settings of what is read and written, without imports of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from bridgetower.plain import AT_LEAST_0, AT_LEAST_1, check_choice, check_numbers

Captions = Literal["all", "one"]
Augmentation = Literal["none", "affine"]
RandAugment = Literal["none", "geometry", "colour"]
OfficialProfile = Literal["official-pretrain", "official-finetune"]

NOT_CONTENT: Mapping[str, bool] = {"content": False}
"""Metadata of a field that does not decide the content of a set, so that another value of it is the same set."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how.

    Attributes:
        folders: Prepared sets, or their URLs in an object store; their examples are mixed.
        train_only: Further prepared sets of which only the split `train` is used, as VG-QA beside VQAv2.
        repeats: How often each folder's examples occur in an epoch, those of `train_only` last; default: once.
        one_set_per_batch: Take the examples of a batch from one set, so that negatives are of its own set.
        train_splits: Splits of the folders to train on, joined.
        validation_split: Split of the folders to evaluate on.
        captions: `all` makes every (image, caption) a pair, as the official code; `one` draws one per image and epoch.
        augmentation: `affine` turns, scales, moves and lights images at random; it never mirrors them.
        random_crop: Smallest share of a training image's area that a random crop keeps; None takes the whole image.
        flip: Mirror half of the training images, also where their texts have left and right.
        rand_augment: Two random changes of each training image: of its geometry and light (official `blip_randaug`),
            or of its colours too (official `blip_randaug_wc`, `clip_randaug`).
        rand_magnitude: Strength of `rand_augment`, of 10 for `geometry` and of 30 for `colour`.
        transform: Custom function that changes each training image, FILE.py:NAME or module:NAME: it gets uint8
            [3, h, w] at the model's size, after the changes above, returns the same and draws with PyTorch's generator.
        word_dropout: Share of a training caption's words that are left out, drawn anew each time.
        profile: How images become squares: `official-pretrain` crops, `official-finetune` squashes; None: that of
            the checkpoint, and `official-pretrain` for a new model.
        max_length: Longest text in tokens; longer captions are cut.
        background: Colour under transparent pixels; None drops transparency as the originals do.
        fast_decode: Decode large JPEG files at reduced scale: faster, pixels differ a little; the model keeps to it.
        num_workers: Processes that decode; 0 decodes in the main process.
        cache: Keep what was read, and the decoded images, in memory; for sets that fit.
    """

    folders: tuple[str, ...] = ()
    train_only: tuple[str, ...] = ()
    repeats: tuple[int, ...] = ()
    one_set_per_batch: bool = False
    train_splits: tuple[str, ...] = ("train",)
    validation_split: str = "validation"
    captions: Captions = "all"
    augmentation: Augmentation = "none"
    random_crop: float | None = None
    flip: bool = False
    rand_augment: RandAugment = "none"
    rand_magnitude: int = 0
    transform: str | None = None
    word_dropout: float = 0.0
    profile: OfficialProfile | None = None
    max_length: int = 50
    background: tuple[int, int, int] | None = None
    fast_decode: bool = False
    num_workers: int = 0
    cache: bool = False

    @property
    def trains_on_validation(self) -> bool:
        """Whether the validation split is trained on, so that its metrics say nothing about other data."""
        return self.validation_split in self.train_splits

    def __post_init__(self) -> None:
        trained = (*self.folders, *self.train_only)
        if self.repeats and (len(self.repeats) != len(trained) or min(self.repeats) < 1):
            raise ValueError(
                f"repeats {self.repeats} for folders {trained}; expected one positive number each"
            )
        if not self.train_splits:
            raise ValueError("train_splits is empty; expected at least one split")
        # A text has a start, an end and at least one token.
        check_numbers(self, max_length=(3, AT_LEAST_0[1]), num_workers=AT_LEAST_0)
        check_choice("captions", self.captions, Captions)
        check_choice("augmentation", self.augmentation, Augmentation)
        check_choice("profile", self.profile, OfficialProfile, or_none=True)
        check_choice("rand_augment", self.rand_augment, RandAugment)
        highest = {"none": 0, "geometry": 10, "colour": 30}[self.rand_augment]
        if not min(1, highest) <= self.rand_magnitude <= highest:
            expected = f"1 to {highest}" if highest else "0"
            raise ValueError(
                f"rand_magnitude is {self.rand_magnitude} for rand_augment {self.rand_augment!r}; expected {expected}"
            )
        if self.random_crop is not None and not 0 < self.random_crop <= 1:
            raise ValueError(
                f"random_crop is {self.random_crop}; expected a share in (0, 1], or None"
            )
        if self.has_views and (self.cache or self.augmentation != "none"):
            raise ValueError(
                "random_crop, flip and rand_augment start from the image files; leave cache and augmentation out"
            )
        if not 0 <= self.word_dropout < 1:
            raise ValueError(f"word_dropout is {self.word_dropout}; expected a share in [0, 1)")

    @property
    def has_views(self) -> bool:
        """Whether training images are varied from their files on, as in the official fine-tuning."""
        return self.random_crop is not None or self.flip or self.rand_augment != "none"

    @property
    def varies_images(self) -> bool:
        """Whether training images are varied at all."""
        return self.has_views or self.augmentation != "none" or self.transform is not None

    def as_evaluated(self) -> DataConfig:
        """Returns the settings without what varies or repeats training examples."""
        return replace(
            self,
            train_only=(),
            repeats=(),
            augmentation="none",
            random_crop=None,
            flip=False,
            rand_augment="none",
            rand_magnitude=0,
            transform=None,
            word_dropout=0.0,
        )


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How much is masked and how (defaults: BERT, Devlin et al. 2019, section 3.1; also BridgeTower's).

    Attributes:
        probability: Chance of a token (of a word with `whole_word`) to be predicted.
        mask_share: Share of the predicted tokens that become the mask token.
        random_share: Share of them that become a random token; the rest stays as it is.
        whole_word: Predict all tokens of a word or none; each is then replaced on its own.
    """

    probability: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_word: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0.0 < self.probability <= 1.0:
            raise ValueError(
                f"probability is {self.probability}; expected more than 0 and at most 1"
            )
        shares = self.mask_share, self.random_share
        if min(shares) < 0.0 or sum(shares) > 1.0 + 1e-9:
            raise ValueError(
                f"mask_share and random_share are {shares}; expected at least 0 and a sum of at most 1"
            )


@dataclass(frozen=True, kw_only=True)
class WritingConfig:
    """How a prepared set is written.

    Attributes:
        max_errors: Unusable images, rows or entries that may be left out; they are named in `dataset.json`.
        num_workers: Threads that read and check images.
    """

    max_errors: int = field(default=0, metadata=NOT_CONTENT)
    num_workers: int = field(default=4, metadata=NOT_CONTENT)

    def __post_init__(self) -> None:
        check_numbers(self, max_errors=AT_LEAST_0, num_workers=AT_LEAST_1)

    @property
    def settings(self) -> dict[str, object]:
        """All that decides the content of the set, beside the source."""
        settings = dict[str, object]()
        for item in fields(self):
            if item.metadata.get("content", True):
                value = getattr(self, item.name)
                settings[item.name] = list(value) if isinstance(value, tuple) else value
        return settings


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(WritingConfig):
    """How a set is prepared from its original files.

    Attributes:
        splits: Splits to prepare; empty prepares the usual ones.
    """

    splits: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How videos are cut into moments.

    Attributes:
        every: Seconds of each moment; None: the subtitles', and scenes where there are none.
        max_moments: Most moments of one video.
        transcribe: URL of a server with OpenAI's protocol that transcribes videos without subtitles; None: none.
        transcribe_model: Its model.
    """

    every: float | None = None
    max_moments: int = 1000
    transcribe: str | None = None
    transcribe_model: str = "whisper-1"

    def __post_init__(self) -> None:
        if self.transcribe is not None and not self.transcribe.startswith(("http://", "https://")):
            raise ValueError(
                f"transcribe is {self.transcribe!r}; expected a URL such as http://localhost:8000/v1"
            )
        check_numbers(self, every=(0.1, 86_400.0), max_moments=AT_LEAST_1)
