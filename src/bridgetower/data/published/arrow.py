"""ViLT-style Arrow files, what owners of the official set-up have on disk: read as they are."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from bridgetower.data.answers import ANNOTATORS
from bridgetower.data.arrow_files import arrow_rows
from bridgetower.data.config import PrepareConfig
from bridgetower.data.kinds import Kind
from bridgetower.data.listing import Listing, Text
from bridgetower.data.published import arrow_texts
from bridgetower.data.published.arrow_texts import Reading, Row
from bridgetower.data.published.originals import Originals, OriginalSet
from bridgetower.progress import counted

Stem = str | tuple[str, ...]
Stems = Mapping[str, Sequence[Stem]]

_NUMBERED = re.compile(r"(.*_)\d+")
_CAPTIONS = "captions as the files have them, without spaces at their ends"
_QUESTIONS = (
    "questions as the files have them, which lack those of train and validation without an answer of the vocabulary; "
    "the files keep scores instead of what people said: there are as many answers as give these scores"
)
_STATEMENTS = "statements as the files have them, without spaces at their ends"


@dataclass(frozen=True, kw_only=True)
class ArrowSet:
    """A set in Arrow files.

    Attributes:
        name: What it is called.
        kind: What its rows hold.
        split_rule: How pictures are given to splits, in words.
        protocol: What else the files decide, in words.
        stems: Names of the files of each split, without their ending; of a tuple the first that is there.
        more_stems: The same of splits that are prepared only if they are asked for.
        columns: Columns beside the pictures.
        images: Columns of pictures.
        image_id: Column with the name of a row; None to number the rows.
        image_of: Name of the picture or pair that a row of a name is about.
        texts: Makes the texts of a row with a name.
    """

    name: str
    kind: Kind
    split_rule: str
    protocol: str
    stems: Stems
    more_stems: Stems = field(default_factory=dict)
    columns: Sequence[str]
    images: Sequence[str] = ("image",)
    image_id: str | None = "image_id"
    image_of: Callable[[str], str] = str
    texts: Callable[[Reading, str, Row], list[Text]]

    @property
    def all_stems(self) -> Stems:
        """Names of the files of every split."""
        return {**self.stems, **self.more_stems}

    def paths(self, folder: Path, split: str) -> list[Path]:
        """Files of a split, whether they are there or not."""
        stems = self.all_stems[split]
        return [_first_there(folder, stem) for stem in (*stems, *_further(folder, stems))]

    def any_in(self, folder: Path) -> bool:
        """Whether a folder has any of the files."""
        return any(path.is_file() for split in self.all_stems for path in self.paths(folder, split))

    def original(self) -> OriginalSet:
        """The set as one that can be prepared."""
        return OriginalSet(
            name=self.name,
            kind=self.kind,
            splits=tuple(self.stems),
            more_splits=tuple(self.more_stems),
            split_rule=self.split_rule,
            protocol=self.protocol,
            licences={"pictures and texts": f"as those of {self.name}"},
            list=partial(_list, self),
        )


def _first_there(folder: Path, stem: Stem) -> Path:
    paths = [folder / f"{each}.arrow" for each in ((stem,) if isinstance(stem, str) else stem)]
    return next((path for path in paths if path.is_file()), paths[0])


def _further(folder: Path, stems: Sequence[Stem]) -> list[str]:
    """Names of files that are numbered higher than the usual ones."""
    numbered = _NUMBERED.fullmatch(stems[-1]) if isinstance(stems[-1], str) else None
    if not numbered:
        return []
    there = (path.stem.removeprefix(numbered[1]) for path in folder.glob(f"{numbered[1]}*.arrow"))
    numbers = sorted(int(rest) for rest in there if rest.isdecimal())
    return [f"{numbered[1]}{number}" for number in numbers if number >= len(stems)]


def _list(files: ArrowSet, originals: Originals, listing: Listing, config: PrepareConfig) -> None:
    reading = Reading(listing=listing)
    for split in filter(originals.wants, files.all_stems):
        paths = _existing(files.paths(originals.folder, split), split, listing)
        for path in counted(paths, f"reading {split}", shown=originals.progress):
            originals.large.append(path)
            _list_file(files, reading, path, split)
    # Without gaps in the numbers: else some classes have answers that no question has.
    if sorted(reading.answers) == list(range(len(reading.answers))):
        listing.vocabulary = [reading.answers[number] for number in sorted(reading.answers)]
    else:
        listing.leave_out("answers.json", "some classes have no answer in these files")


def _existing(paths: Sequence[Path], split: str, listing: Listing) -> list[Path]:
    """Of the files of a split those that are there; only numbered ones may be missing, and are bad.

    Raises:
        FileNotFoundError: If another one is missing, or all.
    """
    missing = [path for path in paths if not path.is_file()]
    numbered = [path for path in missing if _NUMBERED.fullmatch(path.stem)]  # as many as could be downloaded
    if missing and (len(missing) == len(paths) or numbered != missing):
        place = missing[0]
        raise FileNotFoundError(f"no file {place.name} in {place.parent}; put it there, or leave out {split} (splits)")
    for path in missing:
        listing.bad(f"no file {path.name} in {path.parent}")
    return [path for path in paths if path not in missing]


def _list_file(files: ArrowSet, reading: Reading, path: Path, split: str) -> None:
    lists = [column for column in files.columns if column != files.image_id]
    for number, row in enumerate(arrow_rows(path, files.images, files.columns, lists)):
        name = str(row[files.image_id]) if files.image_id else f"{path.stem}-{number}"
        pictures = [row[column] for column in files.images]
        place = f"{path.name}, row {number}"
        if not all(pictures):
            reading.listing.bad(f"{place}: no picture of {name}")
        elif not reading.listing.is_new(f"{split} {name}"):
            reading.listing.bad(f"{place}: {name} comes twice")
        else:
            image = files.image_of(name)
            members = _file_names(image, len(pictures))
            named = [replace(picture, member=member) for picture, member in zip(pictures, members, strict=True)]
            reading.listing.add(image, named, files.texts(reading, name, row), split=split, place=place)


def _file_names(name: str, count: int) -> list[str]:
    if count > 1:  # NLVR2
        return [f"{name}-img{side}.png" for side in range(count)]
    return [name if Path(name).suffix else f"{name}.jpg"]


def _numbered(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}_{number}" for number in range(count))


def _captioned(
    name: str,
    split_rule: str,
    stems: Mapping[str, Sequence[Stem]],
    more_stems: Mapping[str, Sequence[Stem]] | None = None,
) -> ArrowSet:
    return ArrowSet(
        name=name,
        kind="captions",
        split_rule=split_rule,
        protocol=_CAPTIONS,
        stems=stems,
        more_stems=more_stems or {},
        columns=("caption", "image_id"),
        texts=arrow_texts.captions,
    )


def _asked(name: str, split_rule: str, stems: Stems, more_stems: Stems | None = None, *, annotators: int) -> ArrowSet:
    return ArrowSet(
        name=name,
        kind="vqa",
        split_rule=split_rule,
        protocol=_QUESTIONS,
        stems=stems,
        more_stems=more_stems or {},
        columns=("questions", "answers", "answer_labels", "answer_scores", "image_id", "question_id"),
        texts=partial(arrow_texts.questions, annotators=annotators),
    )


def _vqav2(subset: str) -> tuple[Stem]:
    """Files of VQAv2; those with answers in normal form, which the official code reads, come first."""
    return ((f"vqav2_{subset}_fix", f"vqav2_{subset}"),)


ARROW_SETS = (
    _captioned(
        "coco",
        "Karpathy's splits; restval belongs to train",
        {
            "train": ("coco_caption_karpathy_train", "coco_caption_karpathy_restval"),
            "validation": ("coco_caption_karpathy_val",),
            "test": ("coco_caption_karpathy_test",),
        },
    ),
    _captioned(
        "flickr30k",
        "Karpathy's splits",
        {
            "train": ("f30k_caption_karpathy_train",),
            "validation": ("f30k_caption_karpathy_val",),
            "test": ("f30k_caption_karpathy_test",),
        },
    ),
    _captioned(
        "cc3m",
        "as published",
        {"train": _numbered("conceptual_caption_train", 31)},
        {"validation": _numbered("conceptual_caption_val", 1)},
    ),
    _captioned("sbu", "all is train", {"train": _numbered("sbu", 9)}),
    _captioned("vg", "all is train", {"train": ("vg",)}),
    _asked(
        "vqav2",
        "as published; test-dev's questions are also among test's",
        {
            "train": _vqav2("train"),
            "validation": _vqav2("val"),
            "test": _vqav2("test"),
            "test-dev": _vqav2("test-dev"),
        },
        {"trainable-validation": _vqav2("trainable_val"), "rest-validation": _vqav2("rest_val")},
        annotators=ANNOTATORS,
    ),
    *(
        _asked(
            name,
            "as the files have them; validation holds the pictures of Karpathy's val and test splits of COCO",
            {"train": (f"{stem}_train",), "validation": (f"{stem}_val",)},
            annotators=1,
        )
        for name, stem in (("vgqa", "vgqa"), ("vgqa-coco", "vgqa_coco"))
    ),
    ArrowSet(
        name="snli-ve",
        kind="snli-ve",
        split_rule="as published; dev is validation",
        protocol=f"{_STATEMENTS}; numbered anew, like the pictures, as the files name neither",
        stems={"train": ("snli_train",), "validation": ("snli_dev",), "test": ("snli_test",)},
        columns=("sentences", "labels"),
        image_id=None,
        texts=arrow_texts.entailments,
    ),
    ArrowSet(
        name="nlvr2",
        kind="nlvr2",
        split_rule="as published; dev is validation",
        protocol=f"{_STATEMENTS}; their identifiers are NLVR2's only where the files have the number of the sentence",
        stems={"train": ("nlvr2_train",), "validation": ("nlvr2_dev",), "test1": ("nlvr2_test1",)},
        more_stems={
            f"{part}-{split}": (f"nlvr2_{part}_{subset}",)
            for part in ("balanced", "unbalanced")
            for split, subset in (("validation", "dev"), ("test1", "test1"))
        },
        columns=("questions", "answers", "identifier"),
        images=("image_0", "image_1"),
        image_id="identifier",
        image_of=arrow_texts.pair_of,
        texts=arrow_texts.truths,
    ),
)
"""Every set of which the official code reads Arrow files."""
