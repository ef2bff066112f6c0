"""An atomic write leaves the old content or the new, whatever fails. It leaves no part and no temporary file."""

import errno
import fcntl
import json
import math
import os
import pickle
import shutil
import signal
import stat
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from bridgetower import files
from bridgetower.files import (
    NotWrittenError,
    cache_folder,
    differences,
    intended_name,
    json_text,
    locked,
    new_folder,
    one_line,
    read_json,
    remove_leftovers,
    replacing,
    require_parent,
    require_space,
    shortened,
    unfit_name,
    visible,
    write_bytes,
    write_json,
    write_text,
    writing,
)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail(path, error):
    path.write_bytes(b"half of the n")
    raise error


@contextmanager
def child(work):
    """A process that does some work, tells so, and lives on until it is killed in the end."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        work()
        os.write(writing, b"held")
        time.sleep(60)
    try:
        assert os.read(reading, 4) == b"held"
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


class TestReplacing:
    def test_new_content_appears_only_at_the_end(self, tmp_path):
        path = tmp_path / "deep" / "er" / "a.bin"
        with replacing(path) as temporary:
            assert temporary.parent.parent == path.parent
            assert temporary.name == "a.bin"
            (temporary.parent / ".tmpOfALibrary").write_bytes(b"half")
            temporary.write_bytes(b"new")
            assert not path.exists()
        assert contents(path.parent) == {"a.bin": b"new"}

    @pytest.mark.parametrize(
        "error", [NotImplementedError(), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")]
    )
    def test_an_error_leaves_the_old_file_and_no_temporary(self, tmp_path, error):
        write_bytes(tmp_path / "a.bin", b"old")
        with pytest.raises(type(error)), replacing(tmp_path / "a.bin") as temporary:
            fail(temporary, error)
        (tmp_path / "a").mkdir()
        with pytest.raises(OSError, match="directory"):
            write_bytes(tmp_path / "a", b"new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.bin"]
        assert (tmp_path / "a.bin").read_bytes() == b"old"

    def test_what_other_programs_use_by_its_name_stays(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "redirected").write_bytes(b"old")
        with (tmp_path / "redirected").open() as file:
            (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{file.fileno()}")  # as /dev/stdout is
            (tmp_path / "null").symlink_to("/dev/null")
            for name in ("pipe", "stdout", "null"):
                with pytest.raises(
                    FileExistsError, match=f"/{name} is a device, a pipe or an open file; give"
                ):
                    write_bytes(tmp_path / name, b"new")
            assert (tmp_path / "pipe").is_fifo()
            assert (tmp_path / "stdout").read_bytes() == b"old"

    @pytest.mark.parametrize(
        "mode", [0o666, 0o600], ids=["", "private, as some libraries make them"]
    )
    def test_permissions_are_those_of_an_ordinary_file(self, tmp_path, mode, monkeypatch):
        """The umask is the whole process's: to ask for it is to set it, and other threads go on meanwhile."""
        umask = os.umask
        before = umask(0o002)
        monkeypatch.setattr(os, "umask", Mock(side_effect=AssertionError))
        try:
            with replacing(tmp_path / "a") as temporary:
                os.close(os.open(temporary, os.O_CREAT, mode))
            with new_folder(tmp_path / "b"):
                pass
        finally:
            assert umask(before) == 0o002
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o664

    def test_content_is_on_the_disk_before_it_gets_its_name(self, tmp_path, monkeypatch):
        path = tmp_path / "a"
        synced = []
        real = os.fsync

        def fsync(descriptor):
            synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        write_bytes(path, b"new")
        (temporary, had_name), (folder, renamed) = synced
        assert temporary.parent.parent == tmp_path
        assert (had_name, renamed) == (False, True)
        assert folder == tmp_path


