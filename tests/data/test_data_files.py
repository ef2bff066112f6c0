"""Files as their authors publish them: there, and what is in them."""

from pathlib import Path

import pytest

from bridgetower.data.single_tower import existing_files


def test_there_or_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert existing_files(tmp_path, "alphabet", ["b", "a"], "letters") == [tmp_path / "b", tmp_path / "a"]
    with pytest.raises(FileNotFoundError, match=rf"no c, d in {tmp_path}; give the folder of letters"):
        existing_files(tmp_path, "alphabet", ["a", "c", "d"], "letters")
    (tmp_path / "alphabet").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"no a in {tmp_path}/alphabet; give the folder of letters"):
        existing_files(tmp_path, "alphabet", ["a"], "letters")
