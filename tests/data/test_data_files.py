"""Files as their authors publish them: there, and what is in them."""

import hashlib
from pathlib import Path

import pytest

from bridgetower.data.files import digests_of, existing_files


def test_there_or_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert existing_files(tmp_path, ["b", "a"], "letters") == [tmp_path / "b", tmp_path / "a"]
    with pytest.raises(FileNotFoundError, match=rf"no c, d in {tmp_path}; give the folder of letters"):
        existing_files(tmp_path, ["a", "c", "d"], "letters")
    assert digests_of([tmp_path / "a"]) == {str(tmp_path / "a"): hashlib.sha256(b"a").hexdigest()}
