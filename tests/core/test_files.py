"""Paths, names, text and files: what is written where, through what, and what is refused."""

import errno
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import names

from bitbyte import files
from bitbyte.files import (
    BitbyteError,
    check_target,
    folder_lock,
    is_stdout,
    output,
    output_folder,
    plain_only,
    read_input,
    read_text,
    replacing,
    safe_name,
    shown,
    to_json,
    user_path,
    write_atomic,
)

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX names, modes and pipes")
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
ODD = b"caf\xe9"  # Latin-1, not UTF-8


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    """As threads, or processes of two machines that have the same number."""
    with replacing(tmp_path / "x") as one:
        one.write(b"1" * 50)
        with replacing(tmp_path / "x") as two:
            two.write(b"2" * 100)
        assert (tmp_path / "x").read_bytes() == b"2" * 100
        one.write(b"1" * 50)
    assert (tmp_path / "x").read_bytes() == b"1" * 100
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# --- names and paths


def test_home_folders_are_found_as_in_a_shell(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x" and user_path("a/~") == Path("a/~")
    assert user_path(tmp_path) == tmp_path and user_path(Path("~")) == tmp_path
    assert user_path(user_path("./~x")) == Path.cwd() / "~x"


@POSIX
@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "~nobody-of-this-name", "", "a\0b"])
def test_paths_that_mean_nothing_are_one_line(name):
    with pytest.raises(BitbyteError) as error:
        user_path(name)
    assert "\n" not in str(error.value) and "\0" not in str(error.value)


