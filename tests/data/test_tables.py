"""Tables as other programs write them: marks, separators, headings and base64."""

import base64
import gzip
import json
import logging
import re
from pathlib import Path

import pytest

from bridgetower.data.sets.custom import (
    LabelledConfig,
    PairsConfig,
    VqaSetConfig,
    prepare_custom,
    read_classes,
)
from bridgetower.data.sets.prepared_set import PreparedSet
from bridgetower.data.sources import tables
from bridgetower.data.sources.columns import Columns
from bridgetower.data.sources.reader import read
from helpers.sets import png_of_shade

TEXTS = ("a bänd", "two bands", "no band")
ROWS = [(png_of_shade(number), text) for number, text in enumerate(TEXTS)]
MISSING = json.loads(Path(__file__).with_name("missing_columns.json").read_text())
LONG = base64.b64encode(png_of_shade(7, size=64)).decode()
assert len(LONG) > 64


@pytest.fixture
def table_folder(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png_of_shade(number))
    return tmp_path


def content_of(source):
    """Returns the bytes of the images and the texts of a source in which nothing is wrong."""
    examples = list(read(source))
    assert [example.problem for example in examples] == [""] * len(examples)
    return [(*(image.read() for image in example.images), *example.texts) for example in examples]


class TestForms:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
    def test_marks_separators_and_line_ends(self, encoding, end, separator, table_folder):
        rows = [
            ("image", "caption"),
            *((f"{number}.png", text) for number, text in enumerate(TEXTS)),
        ]
        lines = end.join(separator.join(row) for row in rows) + end
        mark = "\ufeff" if encoding.endswith("e") else ""
        (table_folder / "t.csv").write_bytes((mark + lines).encode(encoding))
        assert content_of(table_folder / "t.csv") == ROWS

    @pytest.mark.parametrize("name", ["t.tsv", "t.tsv.gz"])
    def test_the_ending_tells_the_separator_of_a_tsv(self, name, table_folder):
        text = "image\tcaption\tmore,,,\n0.png\ta, b, c\t1\n"
        (table_folder / name).write_bytes(
            gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
        )
        assert content_of(table_folder / name) == [(png_of_shade(0), "a, b, c")]

    def test_a_separator_that_the_first_line_states(self, table_folder):
        (table_folder / "t.csv").write_text("sep=;\nimage;caption;a,b,c\n0.png;one;\n1.png;two;;\n")
        first, second = read(table_folder / "t.csv")
        assert (first.origin, first.texts) == ("t.csv line 3", ("one",))
        assert second.problem.startswith("it has more cells than the header")

    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_quotes_hold_separators_quotes_and_line_ends(self, end, table_folder):
        (table_folder / "t.csv").write_text(
            f'"image","caption"{end}0.png,"a, ""b""{end}c"{end}1.png,d{end}', newline=""
        )
        assert content_of(table_folder / "t.csv") == [
            (png_of_shade(0), f'a, "b"{end}c'),
            (png_of_shade(1), "d"),
        ]
        assert [example.origin for example in read(table_folder / "t.csv")] == [
            "t.csv line 2",
            "t.csv line 4",
        ]

    def test_a_file_of_captions_and_json_lines_with_a_mark(self, table_folder):
        (table_folder / "t.jsonl").write_text(
            '{"image": "0.png", "caption": "one"}\n', encoding="utf-8-sig"
        )
        assert content_of(table_folder / "t.jsonl") == [(png_of_shade(0), "one")]
        (table_folder / "t.jsonl").write_text(
            '{"image": "0.png", "caption": "one"}\n', encoding="utf-16"
        )
        assert content_of(table_folder / "t.jsonl") == [(png_of_shade(0), "one")]
        (table_folder / "t.jsonl").unlink()
        (table_folder / "captions.txt").write_text(
            "Image Name\tcomment\n0.png\tone\n", encoding="utf-8-sig"
        )
        assert content_of(table_folder) == [(png_of_shade(0), "one")]

    @pytest.mark.parametrize("mark", ["", "\ufeff\n "])
    def test_json_lines_in_a_file_called_json(self, mark, table_folder):
        lines = "\n".join(
            json.dumps({"image": f"{number}.png", "caption": str(number)}) for number in range(2)
        )
        (table_folder / "t.json").write_text(f"{mark}{lines}\n")
        assert content_of(table_folder / "t.json") == [
            (png_of_shade(0), "0"),
            (png_of_shade(1), "1"),
        ]
        (table_folder / "t.json").write_text('{"rows": [{"image": "0.png"},\n{"image": "1.png"}]}')
        assert content_of(table_folder / "t.json") == [(png_of_shade(0),), (png_of_shade(1),)]

    def test_a_line_of_json_that_is_a_text_is_no_row(self, table_folder):
        (table_folder / "t.jsonl").write_text('"0.png"\n{"image": "0.png"}\n')
        problems = [example.problem for example in read(table_folder / "t.jsonl")]
        assert problems == ["it is no JSON object", ""]

    def test_what_is_not_utf8_is_named(self, table_folder):
        (table_folder / "t.csv").write_bytes("image,caption\n0.png,é\n".encode("latin-1"))
        assert "it is not UTF-8" in [*read(table_folder / "t.csv")][-1].problem
        (table_folder / "t.csv").write_bytes("image,caption\n0.png,é\n".encode("utf-16")[:-1])
        assert "it is not UTF-16" in [*read(table_folder / "t.csv")][-1].problem

    @pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
    def test_other_encodings_without_a_mark_are_not_taken_for_utf8(self, encoding, table_folder):
        (table_folder / "t.csv").write_bytes("image,caption\n0.png,a\n".encode(encoding))
        with pytest.raises(ValueError, match=r"t\.csv has zero characters .*; save it as UTF-8$"):
            list(read(table_folder / "t.csv"))


