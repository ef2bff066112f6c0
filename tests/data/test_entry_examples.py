"""Questions and statements as examples, with their images: what rows of each kind hold, and what a batch has."""

import pytest
import torch

from bridgetower.data.batches.batch import BatchKey
from bridgetower.data.batches.examples import ClassEncoder, EntryDataset, PreparedImages
from bridgetower.data.config import DataConfig
from bridgetower.data.sets.answers import soft_targets
from bridgetower.data.sets.prepared_set import read_info
from bridgetower.data.sets.schema import (
    CAPTIONS,
    SCHEMAS,
    SNLI_VE,
    VQA,
    Question,
    Statement,
    nlvr2_sentence,
    schema_named,
)
from bridgetower.model.config import FIXED_LABELS
from bridgetower.tasks.entries import VqaConfig
from bridgetower.tasks.table import TASKS
from helpers.sets import (
    ANSWERS,
    CHOICES,
    COLOUR_NAMES,
    ENTRY_KINDS,
    Choice,
    caption_record,
    entry_examples,
    png_of_colour,
    write_entry_set,
    write_set,
)


@pytest.fixture(scope="module")
def task_sets(tmp_path_factory):
    return {kind: write_entry_set(tmp_path_factory.mktemp(kind), kind) for kind in ENTRY_KINDS}


@pytest.fixture
def entry_images(task_sets, tiny_processor):
    def make(kind="nlvr2", splits="train", count=1, **config):
        data = DataConfig(folders=(str(task_sets[kind]),) * count, **config)
        return PreparedImages(data, splits, tiny_processor, schema=SCHEMAS[kind])

    return make


@pytest.fixture
def load_entries(task_sets, tiny_processor):
    def make(kind, *arguments, **options):
        return entry_examples(task_sets[kind], kind, tiny_processor, *arguments, **options)

    return make


def test_classes_are_in_the_order_of_the_heads():
    labels = {
        spec.head: spec.schema.labels
        for spec in TASKS.values()
        if spec.schema and spec.schema.labels
    }
    assert {head: FIXED_LABELS[head] for head in labels if head} == labels
    assert {schema.labels for schema in SCHEMAS.values() if schema.labels} == set(labels.values())
    assert SCHEMAS["snli-ve"].labels == ("contradiction", "neutral", "entailment")
    assert SCHEMAS["nlvr2"].labels == ("False", "True")


class TestWhichThereAre:
    def test_one_per_statement_in_order(self, load_entries):
        examples = load_entries("snli-ve")
        names = [
            f"{number}.jpg#{position}r" for number in range(8) for position in range(1 + number % 2)
        ]
        assert len(examples) == len(names)
        assert [entry["statement_id"] for entry in examples] == names
        assert examples[BatchKey((5, 0), 0)].ids == (names[5], names[0])

    def test_those_that_are_kept(self, entry_images):
        images = entry_images("snli-ve")
        encode = ClassEncoder(FIXED_LABELS["snli_ve"])
        repeated = entry_images("snli-ve", count=2, repeats=(1, 3))
        keep = {"keep": lambda entry: entry["label"] == "neutral"}
        neutral, doubled = (
            EntryDataset(images_read, encode, **keep) for images_read in (images, repeated)
        )
        assert {entry["label"] for entry in neutral} == {"neutral"}
        assert len(neutral) == len(list(neutral)) < 12
        assert len(doubled) == 4 * len(neutral)
        with pytest.raises(
            ValueError, match=r"no example in split train of .* is fit for this; choose another"
        ):
            EntryDataset(images, encode, keep=lambda entry: False)

    def test_questions_without_an_answer_of_the_vocabulary(self, load_entries):
        everything = load_entries("vqa")
        answerable = load_entries("vqa", "train", "train")
        left_out = [1021, 1051]
        assert len(everything) == 16
        assert [entry["question_id"] for entry in answerable] == [
            entry["question_id"] for entry in everything if entry["question_id"] not in left_out
        ]
        row = [entry["question_id"] for entry in everything].index(1021)
        assert not everything[BatchKey((row,), 0)].labels.any()
        paper = load_entries("vqa", "train", "validate", task=VqaConfig(protocol="paper"))
        assert list(paper) == list(answerable)

    @pytest.mark.parametrize(
        ("kind", "use", "message"),
        [
            (
                "vqa",
                "validate",
                "question 3000 of split test has no answers; choose a split that has",
            ),
            ("vqa", "train", r"no example in split test of .* is fit for this"),
            (
                "snli-ve",
                "train",
                "statement 0.jpg#0r of split test has no label; choose a split that has",
            ),
            (
                "nlvr2",
                "validate",
                "statement test-0-0-0 of split test has no label; choose a split that has",
            ),
        ],
    )
    def test_without_labels(self, load_entries, kind, use, message):
        assert load_entries(kind, "test")[BatchKey((0, 1), 0)].labels is None
        with pytest.raises(ValueError, match=message):
            load_entries(kind, "test", use)


