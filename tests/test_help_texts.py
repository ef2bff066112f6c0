"""The help of every command states one default for an option, and names what is given."""

import dataclasses
import re

import pytest

from bridgetower import cli
from bridgetower.cli.use import UseOptions
from helpers.contracts import check_contract

COMMANDS = [*((name,) for name in cli.COMMANDS), ("train", "retrieval-coco")]
COMMANDS += [("prepare", name) for name in ("pairs", "vqa", "coco", "arrow")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_states_one_default_and_names_what_is_given(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "129")  # the widest that is one column
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    usage = text.splitlines()[0]
    entries = re.split(r"\n(?=\W*(?:--[a-z]|[A-Z\[]+[\] ]))", text)
    assert len(usage) < 120
    assert not re.search(r"\b(STR|PATH)\b", re.sub(r"\[--.*|--.*", "", usage)), usage
    assert re.search(r"\(default:(\s|None|\s*\)|'')*\)", text) is None
    assert [
        entry for entry in entries if len(re.findall(r"default:", entry, re.IGNORECASE)) > 1
    ] == []
    begun = re.compile(r"\W*--[a-z].*?(?: {2,}|\n\W*)(?:Of|To|In|Such|After|Its|Their)\b")
    assert [entry for entry in entries if begun.match(entry)] == []


def help_of(capsys, *words):
    """Returns the options of a help by panel, and its last line."""
    with pytest.raises(SystemExit):
        cli.main(list(words))
    text = capsys.readouterr().out
    panels = {}
    for line in text.splitlines():
        if title := re.match(r"╭─ ([\w. -]+?) ─", line):
            panels[title[1]] = []
        if option := re.match(r"│ (?:-h, )?--([\w.-]+)", line):
            panels[list(panels)[-1]].append(option[1])
    return panels, text.splitlines()[-1]


def test_options_by_panel(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    panels = {
        " ".join(command): [*help_of(capsys, *command, "--help")[0].items()] for command in COMMANDS
    }
    check_contract("help", panels)


def test_options_of_a_command_stand_before_those_of_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    panels, _ = help_of(capsys, "match", "--help")
    # All of the predictor's, none twice.
    shared = {field.name.replace("_", "-") for field in dataclasses.fields(UseOptions)}
    assert sorted(panels["model"] + panels["engine"] + panels["output"]) == sorted(shared)
    assert panels == help_of(capsys, "match", "--help-all")[0]


def test_train_shows_what_matters_and_names_the_option_for_all(capsys):
    panels, last_line = help_of(capsys, "train", "retrieval-coco", "--help")
    names = [name for panel in panels.values() for name in panel]
    assert len(names) <= 25
    all_panels, _ = help_of(capsys, "train", "retrieval-coco", "--help-all")
    num_all = sum(map(len, all_panels.values()))
    assert num_all > 140
    expected = f"{num_all - len(names)} more options: bridgetower train … --help-all"
    assert last_line == expected