class TestHeadings:
    @pytest.mark.parametrize(
        "heading",
        [
            "image",
            "IMAGE",
            " image ",
            "image_name",
            "Image Name",
            "img-path",
            "photo",
            "picture",
            "url",
        ],
    )
    def test_images(self, heading, table_folder):
        (table_folder / "t.csv").write_text(f"{heading},n\n0.png,1\n")
        assert content_of(table_folder / "t.csv") == [(png_of_shade(0),)]

    def test_usual_names_go_before_likely_ones(self, table_folder, caplog):
        caplog.set_level(logging.INFO)
        (table_folder / "t.csv").write_text("photo,image,comment,caption\n1.png,0.png,no,yes\n")
        assert content_of(table_folder / "t.csv") == [(png_of_shade(0), "yes")]
        (table_folder / "u.csv").write_text("url,file\nhttp://127.0.0.1:9/a.png,0.png\n")
        assert content_of(table_folder / "u.csv") == [(png_of_shade(0),)]
        assert caplog.text == ""

    def test_a_likely_name_is_told_once(self, table_folder, caplog):
        caplog.set_level(logging.INFO)
        for name in ("t.csv", "u.csv"):
            (table_folder / name).write_text("Image Name|comment\n0.png|one\n1.png|two\n")
            assert content_of(table_folder / name) == [
                (png_of_shade(0), "one"),
                (png_of_shade(1), "two"),
            ]
        assert [record.message for record in caplog.records] == [
            "the column 'Image Name' is taken for images; name another one if that is wrong",
            "the column 'comment' is taken for texts; name another one if that is wrong",
        ]

    def test_the_caption_is_the_folder_of_the_first_image(self, table_folder):
        for name in ("red_hat", "dog"):
            (table_folder / name).mkdir()
            (table_folder / name / "0.png").write_bytes(png_of_shade(0))
        (table_folder / "t.csv").write_text("image_1,image_2\nred_hat/0.png,dog/0.png\n")
        (example,) = read(table_folder / "t.csv", Columns(captions_from="folder"))
        assert example.texts == ("red hat",)

    def test_fields_are_the_columns_without_a_role(self, table_folder):
        (table_folder / "t.csv").write_text("key,image,caption,split,n\na,0.png,x,val,1\n")
        (example,) = read(table_folder / "t.csv")
        assert (example.id, example.split) == ("a", "validation")
        assert example.fields == {"key": "a", "n": "1"}

    def test_of_two_likely_ones_none_is_taken(self, table_folder):
        (table_folder / "t.csv").write_text("photo,picture,alt,comment\n0.png,1.png,one,two\n")
        assert content_of(table_folder / "t.csv") == [()]

    @pytest.mark.parametrize(
        ("header", "option"),
        [("image,file", "image_column"), ("id,uid", "id_column"), ("caption,text", "words")],
    )
    def test_of_two_usual_ones_the_option_decides(self, header, option, table_folder):
        (table_folder / "t.csv").write_text(f"{header}\na,b\n")
        names = header.replace(",", ", ")
        with pytest.raises(
            ValueError, match=rf"t\.csv has several columns of \w+ \({names}\); give {option} one"
        ):
            list(read(table_folder / "t.csv", Columns(text_option="words")))

    def test_a_column_that_comes_twice(self, table_folder):
        (table_folder / "t.csv").write_text("image,caption,caption,,\n0.png,one,two,,\n")
        with pytest.raises(
            ValueError, match=r"t\.csv has the column caption twice; give each a name of its own"
        ):
            list(read(table_folder / "t.csv"))
        # columns without a name are nobody's
        (table_folder / "t.csv").write_text("image,caption,,\n0.png,one,,\n")
        assert content_of(table_folder / "t.csv") == [(png_of_shade(0), "one")]

    def test_labels_and_answers(self, table_folder, caplog):
        caplog.set_level(logging.INFO)
        (table_folder / "t.csv").write_text(
            "image,Class Name,n\n0.png,cat,1\n1.png,dog,2\n2.png,cat,3\n"
        )
        prepare_custom("classification", table_folder / "t.csv", table_folder / "out")
        assert read_classes(table_folder / "out").names == ("cat", "dog")
        assert caplog.text.count("'Class Name' is taken for labels") == 1
        (table_folder / "u.csv").write_text("image,label,label_name\n0.png,1,cat\n1.png,2,dog\n")
        prepare_custom("classification", table_folder / "u.csv", table_folder / "both")
        assert read_classes(table_folder / "both").names == ("1", "2")
        rows = "".join(f"{number % 3}.png,what?,{number}\n" for number in range(9))
        (table_folder / "v.csv").write_text("image,question_text,correct answer\n" + rows)
        prepare_custom("vqa", table_folder / "v.csv", table_folder / "vqa")
        answers = [row["entry"]["answers"] for row in PreparedSet(table_folder / "vqa").scan()]
        assert sorted(answers) == [[str(number)] for number in range(9)]