class TestNewFolder:
    def test_appears_as_a_whole(self, tmp_path):
        path = tmp_path / "deep" / "a"
        with new_folder(path) as temporary:
            write_text(temporary / "b", "new")
            assert not path.exists()
        assert contents(path) == {"b": b"new"}
        assert [entry.name for entry in path.parent.iterdir()] == ["a"]
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode)

    def test_takes_an_empty_folder_and_no_other(self, tmp_path):
        with pytest.raises(NotImplementedError), new_folder(tmp_path / "a") as temporary:
            fail(temporary / "b", NotImplementedError())
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "a").mkdir()
        with new_folder(tmp_path / "a") as temporary:
            write_text(temporary / "b", "new")
        with pytest.raises(FileExistsError, match="is not empty"), new_folder(tmp_path / "a"):
            pass
        assert contents(tmp_path / "a") == {"b": b"new"}

    @pytest.mark.parametrize("is_there", [True, False], ids=["empty", "missing"])
    def test_a_link_to_an_empty_or_a_missing_folder(self, tmp_path, is_there):
        disk = tmp_path / "disk"
        disk.mkdir()
        if is_there:
            (disk / "a").mkdir()
        (tmp_path / "link").symlink_to(disk / "a")
        with new_folder(tmp_path / "link") as temporary:
            assert temporary.is_relative_to(disk), "it is renamed within a disk"
            write_text(temporary / "b", "new")
        assert (tmp_path / "link").is_symlink()
        assert contents(disk / "a") == contents(tmp_path / "link") == {"b": b"new"}

    def test_of_two_at_once_the_first_stays(self, tmp_path):
        path = tmp_path / "a"
        with (
            pytest.raises(FileExistsError, match="is not empty"),
            new_folder(path),
            new_folder(path) as temporary,
        ):
            write_text(temporary / "first", "new")
        assert contents(tmp_path / "a") == {"first": b"new"}

    def test_the_working_directory_and_mount_points(self, small_disk, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        with new_folder(Path()) as temporary:
            write_text(temporary / "b", "new")
        assert contents(tmp_path / "here") == {"b": b"new"}
        with (
            pytest.raises(FileExistsError, match="give the name of a folder in it"),
            new_folder(small_disk(64)),
        ):
            pass


class TestJson:
    def test_round_trip(self, tmp_path):
        name = os.fsdecode(b"caf\xe9 \\udce9.png")  # is not UTF-8, and comes back whole
        write_json(tmp_path / "a.json", {name: ["größer", 1, None]})
        assert (tmp_path / "a.json").read_bytes().decode().count(r"caf\udce9 \\udce9.png") == 1
        assert read_json(tmp_path / "a.json") == {name: ["größer", 1, None]}
        write_json(tmp_path / "a.json", {"ä": [1, "b"]})
        text = '{\n  "ä": [\n    1,\n    "b"\n  ]\n}\n'
        assert (tmp_path / "a.json").read_text(encoding="utf-8") == text
        with pytest.raises(TypeError):
            write_json(tmp_path / "a.json", {"a": object()})
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(FloatingPointError, match="NaN or infinite"):
                write_json(tmp_path / "a.json", {"a": [{"b": value}]})
        assert contents(tmp_path) == {"a.json": text.encode()}
        with pytest.raises(FileNotFoundError, match=r"no file .*x\.json"):
            read_json(tmp_path / "x.json")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            *(
                (content, "is not valid JSON")
                for content in (b"", b"{", b"{'a': 1}", b"\xff\xfe", b'{"a": 1} x')
            ),
            *(
                (content, "nested too deep")
                for content in (b"[" * 10**6, b'{"a":' * 10**6 + b"1" + b"}" * 10**6)
            ),
            *((content, "expected a JSON object") for content in (b"[]", b"3", b"null", b'"a"')),
        ],
    )
    def test_what_is_no_object(self, tmp_path, content, message):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\.json .*{message}"):
            read_json(tmp_path / "x.json")


