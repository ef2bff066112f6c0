"""Miniature copies of published sets: file names, fields and nesting of the originals."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rows import png


def jpeg(number, *, size=(12, 9)):
    """Returns a small picture, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write(path, content):
    """Writes bytes, text or JSON, with the folders that it takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(
            content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
        )


def write_lines(path, rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def change(path, edit):
    """Changes what a file of JSON, or one with a JSON object per line, holds."""
    lines = path.read_text(encoding="utf-8").splitlines()
    content = [json.loads(line) for line in lines]
    edit(content[0] if len(lines) == 1 else content)
    if len(lines) == 1:
        write(path, content[0])
    else:
        write_lines(path, content)


def counts(info):
    return {split: (part.images, part.examples) for split, part in info.splits.items()}


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
            write(folder / year / coco_name(number, year), jpeg(number))
    write(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


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
        write(folder / "flickr30k-images" / name, jpeg(number))
    write(
        folder / "karpathy" / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"}
    )


def _karpathy_image(number, name, split, captions):
    said = [
        {"tokens": one.lower().split(), "raw": one, "sentid": 10 * number + n}
        for n, one in enumerate(captions)
    ]
    return {"imgid": number, "filename": name, "split": split, "sentences": said}


ANSWERS = ("yes", "no", "2")
"""First choices in `write_vqav2` that are frequent enough for the vocabulary, in order of appearance."""

_QUESTIONS_PER_PICTURE = 4
_VQA_SHOWN = {
    "train2014": range(9, 16),
    "val2014": range(42, 47),
    "test2015": range(1, 4),
    "test-dev2015": range(1, 3),
}


def write_vqav2(folder):
    """Writes pictures and questions of VQAv2; the fourth question about each has a rare answer."""
    for subset, numbers in _VQA_SHOWN.items():
        year = subset.replace("test-dev", "test")
        questions, annotations = [], []
        for number in numbers:
            write(folder / year / coco_name(number, year), jpeg(number))
            for place in range(_QUESTIONS_PER_PICTURE):
                key = {"image_id": number, "question_id": 1000 * number + place}
                questions.append({**key, "question": f"What is number {place} of {number}?"})
                annotations.append({**key, **_vqa_annotation(number, place)})
        task = {
            "info": {},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "data_subtype": subset,
            "license": {},
        }
        write(
            folder / f"v2_OpenEnded_mscoco_{subset}_questions.json",
            {**task, "questions": questions},
        )
        if not subset.startswith("test"):
            annotations.reverse()  # nothing says that both files have one order
            annotations.sort(key=lambda annotation: annotation["image_id"])
            write(
                folder / f"v2_mscoco_{subset}_annotations.json",
                {**task, "annotations": annotations},
            )


def _vqa_annotation(number, place):
    choice = ("2", "Yes", "no.", f"the umbrella {number}")[place]
    said = [choice] * 7 + ["The  dog", "dont know", choice.lower()]
    return {
        "question_type": "what is",
        "answer_type": ("number", "yes/no", "yes/no", "other")[place],
        "multiple_choice_answer": choice,
        "answers": [
            {"answer": answer, "answer_confidence": "maybe", "answer_id": n}
            for n, answer in enumerate(said, start=1)
        ],
    }


def write_visual_genome(folder):
    """Writes pictures of Visual Genome with regions and questions; 2 is in COCO's train, 3 in val, 4 in restval."""
    coco_ids = {1: None, 2: 57870, 3: 522418, 4: 318219, 5: 999_999, 6: None}
    pictures, regions, questions = [], [], []
    for number, coco_id in coco_ids.items():
        part = "VG_100K_2" if number % 2 else "VG_100K"
        write(folder / "images" / part / f"{number}.jpg", jpeg(number))
        url = f"https://cs.stanford.edu/people/rak248/{part}/{number}.jpg"
        size = {"width": 12, "height": 9, "flickr_id": None}
        pictures.append({"url": url, "image_id": number, "coco_id": coco_id, **size})
        said = range(0 if number == 6 else 3)
        regions.append({"id": number, "regions": [_region(number, place) for place in said]})
        questions.append(
            {"id": number, "qas": [_vg_question(number, n) for n in range(0 if number == 6 else 8)]}
        )
    write(folder / "image_data.json", pictures)
    write(folder / "annotations" / "region_descriptions.json", regions)
    write(folder / "annotations" / "question_answers.json", questions)