class TestBatch:
    def test_questions(self, load_entries, tiny_processor):
        questions = load_entries("vqa")
        entries = list(questions)
        batch = questions[BatchKey((4, 1), 3)]
        assert batch.ids == ("1020", "1001")
        text = tiny_processor.texts([entries[4]["question"], entries[1]["question"]])
        assert torch.equal(batch.input_ids, text.input_ids)
        assert torch.equal(
            batch.pixel_values, tiny_processor.images([png_of_colour("blue"), png_of_colour("red")])
        )
        answers = [
            {name: x for name, x in zip(ANSWERS, row, strict=True) if x}
            for row in batch.labels.tolist()
        ]
        assert answers == [
            pytest.approx({"blue": 1.0, "green": 0.6}),
            pytest.approx({"yes": 1.0, "no": 1.0}),
        ]
        assert answers[0] == pytest.approx(soft_targets(entries[4]["answers"], ANSWERS))
        assert batch.seed == 3

    def test_one_image(self, load_entries, tiny_processor):
        batch = load_entries("snli-ve", "train", "validate")[BatchKey((2, 0), 1)]
        assert batch.ids == ("1.jpg#1r", "0.jpg#0r")
        assert torch.equal(
            batch.pixel_values,
            tiny_processor.images([png_of_colour("green"), png_of_colour("red")]),
        )
        assert batch.pixel_values_2 is None
        assert torch.equal(
            batch.input_ids, tiny_processor.texts(["it is red", "it is red"]).input_ids
        )
        assert batch.labels.tolist() == [1, 2]  # neutral, entailment

    def test_two_images(self, load_entries, tiny_processor):
        batch = load_entries("nlvr2", "train", "validate")[BatchKey((1, 0), 1)]
        assert batch.ids == ("train-0-1-0", "train-0-0-0")
        first, second = (
            tiny_processor.images([*map(png_of_colour, two)])
            for two in (("green", "red"), ("red", "orange"))
        )
        assert torch.equal(batch.pixel_values, first)
        assert torch.equal(batch.pixel_values_2, second)
        assert batch.labels.tolist() == [0, 1]

    @pytest.mark.parametrize("kind", ENTRY_KINDS)
    def test_is_a_function_of_its_key(self, load_entries, kind):
        examples = load_entries(kind, random_crop=0.5, rand_augment="geometry", rand_magnitude=5)
        key = BatchKey((3, 0, 3), 17)
        first = examples[key]
        _ = torch.manual_seed(99)
        again = examples[key]
        other = examples[BatchKey(key.examples, 18)]
        assert torch.equal(first.labels, again.labels)
        for name in ("pixel_values", "pixel_values_2") if kind == "nlvr2" else ("pixel_values",):
            assert torch.equal(getattr(first, name), getattr(again, name))
            assert not torch.equal(getattr(first, name), getattr(other, name))


def test_two_texts_of_an_entry_are_a_pair(tmp_path, tiny_processor):
    choices = tuple(
        Choice(choice_id=answer, question="which shade?", answers=(answer,))
        for answer in ("grey", "dark")
    )
    folder = write_set(tmp_path / "set", {"train": [caption_record(1, entries=choices)]}, CHOICES)
    images = PreparedImages(
        DataConfig(folders=(str(folder),)), "train", tiny_processor, schema=CHOICES
    )
    batch = EntryDataset(images, ClassEncoder(("a", "b")))[BatchKey((1, 0), 0)]
    expected = tiny_processor.pair_ids([("which shade?", "dark"), ("which shade?", "grey")])
    assert batch.input_ids.tolist() == tiny_processor.pad(expected).input_ids.tolist()
    assert batch.labels is None


def test_a_label_that_is_no_class(entry_images):
    examples = EntryDataset(
        entry_images("snli-ve"), ClassEncoder(("neutral", "entailment")), labelled=True
    )
    first, entry = next(pair for pair in enumerate(examples) if pair[1]["label"] == "contradiction")
    message = f"statement {entry['statement_id']} has the label 'contradiction'; the model's head has the classes n"
    with pytest.raises(ValueError, match=message):
        examples[BatchKey((first,), 0)]


