"""Small copies of published data sets, with the file names, fields and nesting of the originals."""

import io
import json
import tarfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from helpers.sets import png_of_shade


def noise_jpeg(number, *, size=(12, 9)):
    """Returns a small picture, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write_file(path, content):
    """Writes bytes, text or JSON, with the folders that it takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(
            content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
        )


def write_json_lines(path, rows):
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def change_json(path, edit):
    """Changes what a file of JSON, or one with a JSON object per line, holds."""
    lines = path.read_text(encoding="utf-8").splitlines()
    content = [json.loads(line) for line in lines]
    edit(content[0] if len(lines) == 1 else content)
    if len(lines) == 1:
        write_file(path, content[0])
    else:
        write_json_lines(path, content)


def split_counts(info):
    return {
        split: (split_info.images, split_info.examples) for split, split_info in info.splits.items()
    }


def coco_name(number, year):
    return f"COCO_{year}_{number:012d}.jpg"


def write_coco(folder):
    """Writes eleven pictures of COCO in Karpathy's splits."""
    splits = {"train": 4, "restval": 3, "val": 2, "test": 2}
    numbers = iter((57870, 9, 25, 30, 318219, 554625, 574769, 522418, 184613, 391895, 60623))
    images = []
    for split, count in splits.items():
        year = "train2014" if split == "train" else "val2014"
        for number in (next(numbers) for _ in range(count)):
            captions = [
                f"Picture {number}, caption {n}." for n in range(6 if number == 391895 else 5)
            ]
            if number == 57870:
                captions[3] = captions[1]
                captions[4] = " A restaurant has modern wooden tables and chairs.\n"
            images.append(_karpathy_image(len(images), coco_name(number, year), split, captions))
            images[-1] |= {"filepath": year, "cocoid": number}
            write_file(folder / year / coco_name(number, year), noise_jpeg(number))
    write_file(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def write_flickr30k(folder):
    """Writes six pictures of Flickr30k in Karpathy's splits, the JSON file in its folder."""
    images = []
    for number, split in enumerate(("train", "train", "train", "val", "test", "test")):
        name = f"{1000092795 + number}.jpg"
        images.append(
            _karpathy_image(
                number, name, split, [f"Picture {number}, caption {n}." for n in range(5)]
            )
        )
        write_file(folder / "flickr30k-images" / name, noise_jpeg(number))
    write_file(
        folder / "karpathy" / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"}
    )


def _karpathy_image(number, name, split, captions):
    sentences = [
        {"tokens": caption.lower().split(), "raw": caption, "sentid": 10 * number + n}
        for n, caption in enumerate(captions)
    ]
    return {"imgid": number, "filename": name, "split": split, "sentences": sentences}


FREQUENT_ANSWERS = ("yes", "no", "2")
"""First choices in `write_vqav2` that are frequent enough for the vocabulary, in order of appearance."""

_QUESTIONS_PER_PICTURE = 4
_VQA_IMAGES = {
    "train2014": range(9, 16),
    "val2014": range(42, 47),
    "test2015": range(1, 4),
    "test-dev2015": range(1, 3),
}


def write_vqav2(folder):
    """Writes pictures and questions of VQAv2. The fourth question about each has a rare answer."""
    for subset, numbers in _VQA_IMAGES.items():
        year = subset.replace("test-dev", "test")
        questions = []
        annotations = []
        for number in numbers:
            write_file(folder / year / coco_name(number, year), noise_jpeg(number))
            for index in range(_QUESTIONS_PER_PICTURE):
                key = {"image_id": number, "question_id": 1000 * number + index}
                questions.append({**key, "question": f"What is number {index} of {number}?"})
                annotations.append({**key, **_vqa_annotation(number, index)})
        task = {
            "info": {},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "data_subtype": subset,
            "license": {},
        }
        write_file(
            folder / f"v2_OpenEnded_mscoco_{subset}_questions.json",
            {**task, "questions": questions},
        )
        if not subset.startswith("test"):
            annotations.reverse()  # nothing says that both files have one order
            annotations.sort(key=lambda annotation: annotation["image_id"])
            write_file(
                folder / f"v2_mscoco_{subset}_annotations.json",
                {**task, "annotations": annotations},
            )


def _vqa_annotation(number, index):
    choice = ("2", "Yes", "no.", f"the umbrella {number}")[index]
    answers = [choice] * 7 + ["The  dog", "dont know", choice.lower()]
    return {
        "question_type": "what is",
        "answer_type": ("number", "yes/no", "yes/no", "other")[index],
        "multiple_choice_answer": choice,
        "answers": [
            {"answer": answer, "answer_confidence": "maybe", "answer_id": n}
            for n, answer in enumerate(answers, start=1)
        ],
    }


def write_visual_genome(folder):
    """Writes pictures of Visual Genome with regions and questions. 2 is in COCO's train, 3 in val, 4 in restval."""
    coco_ids = {1: None, 2: 57870, 3: 522418, 4: 318219, 5: 999_999, 6: None}
    pictures = []
    regions = []
    questions = []
    for number, coco_id in coco_ids.items():
        subfolder = "VG_100K_2" if number % 2 else "VG_100K"
        write_file(folder / "images" / subfolder / f"{number}.jpg", noise_jpeg(number))
        url = f"https://cs.stanford.edu/people/rak248/{subfolder}/{number}.jpg"
        size = {"width": 12, "height": 9, "flickr_id": None}
        pictures.append({"url": url, "image_id": number, "coco_id": coco_id, **size})
        indices = range(0 if number == 6 else 3)
        regions.append({"id": number, "regions": [_region(number, index) for index in indices]})
        questions.append(
            {"id": number, "qas": [_vg_question(number, n) for n in range(0 if number == 6 else 8)]}
        )
    write_file(folder / "image_data.json", pictures)
    write_file(folder / "annotations" / "region_descriptions.json", regions)
    write_file(folder / "annotations" / "question_answers.json", questions)


def _region(number, index):
    phrase = ("the clock is green ", f"shade is along street {number}", " ")[index]
    box = {"width": 5 + index, "height": 4, "x": index, "y": 1}
    return {"region_id": 10 * number + index, **box, "image_id": number, "phrase": phrase}


def _vg_question(number, index):
    question, answer = (
        ("Is it red?", "Yes."),
        ("How many?", "Two."),
        ("What is it?", "A tree trunk."),  # not in the vocabulary
        ("Is it red?", "yes"),  # again
        ("Is it day?", "Yes."),
        ("Is it day?", "No."),  # another answer
        ("How many?", "Several."),  # another answer, but not in the vocabulary
        ("Is it  red?", "No"),  # another question
    )[index]
    key = {"qa_id": 1_000_000 + 100 * number + index, "image_id": number}
    return {**key, "question": question, "answer": answer, "a_objects": [], "q_objects": []}


def write_snli_ve(folder):
    """Writes two pictures per split of SNLI-VE with five statements each."""
    labels = ("neutral", "contradiction", "entailment", "entailment", "neutral")
    first = 3416050480
    for split in ("train", "dev", "test"):
        rows = []
        for picture in (first, first + 1):
            write_file(folder / "flickr30k-images" / f"{picture}.jpg", noise_jpeg(picture % 1000))
            rows += [
                {
                    **{"annotator_labels": [label], "sentence1": "The man on the bike is smiling."},
                    **{"gold_label": label, "sentence2": f"Statement {n} about {picture}. "},
                    **{
                        "pairID": f"{picture}.jpg#{n % 2}r{n}{label[0]}",
                        "Flickr30K_ID": str(picture),
                    },
                }
                for n, label in enumerate(labels)
            ]
        first += 10
        write_json_lines(folder / f"snli_ve_{split}.jsonl", rows)


def write_nlvr2(folder):
    """Writes three pairs per split of NLVR2 in the folders of its archives. Some `.png` hold a JPEG."""
    for split in ("train", "dev", "test1", "test2"):
        rows = []
        for number in range(3):
            pair = f"{split}-{10 * number}-0"
            directory = 7 + number
            target = (
                folder / "images" / "train" / str(directory) if split == "train" else folder / split
            )
            write_file(target / f"{pair}-img0.png", png_of_shade(number))
            write_file(
                target / f"{pair}-img1.png",
                noise_jpeg(number) if number == 1 else png_of_shade(number + 50),
            )
            for sentence in range(2):
                row = {
                    "identifier": f"{pair}-{sentence}",
                    "sentence": f"Statement {sentence} about {pair}.",
                    "label": str(sentence == number % 2),
                    **{
                        "left_url": "https://example.org/l.jpg",
                        "writer": 1,
                        "validation": {"4": "True"},
                    },
                }
                if split == "train":
                    row["directory"] = directory
                if split == "test2":
                    del row["label"]
                rows.append(row)
        write_json_lines(folder / "nlvr2" / "data" / f"{split}.json", rows)
        if split in ("dev", "test1"):
            for subset, subset_rows in (("balanced", rows[:2]), ("unbalanced", rows[2:])):
                write_json_lines(
                    folder / "nlvr2" / "data" / subset / f"{subset}_{split}.json", subset_rows
                )


def write_winoground(folder):
    """Writes three examples, of two categories."""
    rows = []
    for number, tag in enumerate(("Object", "Relation", "Object")):
        captions = {
            "caption_0": f"picture {number} before it",
            "caption_1": f"it before picture {number}",
        }
        rows.append({"id": number, **captions, "tag": "x", "collapsed_tag": tag})
        for side in (0, 1):
            rows[-1][f"image_{side}"] = name = f"ex_{number}_img_{side}"
            write_file(folder / "images" / f"{name}.png", noise_jpeg(10 * number + side))
    write_json_lines(folder / "examples.jsonl", rows)


def write_sugarcrepe(folder):
    """Writes two examples of each change, all of three pictures. Their numbers have gaps, as in the originals."""
    changes = (
        "add_att",
        "add_obj",
        "replace_att",
        "replace_obj",
        "replace_rel",
        "swap_att",
        "swap_obj",
    )
    for index, name in enumerate(changes):
        captions = {
            "caption": f"A picture of {index}.",
            "negative_caption": f" A {index} of picture.",
        }
        rows = {
            str(3 * n): {"filename": f"{(index + n) % 3:012d}.jpg", **captions} for n in range(2)
        }
        write_file(folder / f"{name}.json", rows)
    for number in range(3):
        write_file(folder / "val2017" / f"{number:012d}.jpg", noise_jpeg(number))


def write_aro(folder):
    """Writes four regions of two pictures for each part."""
    rows = []
    for number in range(4):
        write_file(folder / "images" / f"{1 + number % 2}.jpg", noise_jpeg(1 + number % 2))
        region = {"bbox_x": number, "bbox_y": 1, "bbox_w": 4, "bbox_h": 3 + number}
        captions = {
            "true_caption": f"the {number} is on it",
            "false_caption": f"it is on the {number}",
        }
        kinds = {"relation_name": "under" if number == 2 else "on", "attributes": ["red", "old"]}
        rows.append({"image_path": f"{1 + number % 2}.jpg", **region, **captions, **kinds})
    for kind in ("relation", "attribution"):
        write_file(folder / f"visual_genome_{kind}.json", rows)


SET_WRITERS = {
    "coco": write_coco,
    "flickr30k": write_flickr30k,
    "vg": write_visual_genome,
    "vgqa": write_visual_genome,
    "vqav2": write_vqav2,
    "snli-ve": write_snli_ve,
    "nlvr2": write_nlvr2,
    "winoground": write_winoground,
    "sugarcrepe": write_sugarcrepe,
    "aro": write_aro,
}


def captioned_links(count):
    """Returns links with captions. The last two links end in one file name, and the third has no caption."""
    names = [
        f"http://static.example.org/{number // 3}/{1000 + number}_o.jpg"
        for number in range(count - 1)
    ]
    names.append(names[-1].replace("static", "farm4"))
    return [
        (url, "" if number == 2 else f"shade {number} , of many ")
        for number, url in enumerate(names)
    ]


def write_shards(folder, rows, *, per_shard=3):
    """Writes tar shards as img2dataset does, with its tables and counts beside. Every fourth download failed."""
    for shard, start in enumerate(range(0, len(rows), per_shard)):
        samples = list(_downloads(rows[start : start + per_shard], shard, start))
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for sample in samples:
                content = sample.pop("jpg")
                if content is None:
                    continue
                details = json.dumps(sample, indent=4)
                members = {
                    "jpg": content,
                    "txt": sample["caption"].encode(),
                    "json": details.encode(),
                }
                for ending, content in members.items():
                    member = tarfile.TarInfo(f"{sample['key']}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        pq.write_table(pa.Table.from_pylist(samples), folder / f"{shard:05d}.parquet")
        write_file(
            folder / f"{shard:05d}_stats.json", {"count": len(samples), "failed_to_download": 1}
        )


def _downloads(rows, shard, start):
    for index, (url, caption) in enumerate(rows):
        failed = (start + index) % 4 == 3
        yield {
            "url": url,
            "caption": caption,
            "key": f"{shard:05d}{index:04d}",
            "status": "failed_to_download" if failed else "success",
            "error_message": "HTTP Error 404: Not Found" if failed else None,
            "width": None if failed else 12,
            "jpg": None if failed else noise_jpeg(start + index),
        }


ARROW_VOCABULARY = ("net", "pitcher", "yes", "no")


def write_arrow_file(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(pd.DataFrame(list(rows)))
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table)


def write_coco_arrow(folder):
    for start, split in enumerate(("train", "restval", "val", "test")):
        year = "train2014" if split == "train" else "val2014"
        rows = [_captioned(coco_name(n, year), n, split, 5) for n in (2 * start, 2 * start + 1)]
        write_arrow_file(folder / f"coco_caption_karpathy_{split}.arrow", rows)


def write_flickr30k_arrow(folder):
    for start, split in enumerate(("train", "val", "test")):
        rows = [_captioned(f"{1000 + n}.jpg", n, split, 5) for n in (2 * start, 2 * start + 1)]
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
        {
            "image": noise_jpeg(n),
            "caption": ["the clock ", f"tree {n}"],
            **boxes,
            "image_id": str(n),
        }
        for n in (1, 107899)
    ]
    write_arrow_file(folder / "vg.arrow", rows)


def write_vqav2_arrow(folder, *, ending="_fix"):
    """Writes files of VQAv2. Test questions have no answers."""
    for start, split in enumerate(
        ("train", "val", "test", "test-dev", "trainable_val", "rest_val")
    ):
        rows = [_asked(10 * start + n, split) for n in range(2)]
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
    for start, split in enumerate(("train", "dev", "test")):
        sentences = [["premise", " A man. "], ["premise", "A cat."], ["other", "Sleeping."]]
        rows = [
            {"image": noise_jpeg(2 * start + n), "sentences": sentences, "labels": [2, 0, 1]}
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
            {"image_0": png_of_shade(n), "image_1": noise_jpeg(n), "identifier": f"{subset}-{n}-0"}
            | {"questions": ["One of them is grey.", " Both are. "], "answers": ["True", "False"]}
            for n in range(2)
        ]
        write_arrow_file(folder / f"nlvr2_{name}.arrow", rows)


def _captioned(name, number, split, count):
    captions = [f"Caption {index} of {name}." for index in range(count)]
    return {"image": noise_jpeg(number), "caption": captions, "image_id": name, "split": split}


def _asked(number, split):
    answered = not split.startswith("test")
    return {
        "image": noise_jpeg(number),
        "questions": ["What is behind him?", "Is it day?"],
        "answers": [["net", "pitcher"], ["yes", "no"]] if answered else [],
        "answer_labels": [[0, 1], [2, 3]] if answered else [],
        "answer_scores": [[1.0, 0.3], [0.6, 0.9]] if answered else [],
        "image_id": number,
        "question_id": [1000 * number, 1000 * number + 1],
        "split": split,
    }


CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR_FILE_ROWS = 8


def cifar_picture(number):
    """A picture [3, 32, 32] that differs by channel, row and column."""
    return np.random.default_rng(number).integers(0, 256, (3, 32, 32), dtype=np.uint8)


def write_cifar10(folder):
    """Five training files and one for testing: a byte of the class, then the red, green and blue rows."""
    home = folder / "cifar-10-batches-bin"
    home.mkdir(parents=True)
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for file, name in enumerate(names):
        records = [
            bytes([(file + n) % 10]) + cifar_picture(CIFAR_FILE_ROWS * file + n).tobytes()
            for n in range(CIFAR_FILE_ROWS)
        ]
        (home / name).write_bytes(b"".join(records))
    (home / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n\n")
    return home


def write_cifar100(folder):
    """One file each: a byte of the coarse class, one of the fine class, then the picture."""
    home = folder / "cifar-100-binary"
    home.mkdir(parents=True)
    for name, count, start in (("train.bin", 20, 0), ("test.bin", 5, 20)):
        records = [
            bytes([row % 20, (7 * row) % 100]) + cifar_picture(start + row).tobytes()
            for row in range(count)
        ]
        (home / name).write_bytes(b"".join(records))
    (home / "fine_label_names.txt").write_text(
        "\n".join(f"class_{number}" for number in range(100)) + "\n"
    )
    (home / "coarse_label_names.txt").write_text(
        "\n".join(f"group_{number}" for number in range(20)) + "\n"
    )
    return home


# Header of the training and development files, header of the test file, and training rows; None: no header.
GLUE_FILES = {
    "CoLA": (
        None,
        "index\tsentence",
        ["gj04\t1\t\tThe sailors rode the breeze.", 'gj04\t0\t*\tThe "car honked down the road.']
        * 4,
        ["0\tBill whistled past the house.", "1\tThe car honked its way."],
    ),
    "SST-2": (
        "sentence\tlabel",
        "index\tsentence",
        ["hide new secretions from the parental units \t0", "that loves its characters \t1"] * 4,
        ["0\tuneasy mishmash of styles", "1\tone of the best films"],
    ),
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
        [
            "1\t702876\t702977\tAmrozi accused his brother .\tReferring to him , Amrozi accused .",
            '0\t1\t2\tHe said "no .\tYucaipa owned it .',
        ]
        * 4,
        ["0\t1\t2\tPCCW 's officer\tCurrent officer", "1\t3\t4\tThe world\tA world"],
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "id\tquestion1\tquestion2",
        [
            "133273\t213221\t213222\tHow is life?\tWhat is life?\t0",
            "402555\t536040\t536041\tHow do I?\tHow to?\t1",
        ]
        * 4,
        ["0\tWould Trump?\tWhat if?", "1\tWhat are?\tWhy are?"],
    ),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
        [
            "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane takes off.\tAn air plane takes off.\t5.000",
            "1\tmain-captions\tMSRvid\t2012test\t0004\tnone\tnone\tA man plays a flute.\tA man plays.\t3.80",
            "2\tmain-captions\tMSRvid\t2012test\t0005\tnone\tnone\tA man spreads cheese.\tHe sleeps.\t0",
        ]
        * 3,
        [
            "0\tmain-captions\tMSRvid\t2012test\t0024\tnone\tnone\tA girl styles.\tA girl brushes.",
            "1\tmain-captions\tMSRvid\t2012test\t0033\tnone\tnone\tBoys play.\tBoys sleep.",
        ],
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel",
        "index\tsentence1\tsentence2",
        [
            "0\tNo weapons found.\tWeapons found.\tnot_entailment",
            "1\tA place of sorrow.\tSorrow.\tentailment",
        ]
        * 4,
        ["0\tMangla was called.\tShe was.", "1\tAuthorities said.\tThey said."],
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel",
        "index\tquestion\tsentence",
        [
            "0\tWhen did it begin?\tIn the third age.\tnot_entailment",
            "1\tWhat is it?\tIt is a cat.\tentailment",
        ]
        * 4,
        ["0\tWhat organisation?\tThe Red Cross.", "1\tWho?\tHe."],
    ),
}
_MNLI_COLUMNS = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
    "\tsentence1\tsentence2"
)