class TestLeftovers:
    @pytest.fixture
    def killed(self, tmp_path):
        """Lets a process write something half."""

        def call(name):
            written = replacing(tmp_path / name)

            def write():
                temporary = written.__enter__()
                temporary.write_bytes(b"half")
                (temporary.parent / ".tmpOfALibrary").write_bytes(b"half")

            with child(write):
                pass

        return call

    def test_are_removed_and_nothing_else(self, tmp_path, killed):
        write_bytes(tmp_path / "a.bin", b"old")
        (tmp_path / ".hidden").write_bytes(b"mine")
        killed("a.bin")
        remove_leftovers(tmp_path, "[a].bin")
        assert len(list(tmp_path.iterdir())) == 3
        remove_leftovers(tmp_path, "a.bin")
        remove_leftovers(tmp_path / "missing")
        assert contents(tmp_path) == {"a.bin": b"old", ".hidden": b"mine"}

    def test_what_is_being_written_stays(self, tmp_path):
        with replacing(tmp_path / "a") as temporary:
            temporary.write_bytes(b"new")
            remove_leftovers(tmp_path)
        with new_folder(tmp_path / "b"), new_folder(tmp_path / "c"):
            remove_leftovers(tmp_path)
        assert (tmp_path / "a").read_bytes() == b"new"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]

    def test_are_removed_by_the_next_one_that_writes_it(self, tmp_path, killed):
        killed("model")
        with new_folder(tmp_path / "model") as temporary:
            assert list(tmp_path.iterdir()) == [temporary.parent]
        killed("map.png")
        require_parent(tmp_path / "map.png")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_name_that_a_temporary_folder_stands_for(tmp_path):
    with replacing(tmp_path / "run.json") as temporary:
        temporary.write_text("{}")
        assert intended_name(temporary.parent) == "run.json" != temporary.parent.name
    for name in ("run.json", ".lock", "a.partial-b"):
        assert intended_name(tmp_path / name) == name


class TestLock:
    def test_one_at_a_time(self, tmp_path):
        (tmp_path / "a").symlink_to(tmp_path / "b")
        message = r"/a is a link to .*/b, which is not there; make that folder"
        with pytest.raises(FileNotFoundError, match=message), locked(tmp_path / "a"):
            pytest.fail("held")
        with locked(tmp_path / "new"):
            with (
                pytest.raises(FileExistsError, match="another process works in"),
                locked(tmp_path / "new"),
            ):
                pytest.fail("held twice")
            with locked(tmp_path / "other"):
                pass
        with pytest.raises(NotImplementedError), locked(tmp_path / "new"):
            raise NotImplementedError
        with locked(tmp_path / "new"):
            pass

    def test_is_let_go_by_a_killed_process_but_not_for_its_children(self, tmp_path):
        held = locked(tmp_path)
        with (
            child(held.__enter__),
            pytest.raises(FileExistsError, match="another process"),
            locked(tmp_path),
        ):
            pytest.fail("held twice")
        with ExitStack() as stack:
            with locked(tmp_path):
                stack.enter_context(child(lambda: None))  # lives on
            with locked(tmp_path):
                pass

    def test_of_a_folder_that_was_removed_while_waiting_is_taken_anew(self, tmp_path):
        folder = tmp_path / "a"
        held = locked(tmp_path / "a", wait=True)
        reading = threading.Event()
        with ExitStack() as stack:
            with locked(folder):
                waiting = threading.Thread(
                    target=lambda: (stack.enter_context(child(held.__enter__)), reading.set())
                )
                waiting.start()
                time.sleep(0.3)  # it waits for the lock, in a file that is removed now
                assert not reading.is_set()
                shutil.rmtree(folder)
            waiting.join()
            with pytest.raises(FileExistsError, match="another process"), locked(folder):
                pytest.fail("held twice")

    def test_who_waits_says_so(self, tmp_path, caplog):
        held = locked(tmp_path)
        with ExitStack() as stack, caplog.at_level("INFO"):
            stack.enter_context(child(held.__enter__))
            threading.Timer(0.2, stack.close).start()
            with locked(tmp_path, wait=True):
                assert f"another process works in {tmp_path}; waiting for it" in caplog.text

    def test_where_there_are_no_locks(self, tmp_path, monkeypatch):
        for number in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            error = OSError(number, os.strerror(number))
            monkeypatch.setattr(fcntl, "flock", Mock(side_effect=error))
            with pytest.raises(
                OSError, match=r"cannot be locked .* has no flock; mount it with locks"
            ) as caught:
                locked(tmp_path).__enter__()
            assert caught.value.errno == number
        monkeypatch.setattr(files, "fcntl", None)
        with locked(tmp_path / "new"), locked(tmp_path / "new"):
            write_text(tmp_path / "new" / "a", "new")


