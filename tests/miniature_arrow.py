"""Miniature copies of ViLT-style Arrow files, written as the official code does: through pandas, in one batch."""

import pandas as pd
import pyarrow as pa

from miniature import coco_name, jpeg
from rows import png

VOCABULARY = ("net", "pitcher", "yes", "no")


def write_arrow_file(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(pd.DataFrame(list(rows)))
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table)


def write_coco_arrow(folder):
    for part, split in enumerate(("train", "restval", "val", "test")):
        year = "train2014" if split == "train" else "val2014"
        rows = [_captioned(coco_name(n, year), n, split, 5) for n in (2 * part, 2 * part + 1)]
        write_arrow_file(folder / f"coco_caption_karpathy_{split}.arrow", rows)


def write_flickr30k_arrow(folder):
    for part, split in enumerate(("train", "val", "test")):
        rows = [_captioned(f"{1000 + n}.jpg", n, split, 5) for n in (2 * part, 2 * part + 1)]
        write_arrow_file(folder / f"f30k_caption_karpathy_{split}.arrow", rows)


def write_cc3m_arrow(folder):
    for number in range(31):
        rows = [_captioned(f"{number}.jpg", number, "train", 1)]
        write_arrow_file(folder / f"conceptual_caption_train_{number}.arrow", rows)
    write_arrow_file(folder / "conceptual_caption_val_0.arrow", [_captioned("0.jpg", 40, "val", 1)])


def write_sbu_arrow(folder):
    for number in range(9):
        write_arrow_file(
            folder / f"sbu_{number}.arrow", [_captioned(f"{number}_o.jpg", number, "SBU", 1)]
        )


def write_vg_arrow(folder):
    boxes = {"width": [3, 4], "height": [1, 2], "x": [0, 1], "y": [2, 0]}
    rows = [
        {"image": jpeg(n), "caption": ["the clock ", f"tree {n}"], **boxes, "image_id": str(n)}
        for n in (1, 107899)
    ]
    write_arrow_file(folder / "vg.arrow", rows)


def write_vqav2_arrow(folder, *, ending="_fix"):
    """Writes files of VQAv2; test questions have no answers."""
    for part, split in enumerate(("train", "val", "test", "test-dev", "trainable_val", "rest_val")):
        rows = [_asked(10 * part + n, split) for n in range(2)]
        write_arrow_file(folder / f"vqav2_{split}{ending}.arrow", rows)


def write_vgqa_arrow(folder):
    for stem in ("vgqa", "vgqa_coco"):
        for split in ("train", "val"):
            row = _asked(5, split)
            answers = {
                "answers": [["yes"], ["no"]],
                "answer_labels": [[2], [3]],
                "answer_scores": [[1.0], [1.0]],
            }
            write_arrow_file(folder / f"{stem}_{split}.arrow", [{**row, **answers}])


def write_snli_ve_arrow(folder):
    for part, split in enumerate(("train", "dev", "test")):
        sentences = [["premise", " A man. "], ["premise", "A cat."], ["other", "Sleeping."]]
        rows = [
            {"image": jpeg(2 * part + n), "sentences": sentences, "labels": [2, 0, 1]}
            for n in range(2)
        ]
        write_arrow_file(folder / f"snli_{split}.arrow", rows)


def write_nlvr2_arrow(folder):
    names = (
        "train",
        "dev",
        "test1",
        "balanced_dev",
        "balanced_test1",
        "unbalanced_dev",
        "unbalanced_test1",
    )
    for name in names:
        subset = name.split("_")[-1]
        rows = [
            {"image_0": png(n), "image_1": jpeg(n), "identifier": f"{subset}-{n}-0"}
            | {"questions": ["One of them is grey.", " Both are. "], "answers": ["True", "False"]}
            for n in range(2)
        ]
        write_arrow_file(folder / f"nlvr2_{name}.arrow", rows)


def _captioned(name, number, split, count):
    captions = [f"Caption {place} of {name}." for place in range(count)]
    return {"image": jpeg(number), "caption": captions, "image_id": name, "split": split}


def _asked(number, split):
    answered = not split.startswith("test")
    return {
        "image": jpeg(number),
        "questions": ["What is behind him?", "Is it day?"],
        "answers": [["net", "pitcher"], ["yes", "no"]] if answered else [],
        "answer_labels": [[0, 1], [2, 3]] if answered else [],
        "answer_scores": [[1.0, 0.3], [0.6, 0.9]] if answered else [],
        "image_id": number,
        "question_id": [1000 * number, 1000 * number + 1],
        "split": split,
    }
