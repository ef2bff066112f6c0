"""The help of every command states one default for an option, and names what is given."""

import re

import pytest

from bridgetower import cli

COMMANDS = [*((name,) for name in cli.COMMANDS), ("train", "retrieval-coco")]
COMMANDS += [("prepare", name) for name in ("pairs", "vqa", "coco", "arrow")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_states_one_default_and_names_what_is_given(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "129")  # the widest that is one column
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    usage, entries = text.splitlines()[0], re.split(r"\n(?=\W*(?:--[a-z]|[A-Z\[]+[\] ]))", text)
    assert len(usage) < 120
    assert not re.search(r"\b(STR|PATH)\b", re.sub(r"\[--.*|--.*", "", usage)), usage
    assert re.search(r"\(default:(\s|None|\s*\)|'')*\)", text) is None
    assert [
        entry for entry in entries if len(re.findall(r"default:", entry, re.IGNORECASE)) > 1
    ] == []
    begun = re.compile(r"\W*--[a-z].*?(?: {2,}|\n\W*)(?:Of|To|In|Such|After|Its|Their)\b")
    assert [entry for entry in entries if begun.match(entry)] == []
