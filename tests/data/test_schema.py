"""What rows of each kind hold."""

import pytest

from bridgetower.data.schema import CAPTIONS, SCHEMAS, SNLI_VE, VQA, Question, Statement, nlvr2_sentence, schema_named
from rows import CHOICES, Choice


def choice(question, *answers):
    return Choice(choice_id="1", question=question, answers=answers)


def test_no_such_schema():
    with pytest.raises(ValueError, match="no schema called 'boxes'; there are captions, vqa"):
        schema_named("boxes")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("dev-850-2-1", "dev-850-1"), ("test1-0-0-0", "test1-0-0"), ("dev-850-2", None), ("dev-850-2#1", None)],
)
def test_the_sentence_of_an_identifier(name, sentence):
    assert nlvr2_sentence(name) == sentence


def test_labels_are_in_the_order_of_the_official_classes():
    assert SCHEMAS["snli-ve"].labels == ("contradiction", "neutral", "entailment")
    assert SCHEMAS["nlvr2"].labels == ("False", "True")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("a dog", None),
        ("", "caption is empty"),
        (" a", "caption has spaces at its ends"),
        ("half \ud83d", "caption is not valid Unicode"),
        (Question(question_id=7, question=" Why? "), None),
        (Question(question_id=7, question=" \n"), "question 7 is empty"),
        (Question(question_id=7, question="Why?", answers=("so", "\ud83d")), "question 7 is not valid Unicode"),
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