class TestImages:
    """Of which splits and sets, and the second one of a pair."""

    @pytest.mark.parametrize("cache", [False, True])
    def test_both_of_a_pair(self, entry_images, tiny_processor, cache):
        images = entry_images(cache=cache)
        (row,) = images.examples([3])
        contents = [png_of_colour(colour) for colour in (COLOUR_NAMES[3], COLOUR_NAMES[2])]
        for _ in range(2):
            assert images.contents(row["images"]) == contents
            assert all(
                map(torch.equal, images.pixels(row["images"]), map(tiny_processor.resize, contents))
            )
        views = images.views(row["images"], torch.Generator().manual_seed(0))
        assert torch.equal(views, tiny_processor.images(contents))

    def test_several_splits_and_sets_that_are_only_trained_on(
        self, entry_images, task_sets, tiny_processor
    ):
        folder = str(task_sets["nlvr2"])
        splits = ("train", "validation")
        both = entry_images("nlvr2", splits, train_only=(folder,), repeats=(1, 3))
        assert both.num_examples == 13 + 8
        assert both.examples([8])[0]["id"] == "validation-0-0"
        assert both.examples(range(21)) == list(both.scan())
        rows = both.examples(range(13, 21))
        assert [row["entry"] for row in rows] == [row["entry"] for row in both.examples(range(8))]
        assert both.contents(rows[0]["images"]) == both.contents(both.examples([0])[0]["images"])
        assert both.with_repeats(torch.arange(21)).bincount().tolist() == [1] * 13 + [3] * 8
        assert both.sets_of(torch.tensor([0, 12, 13, 20])).tolist() == [0, 0, 1, 1]
        digest = read_info(folder).digest
        assert both.digests() == {
            f"{folder} (train, validation)": digest,
            f"{folder} (train)": digest,
        }
        evaluated = PreparedImages(
            both.config.as_evaluated(), "validation", tiny_processor, schema=SCHEMAS["nlvr2"]
        )
        assert evaluated.num_examples == 5

    def test_with_a_cache_examples_are_read_once(self, entry_images, monkeypatch):
        plain, cached = (entry_images(count=2, cache=cache) for cache in (False, True))
        numbers = [3, plain.num_examples - 1, 0, 3]
        expected = plain.examples(numbers)
        assert cached.examples(numbers[:1]) == expected[:1]
        for dataset in cached.sets:
            monkeypatch.setattr(dataset, "examples", None)
            monkeypatch.setattr(dataset, "scan", None)
        assert cached.examples(numbers) == expected

    def test_of_another_kind(self, task_sets, tiny_processor):
        with pytest.raises(ValueError, match=r"is a set of kind nlvr2; use a set of kind vqa"):
            PreparedImages(
                DataConfig(folders=(str(task_sets["nlvr2"]),)),
                "train",
                tiny_processor,
                schema=SCHEMAS["vqa"],
            )


def choice(question, *answers):
    return Choice(choice_id="1", question=question, answers=answers)


def test_no_such_schema():
    with pytest.raises(ValueError, match="no schema called 'boxes'; there are captions, vqa"):
        schema_named("boxes")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dev-850-2-1", "dev-850-1"),
        ("test1-0-0-0", "test1-0-0"),
        ("dev-850-2", None),
        ("dev-850-2#1", None),
    ],
)
def test_the_sentence_of_an_identifier(name, sentence):
    assert nlvr2_sentence(name) == sentence


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("a dog", None),
        ("", "caption is empty"),
        (" a", "caption has spaces at its ends"),
        ("half \ud83d", "caption is not valid Unicode"),
        (Question(question_id=7, question=" Why? "), None),
        (Question(question_id=7, question=" \n"), "question 7 is empty"),
        (
            Question(question_id=7, question="Why?", answers=("so", "\ud83d")),
            "question 7 is not valid Unicode",
        ),
        (Statement(statement_id="x", text="a"), None),
        (Statement(statement_id="x", text=""), "statement 'x' is empty"),
        (Statement(statement_id="x", text="a "), "statement 'x' has spaces at its ends"),
        (Statement(statement_id="", text="a"), "statement '' has no identifier"),
        (Statement(statement_id="x", text="\udc00"), "statement 'x' is not valid Unicode"),
        (
            Statement(statement_id="x", text="a", label="True"),
            "statement 'x' has the label 'True', expected one of contradiction, neutral, entailment",
        ),
        (choice("what?", "a dog", "a cat"), None),
        (choice("what?", "a dog", " "), "choice '1' has an empty text"),
        (choice("", "a dog"), "choice '1' has an empty text"),
        (choice("what?", "a dog", "a cat "), "choice '1' has spaces at its ends"),
        (choice("what?", "a dog", "\ud83d"), "choice '1' is not valid Unicode"),
    ],
)
def test_what_cannot_be_used(entry, problem):
    schema = {str: CAPTIONS, Question: VQA, Statement: SNLI_VE, Choice: CHOICES}[type(entry)]
    assert schema.problem_of(entry) == problem


def test_texts_of_several_fields():
    entry = choice("what?", "a dog", "a cat")
    assert CHOICES.texts_of(entry) == CHOICES.texts_of(vars(entry)) == ["what?", "a dog", "a cat"]


def test_an_entry_of_another_type():
    assert VQA.problem_of("a dog") == "question is a str, expected a Question"