class TestWhatIsMissing:
    """It is said once for a table, whatever the number of its rows, and before an image is read."""

    @pytest.mark.parametrize(("kind", "content", "message"), MISSING["headers"])
    def test_in_a_table_with_a_header(self, kind, content, message, table_folder):
        (table_folder / "t.csv").write_text(f"{content}\n" + "1.png,x\n" * 30)
        with pytest.raises(ValueError, match=message) as error:
            prepare_custom(kind, table_folder / "t.csv", table_folder / "out")
        assert "max_errors" not in str(error.value)
        assert len(str(error.value)) < 250

    def test_rows_for_prediction_need_no_label(self, table_folder):
        (table_folder / "t.csv").write_text("image,split\n0.png,test\n")
        prepare_custom("regression", table_folder / "t.csv", table_folder / "out")

    def test_in_json_lines_any_row_may_have_it(self, table_folder):
        lines = [{"image": "0.png"}, {"image": "1.png", "caption": "one"}, {"caption": "two"}]
        (table_folder / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        info = prepare_custom(
            "pairs", table_folder / "t.jsonl", table_folder / "out", PairsConfig(max_errors=2)
        )
        assert info.left_out == {"cannot be used": 2}
        (table_folder / "u.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines[:1] * 9)
        )
        with pytest.raises(
            ValueError, match=r"u\.jsonl has no column of texts; it has image; give text_column"
        ):
            prepare_custom(
                "pairs",
                table_folder / "u.jsonl",
                table_folder / "out-2",
                PairsConfig(max_errors=99),
            )

    @pytest.mark.parametrize(
        ("kind", "config", "message"),
        [
            ("pairs", PairsConfig(text_column="no"), r"column no; it has image, caption, label$"),
            ("vqa", VqaSetConfig(image_column="no"), r"column no; it has image, caption, label$"),
            (
                "classification",
                LabelledConfig(text_column="no"),
                r"column no; it has image, caption, label$",
            ),
        ],
    )
    def test_a_column_that_is_asked_for(self, kind, config, message, table_folder):
        (table_folder / "t.csv").write_text("image,caption,label\n" + "1.png,x,y\n" * 30)
        with pytest.raises(ValueError, match=message):
            prepare_custom(kind, table_folder / "t.csv", table_folder / "out", config)

    def test_a_column_that_is_asked_for_is_missed_before_the_first_row(self, table_folder):
        (table_folder / "t.csv").write_text("image,caption\n0.png,x\n")
        with pytest.raises(
            ValueError, match=r"no row of t\.csv has a column no; it has image, caption"
        ):
            next(read(table_folder / "t.csv", Columns(id="no")))

    @pytest.mark.parametrize(("row", "message"), MISSING["rows"])
    def test_formats_of_others_say_what_was_expected(self, row, message, table_folder):
        (table_folder / "t.json").write_text(json.dumps([row]))
        with pytest.raises(ValueError, match=message):
            prepare_custom("pairs", table_folder / "t.json", table_folder / "out")

    def test_more_errors_are_advised_only_where_a_row_is_good(self, table_folder):
        (table_folder / "t.csv").write_text("image,caption\nno.png,x\nnone.png,y\n")
        with pytest.raises(ValueError, match=r"t\.csv: 2 bad items and no good one: ") as error:
            prepare_custom("pairs", table_folder / "t.csv", table_folder / "out")
        assert "max_errors" not in str(error.value)
        (table_folder / "t.csv").write_text("image,caption\nno.png,x\nnone.png,y\n0.png,z\n")
        with pytest.raises(
            ValueError, match=r"2 bad items, allowed are 1 \(max_errors=N allows more\): "
        ):
            prepare_custom(
                "pairs", table_folder / "t.csv", table_folder / "out", PairsConfig(max_errors=1)
            )

    def test_a_command_names_the_option(self, table_folder, refused, tiny_checkpoint, monkeypatch):
        monkeypatch.chdir(table_folder)
        (table_folder / "t.csv").write_text("bild,caption\n0.png,x\n")
        (table_folder / "u.csv").write_text("image,caption,text\n0.png,x,y\n")
        (table_folder / "v.csv").write_text("image,worte\n0.png,x\n")
        prepare = ("prepare", "pairs", "--out", "out")
        assert refused(*prepare, "t.csv").endswith(
            "it has bild, caption; give --image-column its name, or rename it to image"
        )
        assert refused(*prepare, "u.csv").endswith(
            "(caption, text); give --text-column one of them"
        )
        embed = ("embed", tiny_checkpoint, "--of", "pairs", "--out", "v.npy")
        assert refused(*embed, "u.csv").endswith(
            "(caption, text); give --caption-column one of them"
        )
        assert "it has image, worte; give --caption-column its name" in refused(*embed, "v.csv")
        assert "it has bild, caption; give --image-column its name" in refused(*embed, "t.csv")
        assert "give --image-column its name" in refused(
            "index", "t.csv", "--out", "i.lance", "--model", tiny_checkpoint
        )


class TestBase64:
    @pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
    @pytest.mark.parametrize("before", ["", "data:image/png;base64,", "DATA:image/svg+xml;base64,"])
    def test_images(self, name, before, table_folder):
        cell = before + LONG
        if name == "t.csv":
            text = f"image,caption\n0.png,file\n{cell if not before else json.dumps(cell)},own\n"
        else:
            rows = [{"image": "0.png", "caption": "file"}, {"image": cell, "caption": "own"}]
            text = (
                json.dumps(rows)
                if name == "t.json"
                else "".join(json.dumps(row) + "\n" for row in rows)
            )
        (table_folder / name).write_text(text)
        assert content_of(table_folder / name) == [
            (png_of_shade(0), "file"),
            (png_of_shade(7, size=64), "own"),
        ]
        _, example = read(table_folder / name)
        assert example.id == example.images[0].name.replace("image ", "") == f"{name}/2"
        assert not example.images[0].is_file

    def test_breaks_in_lines(self, table_folder):
        (table_folder / "t.jsonl").write_text(
            json.dumps({"image": base64.encodebytes(png_of_shade(7, size=64)).decode()})
        )
        assert content_of(table_folder / "t.jsonl") == [(png_of_shade(7, size=64),)]

    @pytest.mark.parametrize("cell", ["data:image/png;base64,iVBO*", "data:image/png;base64,iVBOR"])
    def test_damaged(self, cell, table_folder):
        (table_folder / "t.jsonl").write_text(
            json.dumps({"image": cell}) + "\n" + json.dumps({"image": "0.png"})
        )
        bad, good = read(table_folder / "t.jsonl")
        assert bad.problem.startswith("the base64 of its image is damaged")
        assert not good.problem

    @pytest.mark.parametrize(
        "path", ["a" * 64, "/9j/" + "a" * 60, "iVBORw0KGgo", f"{LONG[:80]}.png"]
    )
    def test_names_of_files_stay_names(self, path, table_folder):
        (table_folder / "t.jsonl").write_text(json.dumps({"image": path}))
        (example,) = read(table_folder / "t.jsonl")
        assert example.images[0].location.endswith(path) == (path[0] != "/" or len(path) < 64)

    def test_an_image_may_be_longer_than_a_text(self, table_folder, monkeypatch):
        monkeypatch.setattr(tables, "MAX_TEXT_LENGTH", 200)
        monkeypatch.setattr(tables, "MAX_ROW_LENGTH", len(LONG) + 60)
        for caption in ("short", "x" * 201, "x" * 300):
            (table_folder / "t.jsonl").write_text(json.dumps({"image": LONG, "caption": caption}))
            (example,) = read(table_folder / "t.jsonl")
            limit = {5: "", 201: len(LONG) + 60, 300: len(LONG) + 60}[len(caption)]
            assert example.problem == (f"it has more than {limit} characters" if limit else "")
        monkeypatch.setattr(tables, "MAX_ROW_LENGTH", 2**20)
        (example,) = read(table_folder / "t.jsonl")
        assert example.problem == "it has more than 200 characters"
        (table_folder / "t.jsonl").write_text(json.dumps({"image": LONG, "caption": "x" * 200}))
        assert content_of(table_folder / "t.jsonl") == [(png_of_shade(7, size=64), "x" * 200)]

    def test_a_set_and_its_limits(self, table_folder):
        rows = [
            {"image": LONG, "caption": "a"},
            {"image": "data:image/png;base64,bm8gaW1hZ2U=", "caption": "b"},
        ]
        (table_folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        info = prepare_custom(
            "pairs", table_folder / "t.jsonl", table_folder / "out", PairsConfig(max_errors=1)
        )
        assert PreparedSet(table_folder / "out").images([0]) == [png_of_shade(7, size=64)]
        (problem,) = info.some_left_out["cannot be used"]
        assert re.search(r"t\.jsonl line 2.*cannot be read as an image", problem)