def write_glue(folder):
    for name, (header, test_header, rows, test_rows) in GLUE_FILES.items():
        for split in ("train", "dev"):
            lines = [header, *rows] if header else rows
            _write_text_lines(folder / name / f"{split}.tsv", lines)
        _write_text_lines(folder / name / "test.tsv", [test_header, *test_rows])
    parsed = "\t".join(["( a )"] * 4)
    rows = [f"{n}\t{n}\t{n}e\tfiction\t{parsed}\tThe old one.\tThe new one" for n in range(9)]
    labels = ("neutral", "entailment", "contradiction")
    _write_text_lines(
        folder / "MNLI" / "train.tsv",
        [
            f"{_MNLI_COLUMNS}\tlabel1\tgold_label",
            *(f"{row}\tneutral\t{labels[n % 3]}" for n, row in enumerate(rows)),
        ],
    )
    five = "\t".join(f"label{number}" for number in range(1, 6))
    for kind in ("matched", "mismatched"):
        marked = [f"{row}\t" + "\t".join([labels[n % 3]] * 6) for n, row in enumerate(rows)]
        _write_text_lines(
            folder / "MNLI" / f"dev_{kind}.tsv", [f"{_MNLI_COLUMNS}\t{five}\tgold_label", *marked]
        )
        _write_text_lines(folder / "MNLI" / f"test_{kind}.tsv", [_MNLI_COLUMNS, *rows[:4]])
    return folder


def _write_text_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