@POSIX
def test_no_home_at_all(monkeypatch):
    def nobody(*_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(BitbyteError, match="no home folder is known for ~;"):
        user_path("~/x")
    monkeypatch.setenv("BITBYTE_ARTIFACTS", "~/x")
    with pytest.raises(BitbyteError, match="no home folder"):
        files.artifacts()


def test_shown_is_one_line_of_valid_text():
    assert shown("a b\u00e9") == "a b\u00e9" and shown(Path("x")) == "x"
    assert shown("a\nb\x1b") == "a\\nb\\x1b"
    assert shown(ODD.decode("utf-8", "surrogateescape")) == "caf\\xe9"
    for half in ("\ud83d", "\udcff", "\ud800\udc80"):
        shown("x" + half).encode()


def test_safe_names_are_short_ascii_and_tell_the_words_apart():
    assert safe_name("my model", "a/b.txt", "val") == "my-model-a-b.txt-val"
    assert safe_name("..", "x", "") == "x"
    assert len(safe_name("n" * 300, "d" * 300)) <= 120 and safe_name("\u00e9" * 3) == ""


def test_json_of_names_that_are_not_utf_8_gives_them_back():
    name = ODD.decode("utf-8", "surrogateescape")
    value = {"path": name, name: ["\u00e9\U0001f600", "\ud83d"]}
    data = to_json(value)
    data.decode("utf-8")
    assert json.loads(data) == value and to_json(json.loads(data)) == data
    assert "\u00e9\U0001f600".encode() in data  # all else as before


# --- writing


@pytest.mark.parametrize("follow", [True, False])
def test_a_file_appears_whole_or_not_at_all(tmp_path, follow):
    target = tmp_path / "x"
    with pytest.raises(KeyboardInterrupt), replacing(target, follow=follow) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    target.write_bytes(b"old")
    with replacing(target, follow=follow) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old" and Path(file.name).read_bytes() == b"new"
    assert target.read_bytes() == b"new" and names(tmp_path) == ["x"]


@POSIX
@pytest.mark.parametrize("follow", [True, False])
def test_mode_of_a_replaced_file_stays(tmp_path, follow):
    target = tmp_path / "x"
    for mode in (0o600, 0o444, 0o755):
        target.touch()
        target.chmod(mode)
        with replacing(target, follow=follow) as file:
            assert (
                stat.S_IMODE(os.stat(file.name).st_mode) == mode
            )  # before there is anything in it
            file.write(b"new")
        assert stat.S_IMODE(target.stat().st_mode) == mode and target.read_bytes() == b"new"
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "new", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.skipif(not ROOT, reason="only root may give files away")
def test_owner_of_a_replaced_file_stays(tmp_path):
    target = tmp_path / "x"
    target.touch()
    os.chown(target, 12345, 23456)
    target.chmod(0o600)
    write_atomic(target, b"new")
    info = target.stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (12345, 23456, 0o600)


@POSIX
def test_links_of_the_user_are_followed_and_others_are_not(tmp_path):
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "real", tmp_path / "link"
    link.symlink_to(real)
    write_atomic(link, b"one", follow=True)  # leads nowhere yet
    assert link.is_symlink() and real.read_bytes() == b"one"
    write_atomic(link, b"two", follow=True)
    assert link.is_symlink() and real.read_bytes() == b"two" and names(real.parent) == ["real"]
    write_atomic(link, b"three")
    assert not link.is_symlink() and link.read_bytes() == b"three" and real.read_bytes() == b"two"
    lost = tmp_path / "lost"
    lost.symlink_to(tmp_path / "nowhere" / "x")
    with pytest.raises(BitbyteError, match="in a folder that does not exist"):
        write_atomic(lost, b"", follow=True)


@POSIX
def test_a_pipe_gets_the_bytes_and_stays(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_atomic(pipe, b"through", follow=True, overwrite=False)  # there is nothing to overwrite
    reader.join(30)
    assert got == [b"through"] and names(tmp_path) == ["pipe"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(BitbyteError, match="not a plain file"):
        write_atomic(pipe, b"")  # a name of ours: it would block


@pytest.mark.skipif(not ROOT, reason="only root may make devices")
@POSIX
def test_a_device_stays_a_device(tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_bytes(b"")
    except OSError:
        pytest.skip("cannot make a device here")
    write_atomic(null, b"gone", follow=True, overwrite=False)
    (tmp_path / "link").symlink_to(null)
    write_atomic(tmp_path / "link", b"gone", follow=True)
    with pytest.raises(BitbyteError, match="not a plain file"):
        write_atomic(null, b"")
    assert stat.S_ISCHR(null.stat().st_mode) and names(tmp_path) == ["link", "null"]


STDOUT = """
import sys
from pathlib import Path
from bitbyte.files import is_stdout, write_atomic
print("before")
write_atomic(Path("/dev/stdout"), b"bytes\\n", follow=True, overwrite=False)
assert is_stdout(Path("/dev/stdout")) and not is_stdout(Path(sys.argv[1]))
print("after")
"""


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no /dev/stdout here")
@pytest.mark.parametrize("into", ["pipe", "file"])
def test_standard_output_is_written_in_turn(tmp_path, into):
    path = tmp_path / "out"
    with open(path, "wb") as file:
        sink = subprocess.PIPE if into == "pipe" else file
        call = [sys.executable, "-c", STDOUT, str(tmp_path / "other")]
        said = subprocess.run(call, stdout=sink, check=True).stdout
    assert (said if into == "pipe" else path.read_bytes()) == b"before\nbytes\nafter\n"


def test_nothing_is_overwritten_unasked(tmp_path):
    target = tmp_path / "x"
    output(target, overwrite=False)
    write_atomic(target, b"mine", follow=True, overwrite=False)
    for attempt in (
        lambda: output(target, overwrite=False),
        lambda: write_atomic(target, b"", follow=True, overwrite=False),
    ):
        with pytest.raises(BitbyteError, match="exists; choose another name, or --allow_overwrite"):
            attempt()
    assert output(target, overwrite=True) == target and target.read_bytes() == b"mine"
    with (
        pytest.raises(BitbyteError, match="by another process meanwhile"),
        replacing(tmp_path / "y", overwrite=False) as file,
    ):
        file.write(b"mine")
        (tmp_path / "y").write_bytes(b"theirs")
    assert (tmp_path / "y").read_bytes() == b"theirs" and names(tmp_path) == ["x", "y"]


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for name, word in (
        (tmp_path, "is a folder"), (tmp_path / "file" / "x", "is not a folder"), ("", "empty name"),
    ):  # fmt: skip
        with pytest.raises(BitbyteError, match=word):
            output(name, overwrite=True)
    with pytest.raises(BitbyteError, match="in a folder that does not exist"):
        check_target(tmp_path / "no" / "x", overwrite=True)
    assert output(tmp_path / "a" / "b" / "x", overwrite=False).parent.is_dir()
    with pytest.raises(BitbyteError, match="is not a folder"):
        output_folder(tmp_path / "file")
    if os.name != "nt":
        with pytest.raises(OSError, match="too long"):
            output(tmp_path / ("n" * 256), overwrite=False)


@pytest.mark.parametrize(
    "name", ["n" * 255, "\u00e9" * 127, "\U0001f600" * 63, "n" * 119 + "\u00e9"]
)
def test_names_may_be_as_long_as_the_system_allows(tmp_path, name):
    target = tmp_path / name
    try:
        target.touch()
        target.unlink()
    except OSError:
        pytest.skip("this file system has shorter names")
    write_atomic(target, b"x")
    with replacing(target) as file:
        short = Path(file.name).name
        assert len(short.encode()) < 143 and short.startswith(".tmp-")
    assert names(tmp_path) == [name]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_of_any_bytes(tmp_path):
    target = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + ODD))
    write_atomic(target, b"x")
    write_atomic(target, b"y", follow=True)
    assert os.listdir(os.fsencode(tmp_path)) == [ODD] and target.read_bytes() == b"y"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, code):
    def full(handle):
        raise OSError(code, os.strerror(code))

    target = tmp_path / "x"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="nothing was written") as error:
        write_atomic(target, b"new")
    assert error.value.filename == str(target) and error.value.errno == code
    assert target.read_bytes() == b"old" and names(tmp_path) == ["x"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_device_has_a_name_too():
    with pytest.raises(OSError, match="No space") as error:
        write_atomic(Path("/dev/full"), b"x", follow=True)
    assert error.value.filename == "/dev/full" and "nothing was written" not in str(error.value)


def test_errors_of_the_work_itself_pass(tmp_path):
    with pytest.raises(FileNotFoundError) as error, replacing(tmp_path / "x"):
        open(tmp_path / "absent", "rb")  # noqa: SIM115
    assert error.value.filename == str(tmp_path / "absent") and names(tmp_path) == []


# --- folders of strangers


@POSIX
@pytest.mark.parametrize("there", [True, False])
def test_a_lock_that_is_a_link_harms_no_file(tmp_path, there):
    precious, run = tmp_path / "precious", tmp_path / "run"
    if there:
        precious.write_text("my thesis")
    run.mkdir()
    (run / ".lock").symlink_to(precious)
    with pytest.raises(BitbyteError, match=r"\.lock is a link"), folder_lock(run):
        pass
    assert precious.read_text() == "my thesis" if there else not precious.exists()


@POSIX
def test_a_link_put_there_in_the_last_moment(tmp_path, monkeypatch):
    """Between the look and the opening: the system refuses."""
    (tmp_path / "precious").write_text("my thesis")
    (tmp_path / "x").symlink_to(tmp_path / "precious")
    monkeypatch.setattr(os.path, "islink", lambda _: False)
    with pytest.raises(OSError):  # noqa: PT011
        open(tmp_path / "x", "w", opener=plain_only)  # noqa: SIM115
    assert (tmp_path / "precious").read_text() == "my thesis"


@POSIX
@pytest.mark.parametrize("mode", ["rb", "ab", "r+b"])
def test_a_pipe_where_a_file_of_ours_should_be_does_not_block(tmp_path, mode):
    os.mkfifo(tmp_path / "x")
    with pytest.raises((BitbyteError, OSError)):
        open(tmp_path / "x", mode, opener=plain_only)  # noqa: SIM115


# --- reading


def test_input_is_a_file_or_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\0")
    assert read_input(str(tmp_path / "x"), limit=1) == b"\xff\0"
    for name, word in (
        (tmp_path, "is a folder"),
        (tmp_path / "no", "there is no file"),
        ("", "empty"),
    ):
        with pytest.raises(BitbyteError, match=word):
            read_input(name)


@POSIX
def test_input_may_be_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for limit in (5, 4):
        writer = threading.Thread(target=lambda: pipe.write_bytes(b"hello"))
        writer.start()
        if limit == 5:
            assert read_input(str(pipe), limit) == b"hello"
        else:
            with pytest.raises(BitbyteError, match="gave more than 4 bytes"):
                read_input(str(pipe), limit)
        writer.join(30)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_input_without_an_end_is_refused():
    with pytest.raises(BitbyteError, match="gave more than 1,000 bytes"):
        read_input("/dev/zero", 1000)


def test_input_from_standard_input():
    code = "from bitbyte.files import read_input; print(read_input('-'))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=b"a\xff", capture_output=True, check=True
    )
    assert done.stdout.strip() == rb"b'a\xff'"


def test_text_keeps_its_line_ends_and_says_where_it_is_none(tmp_path):
    path = tmp_path / "x.md"
    path.write_bytes("\ufeffa\r\nb\rc\n\u00e9".encode())
    assert read_text(path) == "\ufeffa\r\nb\rc\n\u00e9"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(BitbyteError, match=r"x\.md is not UTF-8 text: byte 0xe9 at 3; save it"):
        read_text(path)


def test_is_stdout_of_what_is_not_there(tmp_path):
    assert not is_stdout(tmp_path / "x")