@pytest.mark.parametrize("write", [locked, new_folder, replacing])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\0b", r"'a\\x00b' has a zero character; give another path"),
        ("a\ud800", r"'a\\ud800' is not UTF-8; give another path"),
        ("x" * 100_000, "x{60}… has more than 1020 bytes between slashes; give another path"),
        ("s3://bucket/set", "s3://bucket/set is a URL; give a path on this machine"),
        (Path("s3://bucket/set"), "s3:/bucket/set is a URL; give a path on this machine"),
        ("/proc/x", r"/proc/x could not be written \(.*\); choose another name"),
        ("file/x", r"file/x could not be written \(.*\); choose another name"),
    ],
)
def test_what_no_file_can_be_called_is_refused_in_a_line(
    tmp_path, monkeypatch, write, name, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises((ValueError, OSError), match=f"^(.*/)?{message}$"), write(name):
        pytest.fail("it was written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_only_read(small_disk):
    disk = small_disk(64)
    write_bytes(disk / "a", b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    writes = [
        ("a", lambda path: write_bytes(path, b"new")),
        ("b", lambda path: new_folder(path).__enter__()),
        ("c", lambda path: locked(path).__enter__()),
    ]
    for name, write in writes:
        message = rf"^{disk / name} could not be written \(Read-only file system\); choose a folder"
        with pytest.raises(OSError, match=message):
            write(disk / name)
    assert contents(disk) == {"a": b"old"}


@pytest.mark.parametrize(
    ("folder", "setting"),
    [
        ("features/ab", "feature_cache"),
        ("evaluations", "work"),
        ("ab-onnx", "cache"),
        ("", "cache"),
        ("..", None),
    ],
)
def test_what_puts_a_cache_elsewhere_is_named(folder, setting):
    error = NotWrittenError(
        (cache_folder() / folder).resolve(), "Read-only file system", errno.EROFS
    )
    advice = str(error).partition("; ")[2]
    where = f" by {setting}=FOLDER or XDG_CACHE_HOME" if setting else ""
    assert advice == f"choose a folder that you may write to{where}"


def test_differences_have_dotted_names_where_both_sides_have_parts():
    before = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": None, "g": {"h": 4}, "gone": 5}
    now = {"a": 1, "b": {"c": 6, "d": {"e": 3}}, "f": {"h": 4}, "g": None, "new": 7}
    assert list(differences(before, now)) == [
        ("b.c", 2, 6),
        ("f", None, {"h": 4}),
        ("g", {"h": 4}, None),
        ("new", None, 7),
    ]


def test_the_folder_of_a_file_must_be_there(tmp_path):
    require_parent(tmp_path / "a")
    with pytest.raises(
        FileNotFoundError, match=r"/no/a cannot be written: .*/no is no folder; make it, or choose"
    ):
        require_parent(tmp_path / "no" / "a")


def test_names_that_cannot_be_stored():
    assert unfit_name("ä b.png") is None
    assert unfit_name("") == "it has no name"
    assert unfit_name("a\0b") == "the name 'a\\x00b' has a zero character, which no file's name has"
    assert unfit_name("a\udcff") == "the name 'a\\udcff' is not UTF-8; rename the file"


def test_a_long_message_loses_its_middle():
    assert shortened("a" * 4000) == "a" * 4000
    assert shortened("a" * 2000 + "b" + "c" * 2000) == f"{'a' * 2000} … {'c' * 2000}"


class TestFullDisk:
    def test_bytes(self, small_disk):
        disk = small_disk(256)
        write_bytes(disk / "a", b"o" * 100_000)
        message = (
            rf"^{disk}/a could not be written \(No space left on device\); make room on the disk$"
        )
        with pytest.raises(OSError, match=message) as caught:
            write_bytes(disk / "a", b"n" * 200_000)
        assert caught.value.errno == errno.ENOSPC
        # it may come from another process
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert contents(disk) == {"a": b"o" * 100_000}
        write_bytes(disk / "a", b"n" * 100_000)
        assert contents(disk) == {"a": b"n" * 100_000}

    def test_a_folder_is_named_as_it_was_to_be_called(self, small_disk):
        disk = small_disk(256)
        message = rf"^{disk}/a could not be written \(No space left on device\); make"
        with pytest.raises(OSError, match=message), new_folder(disk / "a") as temporary:
            write_bytes(temporary / "b", b"n" * 300_000)
        assert contents(disk) == {}

    def test_an_error_of_a_library_is_its_first_line(self, tmp_path):
        message = r"/a could not be written \(lance: full\); make room"
        with (
            pytest.raises(NotWrittenError, match=message),
            writing(tmp_path / "a", (RuntimeError,)),
        ):
            raise RuntimeError("lance: full\nat line 7")

    def test_other_errors_stay_as_they_are(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="missing"), replacing(tmp_path / "a"):
            (tmp_path / "missing").read_bytes()

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_wherever_the_disk_is_found_full(self, tmp_path, monkeypatch, call):
        write_bytes(tmp_path / "a", b"old")

        monkeypatch.setattr(
            os, call, Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        )
        with pytest.raises(OSError, match=r"/a could not be written \(No space left"):
            write_bytes(tmp_path / "a", b"new")
        monkeypatch.undo()
        assert contents(tmp_path) == {"a": b"old"}


def test_space_is_required_before_something_is_written(small_disk):
    disk = small_disk(64)
    require_space(disk, 2**15, "some files")
    with pytest.raises(
        OSError,
        match=r"some files take 3\.0 GiB, but the disk of .* has 0\.0 GiB left; make room or",
    ):
        require_space(disk, 3 * 2**30, "some files")


def test_all_the_space_that_is_left_may_be_taken_and_no_byte_more(monkeypatch, tmp_path):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**32, 2**31, 2**31)
    )
    require_space(tmp_path, 2**31, "some files")
    with pytest.raises(OSError, match=r"take 2\.0 GiB, but the disk of .* has 2\.0 GiB left"):
        require_space(tmp_path, 2**31 + 1, "some files")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "bridgetower"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "bridgetower"


HOSTILE = "a\x1b]0;owned\x07\x9b2J\u202egnp.exe\u2028\r\x7f\x00"
SHOWN = r"a\u001b]0;owned\u0007\u009b2J\u202egnp.exe\u2028\u000d\u007f\u0000"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HOSTILE, SHOWN),
        (
            "plain \u00e9 \u72ac\t\U0001f415\u200d\U0001f9ba",
            "plain \u00e9 \u72ac\t\U0001f415\u200d\U0001f9ba",
        ),
        ("\udcff", r"\udcff"),
    ],
)
def test_what_is_not_seen_is_made_visible(text, expected):
    assert visible(text) == one_line(text) == expected
    assert (visible("a\nb"), one_line("a\nb")) == ("a\nb", r"a\nb")


def test_json_shows_it_and_is_the_same():
    written = json_text({HOSTILE: [HOSTILE]})
    assert json.loads(written) == {HOSTILE: [HOSTILE]}
    assert visible(written) == written


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, synced):
    write_bytes(tmp_path / "a", b"new")
    (file, _), (folder, names) = synced
    assert (file.name, file.parent.parent, file.parent.exists()) == ("a", tmp_path, False)
    assert folder == tmp_path
    assert "a" in names


def test_the_folder_of_a_new_folder_is_synced_after_it_is_renamed(tmp_path, synced):
    with new_folder(tmp_path / "a") as folder:
        write_text(folder / "b", "text")
        written = len(synced)
    assert [path for path, _ in synced[written:]] == [tmp_path]
    assert "a" in synced[-1][1]
