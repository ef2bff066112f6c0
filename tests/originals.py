"""Miniatures of CIFAR and GLUE in the very formats of their authors, odd cases included."""

import numpy as np

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PER_FILE = 8


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
            bytes([(file + n) % 10]) + cifar_picture(PER_FILE * file + n).tobytes()
            for n in range(PER_FILE)
        ]
        (home / name).write_bytes(b"".join(records))
    (home / "batches.meta.txt").write_text("\n".join(CIFAR10) + "\n\n")
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
GLUE = {
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
    for name, (header, test_header, rows, test_rows) in GLUE.items():
        for split in ("train", "dev"):
            lines = [header, *rows] if header else rows
            _write(folder / name / f"{split}.tsv", lines)
        _write(folder / name / "test.tsv", [test_header, *test_rows])
    parsed = "\t".join(["( a )"] * 4)
    rows = [f"{n}\t{n}\t{n}e\tfiction\t{parsed}\tThe old one.\tThe new one" for n in range(9)]
    labels = ("neutral", "entailment", "contradiction")
    _write(
        folder / "MNLI" / "train.tsv",
        [
            f"{_MNLI_COLUMNS}\tlabel1\tgold_label",
            *(f"{row}\tneutral\t{labels[n % 3]}" for n, row in enumerate(rows)),
        ],
    )
    five = "\t".join(f"label{number}" for number in range(1, 6))
    for kind in ("matched", "mismatched"):
        marked = [f"{row}\t" + "\t".join([labels[n % 3]] * 6) for n, row in enumerate(rows)]
        _write(
            folder / "MNLI" / f"dev_{kind}.tsv", [f"{_MNLI_COLUMNS}\t{five}\tgold_label", *marked]
        )
        _write(folder / "MNLI" / f"test_{kind}.tsv", [_MNLI_COLUMNS, *rows[:4]])
    return folder


def _write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