def _region(number, place):
    phrase = ("the clock is green ", f"shade is along street {number}", " ")[place]
    box = {"width": 5 + place, "height": 4, "x": place, "y": 1}
    return {"region_id": 10 * number + place, **box, "image_id": number, "phrase": phrase}


def _vg_question(number, place):
    question, answer = (
        ("Is it red?", "Yes."),
        ("How many?", "Two."),
        ("What is it?", "A tree trunk."),  # not in the vocabulary
        ("Is it red?", "yes"),  # again
        ("Is it day?", "Yes."),
        ("Is it day?", "No."),  # another answer
        ("How many?", "Several."),  # another answer, but not in the vocabulary
        ("Is it  red?", "No"),  # another question
    )[place]
    key = {"qa_id": 1_000_000 + 100 * number + place, "image_id": number}
    return {**key, "question": question, "answer": answer, "a_objects": [], "q_objects": []}


def write_snli_ve(folder):
    """Writes two pictures per split of SNLI-VE with five statements each."""
    labels = ("neutral", "contradiction", "entailment", "entailment", "neutral")
    first = 3416050480
    for split in ("train", "dev", "test"):
        rows = []
        for picture in (first, first + 1):
            write(folder / "flickr30k-images" / f"{picture}.jpg", jpeg(picture % 1000))
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
        write_lines(folder / f"snli_ve_{split}.jsonl", rows)


def write_nlvr2(folder):
    """Writes three pairs per split of NLVR2 in the folders of its archives; some `.png` hold a JPEG."""
    for split in ("train", "dev", "test1", "test2"):
        rows = []
        for number in range(3):
            pair = f"{split}-{10 * number}-0"
            directory = 7 + number
            place = (
                folder / "images" / "train" / str(directory) if split == "train" else folder / split
            )
            write(place / f"{pair}-img0.png", png(number))
            write(place / f"{pair}-img1.png", jpeg(number) if number == 1 else png(number + 50))
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
        write_lines(folder / "nlvr2" / "data" / f"{split}.json", rows)
        if split in ("dev", "test1"):
            for part, chosen in (("balanced", rows[:2]), ("unbalanced", rows[2:])):
                write_lines(folder / "nlvr2" / "data" / part / f"{part}_{split}.json", chosen)


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
            write(folder / "images" / f"{name}.png", jpeg(10 * number + side))
    write_lines(folder / "examples.jsonl", rows)


def write_sugarcrepe(folder):
    """Writes two examples of each change, all of three pictures; their numbers have gaps, as in the originals."""
    changes = (
        "add_att",
        "add_obj",
        "replace_att",
        "replace_obj",
        "replace_rel",
        "swap_att",
        "swap_obj",
    )
    for place, name in enumerate(changes):
        captions = {
            "caption": f"A picture of {place}.",
            "negative_caption": f" A {place} of picture.",
        }
        rows = {
            str(3 * n): {"filename": f"{(place + n) % 3:012d}.jpg", **captions} for n in range(2)
        }
        write(folder / f"{name}.json", rows)
    for number in range(3):
        write(folder / "val2017" / f"{number:012d}.jpg", jpeg(number))


def write_aro(folder):
    """Writes four regions of two pictures for each part."""
    rows = []
    for number in range(4):
        write(folder / "images" / f"{1 + number % 2}.jpg", jpeg(1 + number % 2))
        region = {"bbox_x": number, "bbox_y": 1, "bbox_w": 4, "bbox_h": 3 + number}
        captions = {
            "true_caption": f"the {number} is on it",
            "false_caption": f"it is on the {number}",
        }
        kinds = {"relation_name": "under" if number == 2 else "on", "attributes": ["red", "old"]}
        rows.append({"image_path": f"{1 + number % 2}.jpg", **region, **captions, **kinds})
    for part in ("relation", "attribution"):
        write(folder / f"visual_genome_{part}.json", rows)


WRITERS = {
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


def links(count):
    """Returns links with captions; the last two links end in one file name, and the third has no caption."""
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
    """Writes tar shards as img2dataset does, with its tables and counts beside; every fourth download failed."""
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
        write(folder / f"{shard:05d}_stats.json", {"count": len(samples), "failed_to_download": 1})


def _downloads(rows, shard, start):
    for place, (url, caption) in enumerate(rows):
        failed = (start + place) % 4 == 3
        yield {
            "url": url,
            "caption": caption,
            "key": f"{shard:05d}{place:04d}",
            "status": "failed_to_download" if failed else "success",
            "error_message": "HTTP Error 404: Not Found" if failed else None,
            "width": None if failed else 12,
            "jpg": None if failed else jpeg(start + place),
        }
