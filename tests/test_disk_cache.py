"""Folders in a cache: which of them make room for others."""

import os
from pathlib import Path

from bridgetower.disk_cache import CONTENT, DiskCache


def test_what_was_not_used_for_the_longest_time_makes_room(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit=250, what="files")

    def use(name: str) -> None:
        with cache.file({"name": name}, 100, lambda path: path.write_bytes(bytes(100)) and None) as path:
            assert path.stat().st_size == 100

    def there() -> set[str]:
        return {name for name in "abc" if (cache.place({"name": name}) / "file").is_file()}

    for time, name in enumerate("ab", start=1):
        use(name)
        os.utime(cache.place({"name": name}) / CONTENT, (time, time))
    use("a")
    use("c")
    assert there() == {"a", "c"}
