"""Files and folders without a model: round trips, damage, archives, streams, kills, full disks."""

import io
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FOX, ROOT, until, words
from test_mixer import samples, wav

from bitbyte.cli.dispatch import main
from bitbyte.compress import archive, container, frames, mixed, segments
from bitbyte.compress.mixer import codec, fast
from bitbyte.files import BitbyteError

pytestmark = pytest.mark.skipif(fast.problem() is not None, reason="plain Python takes minutes")
TEXT = words(150)
CASES = {
    "empty": b"", "one": b"x", "zeros": bytes(5000), "all": bytes(range(256)), "text": TEXT,
    "noise": random.Random(0).randbytes(3000), "wav": wav(samples(2000).tobytes()),
    "odd wav": wav(samples(1200).tobytes() + b"x", claimed=99999) + b"tail",
    "stereo 8 bit": wav(random.Random(1).randbytes(801), 2, 8),
    "24 bit": wav(random.Random(2).randbytes(900), 1, 24), "only a header": wav(b""),
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """source, packed, back: paths; the first holds TEXT."""
    paths = [tmp_path / name for name in ("source", "packed", "back")]
    paths[0].write_bytes(TEXT)
    return paths


def round_trip(data: bytes, folder: Path, **options) -> mixed.Done:
    source, packed, back = (folder / name for name in ("s", "p", "b"))
    source.write_bytes(data)
    done = mixed.compress([source], packed, allow_overwrite=True, **options)
    mixed.decompress(packed, back, allow_overwrite=True)
    assert back.read_bytes() == data
    assert (done.size, done.original) == (packed.stat().st_size, len(data))
    return done


@pytest.mark.parametrize("name", CASES)
def test_files_of_all_kinds(name, tmp_path):
    done = round_trip(CASES[name], tmp_path)
    assert done.size <= len(CASES[name]) + 60
    assert mixed.verify(tmp_path / "p").original == len(CASES[name])


@pytest.mark.parametrize("tail", [0, 1, 3])
@pytest.mark.parametrize("claimed", [None, 7, 10**9])
def test_sound_with_odd_tails_and_false_headers(tail, claimed, tmp_path):
    """16 bits stereo, and 24 bits mono: a header may lie about what follows, or be cut off."""
    data = samples(120).tobytes() + b"xyz"[:tail]
    for channels, bits in ((2, 16), (1, 24), (2, 8)):
        file = wav(data, channels, bits, claimed)
        for made in (file, file + b"LISTtail", file[: 40 + tail], file[:43] + file[44:]):
            round_trip(made, tmp_path)


@given(st.binary(max_size=80))
@settings(max_examples=40, deadline=None)
def test_any_short_file(tmp_path_factory, data):
    assert round_trip(data, tmp_path_factory.mktemp("any")).size <= len(data) + 45


def test_sizes_0_to_3(tmp_path):
    for data in (b"", b"\0", b"\xff", b"ab", b"aa", b"\0\0\0", b"abc", b"\xff\0\xff"):
        assert round_trip(data, tmp_path).size <= 45 + len(data)


def test_random_data_hardly_grows(tmp_path):
    n = 3 << 20
    frame = segments.FRAME
    source = tmp_path / "s"
    source.write_bytes(random.Random(0).randbytes(1 << 16))
    done = mixed.compress([source], tmp_path / "p")
    # Each further frame of 1 MiB costs as much as the first: kind, length, shape, checksum.
    per_frame = done.size - (1 << 16) - 13 - 17
    assert per_frame <= 12 and (13 + 17 + per_frame * n // frame) / n <= 1e-4


def test_the_header_is_short(files):
    source, packed, _ = files
    source.write_bytes(b"")
    assert 25 <= mixed.compress([source], packed).size <= 45


def test_memory_scales_and_the_decoder_follows(files, tmp_path):
    for memory in (16, 64):
        assert round_trip(TEXT, tmp_path, memory=memory).size < len(TEXT) / 2
    for memory in (0, 15, 1025):
        with pytest.raises(BitbyteError, match="between 16 and 1024"):
            mixed.compress([files[0]], tmp_path / "q", memory=memory)


def damaged(packed: Path, data: bytes) -> str:
    """The error that a changed file gives.  It must never give a wrong result without one."""
    back = packed.with_name("wrong")
    packed.write_bytes(data)
    with pytest.raises(BitbyteError) as error:
        mixed.decompress(packed, back)
    assert not back.exists()
    return str(error.value)


def test_cut_off_anywhere(files):
    source, packed, _ = files
    source.write_bytes(TEXT[:300])
    mixed.compress([source], packed)
    whole = packed.read_bytes()
    for n in range(len(whole)):
        assert "cut off" in damaged(packed, whole[:n]) or n < 8 or n == 9
    assert "after its end" in damaged(packed, whole + b"\0")


def test_edits_anywhere(files):
    source, packed, _ = files
    source.write_bytes(TEXT[:300])
    mixed.compress([source], packed)
    whole, rng = packed.read_bytes(), random.Random(0)
    for i in range(len(whole)):
        edited = bytearray(whole)
        edited[i] ^= rng.randrange(1, 256)
        damaged(packed, bytes(edited))
    for _ in range(200):
        edited = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            i = rng.randrange(len(edited) + 1)
            edited[i : i + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        if edited != whole:
            damaged(packed, bytes(edited))


def test_damage_is_found_before_decoding(files, monkeypatch):
    source, packed, back = files
    mixed.compress([source], packed)
    data = bytearray(packed.read_bytes())
    data[-30] ^= 1
    packed.write_bytes(data)
    monkeypatch.setattr(codec, "Codec", None)
    with pytest.raises(BitbyteError, match="wrong checksum"):
        mixed.decompress(packed, back)


def resealed(data: bytes) -> bytes:
    """A file of one frame whose checksum is right again."""
    import zlib

    body = data[:-21]
    return body + zlib.crc32(body).to_bytes(4, "little") + data[-17:]


def test_edits_under_a_right_checksum_never_give_wrong_bytes(files):
    """Someone who mends the checksum: the coder's length or the SHA-256 tells."""
    source, packed, _ = files
    source.write_bytes(TEXT[:200])
    mixed.compress([source], packed)
    whole = packed.read_bytes()
    assert resealed(whole) == whole
    for i in range(13, len(whole) - 21, 2):
        edited = bytearray(whole)
        edited[i] ^= 1 << i % 8
        damaged(packed, resealed(bytes(edited)))


def test_other_files_are_refused(files):
    _, packed, back = files
    for data, why in (
        (b"", "is not a bitbyte"), (b"hello world, this is text", "is not a bitbyte"),
        (container.MAGIC + b"\x09\0" + bytes(40), "newer bitbyte"),
        (container.MAGIC + b"\x02\0\x08\x10\x05", "damaged"),
        (container.MAGIC + b"\x02\0\0\x30\x05", "damaged"),
        (container.MAGIC + b"\x02\0\0\x10\xff\xff\xff\xff\x7f", "damaged"),
    ):  # fmt: skip
        packed.write_bytes(data)
        with pytest.raises(BitbyteError, match=why):
            mixed.version_of(packed)
            mixed.decompress(packed, back)
    mixed.compress([files[0]], packed, allow_overwrite=True)
    with pytest.raises(BitbyteError, match="made by the mixer"):
        container.read_header(packed)
    with pytest.raises(BitbyteError, match=r"version 9.*this one reads 1 and 2"):
        container.parse_header(container.MAGIC + b"\x09\0" + bytes(99), 109, "x")
    alone = io.BytesIO(container.MAGIC + b"\x01\0" + bytes(99))
    with pytest.raises(BitbyteError, match=r"model alone.*cannot be read from a pipe: save it"):
        frames.read_header(frames.Source(alone, "standard input"))


def test_nothing_is_overwritten_unasked(files):
    source, packed, back = files
    mixed.compress([source], packed)
    with pytest.raises(BitbyteError, match="exists"):
        mixed.compress([source], packed)
    back.write_bytes(b"mine")
    with pytest.raises(BitbyteError, match="exists"):
        mixed.decompress(packed, back)
    assert back.read_bytes() == b"mine"
    mixed.decompress(packed, back, allow_overwrite=True)
    assert back.read_bytes() == TEXT


@pytest.fixture
def folder(tmp_path):
    """A folder with files, folders, a link, an empty folder, odd modes, names and times."""
    top = tmp_path / "top"
    (top / "in" / "deep").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "a.txt").write_bytes(TEXT)
    (top / "in" / "b.txt").write_bytes(TEXT[:200])
    (top / "in" / "deep" / "caf\u00e9 \u4e2d.bin").write_bytes(bytes(range(256)))
    (top / "in" / "deep" / "none").write_bytes(b"")
    (top / "tone.wav").write_bytes(wav(samples(900).tobytes()))
    (top / "run.sh").write_bytes(b"#!/bin/sh\n")
    (top / "run.sh").chmod(0o755)
    (top / "in" / "b.txt").chmod(0o640)
    os.utime(top / "a.txt", (1_600_000_000, 1_600_000_000))
    if os.name != "nt":
        (top / "in" / "link").symlink_to("../a.txt")
        (top / "locked").mkdir()
        (top / "locked" / "x").write_bytes(b"x")
        (top / "locked").chmod(0o555)
    yield top
    if os.name != "nt":
        (top / "locked").chmod(0o755)


def picture(top: Path) -> dict:
    """name -> (mode, seconds, bytes or target) of everything below a folder."""
    found = {}
    for path in sorted(top.rglob("*")):
        info = path.lstat()
        what = os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        mode = 0 if path.is_symlink() else stat.S_IMODE(info.st_mode)
        found[str(path.relative_to(top))] = (mode, int(info.st_mtime) * (mode > 0), what)
    return found


def test_a_folder_comes_back(folder, tmp_path):
    packed, back = tmp_path / "p", tmp_path / "back"
    done = mixed.compress([folder], packed)
    assert mixed.decompress(packed, back).files == done.files == mixed.verify(packed).files
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    assert done.original == mixed.verify(packed).original == size
    assert picture(back) == picture(folder)
    with pytest.raises(BitbyteError, match="exists; name a new folder"):
        mixed.decompress(packed, back, allow_overwrite=True)
    (back / "locked").chmod(0o755)


def test_several_files_and_folders(folder, tmp_path):
    packed, back = tmp_path / "p", tmp_path / "back"
    mixed.compress([folder / "a.txt", folder / "in", folder / "run.sh"], packed)
    mixed.decompress(packed, back)
    assert sorted(path.name for path in back.iterdir()) == ["a.txt", "in", "run.sh"]
    assert picture(back / "in") == picture(folder / "in")
    with pytest.raises(BitbyteError, match=r"called a.txt"):
        mixed.compress([folder / "a.txt", folder / "a.txt"], tmp_path / "q")
    with pytest.raises(BitbyteError, match="does not exist"):
        mixed.compress([folder, tmp_path / "nobody"], tmp_path / "q")
    with pytest.raises(BitbyteError, match=r"newer|folder to be restored"):
        mixed.decompress(packed, "-")


def test_an_empty_folder(tmp_path):
    (tmp_path / "e").mkdir()
    mixed.compress([tmp_path / "e"], tmp_path / "p")
    assert mixed.decompress(tmp_path / "p", tmp_path / "b").files == 0
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_pipes_and_devices_are_left_out_loudly(tmp_path):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "pipe")
    with pytest.raises(BitbyteError, match="pipe, a socket or a device"):
        mixed.compress([tmp_path / "in"], tmp_path / "p")
    assert not (tmp_path / "p").exists()


def hostile(entries: list[archive.Entry], content: bytes = b"", table: bytes | None = None):
    """Blocks of an archive that says so."""
    return [(archive.table(entries) if table is None else table) + content]


FILE = archive.Entry(archive.FILE, "ok", 0o644, 0, 2)


FOLDER = archive.Entry(archive.FOLDER, "d", 0o755, 0)


@pytest.mark.parametrize("name", [
    "/etc/passwd", "../up", "a/../../up", "a//b", "./a", "a/./b", "", "a/", "a\0b", "..", ".",
])  # fmt: skip
def test_names_that_lead_out(name, tmp_path):
    entry = archive.Entry(archive.FILE, name, 0o644, 0, 2)
    for entries in ([entry], [FILE, entry]):
        with pytest.raises(BitbyteError, match=r"plain name|absolute|leads out"):
            archive.unpack(hostile(entries, b"hihi"), tmp_path / "out", "x")
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_special_on_windows_only(monkeypatch, tmp_path):
    special = [
        "C:/x", "a\\b", "dir/file.txt:stream", "dir/CON ", "d/x.", "d./x", "d/con.txt", "CON .txt",
        "lpt\u00b9", "conin$",
    ]  # fmt: skip
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        assert all(map(archive._unsafe, special))
        links = [archive.Entry(archive.LINK, "d/l", 0o777, 0, target=to) for to in special]
        assert not any(archive._stays_inside(link, {"d": archive.FOLDER}) for link in links)
        assert archive._unsafe("dir/console.txt") is None
    assert not any(map(archive._unsafe, special))
    if os.name != "nt":
        (tmp_path / "in").mkdir()
        for name in ("10:30.txt", "a\\b", "CON "):
            (tmp_path / "in" / name).write_bytes(b"x")
        mixed.compress([tmp_path / "in"], tmp_path / "p")
        mixed.decompress(tmp_path / "p", tmp_path / "out")
        assert picture(tmp_path / "out") == picture(tmp_path / "in")


def links_of(links: dict) -> list[archive.Entry]:
    return [archive.Entry(archive.LINK, name, 0o777, 0, target=to) for name, to in links.items()]


@pytest.mark.parametrize(("links", "more"), [
    ({"l": "/etc"}, []), ({"l": ".."}, []), ({"l": "a/../../x"}, []), ({"d/l": "../.."}, []),
    ({"l": ""}, []), ({"l": "x\0y"}, []), ({"l": ".", "m": "l/../x"}, []),
    ({"l": "d", "d/m": "../l/../.."}, []), ({"l": "d"}, ["l/x"]), ({"l": "."}, ["l/x"]),
    # Where case does not matter, D/UP is the folder above, and no name must lead through it.
    ({"d/up": "..", "m": "D/UP/../etc"}, []), ({"d/up": "..", "m": "d/UP/../etc"}, []),
])  # fmt: skip
def test_links_that_lead_out(links, more, tmp_path):
    entries = [FOLDER, *links_of(links)]
    entries += [archive.Entry(archive.FILE, name, 0o644, 0, 1) for name in more]
    with pytest.raises(BitbyteError, match=r"may lead out|not a folder"):
        archive.unpack(hostile(entries, b"h"), tmp_path / "out", "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="links need rights")
def test_links_that_stay_inside_come_back(tmp_path):
    links = {"l": "d/../ok", "d/m": "../l", "n": "d/m", "d/up": "..", "o": "nowhere", "p": "n/x"}
    archive.unpack(hostile([FOLDER, *links_of(links), FILE], b"hi"), tmp_path / "out", "x")
    assert {name: os.readlink(tmp_path / "out" / name) for name in links} == links
    assert (tmp_path / "out" / "n").read_bytes() == b"hi"


@pytest.mark.skipif(os.name == "nt", reason="links need rights")
@pytest.mark.parametrize("target", ["/etc/hosts", "../elsewhere"])
def test_nothing_is_written_that_could_not_be_restored(target, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as small:
        small.setattr(archive, "MAX_ENTRIES", 3)
        with pytest.raises(BitbyteError, match="more than 3 entries"):
            mixed.compress([folder], tmp_path / "p")
    (folder / "out").symlink_to(target)
    with pytest.raises(BitbyteError, match=r"link out that may lead out of it; leave that out"):
        mixed.compress([folder], tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_names_that_are_the_same_to_a_file_system(tmp_path, monkeypatch):
    """Where case does not matter, two folders do not become one."""
    both = [FOLDER, archive.Entry(archive.FOLDER, "D", 0o755, 0)]
    mkdir = Path.mkdir
    with monkeypatch.context() as insensitive:
        insensitive.setattr(
            Path, "mkdir", lambda path, *mode: mkdir(path.with_name(path.name.lower()), *mode)
        )
        with pytest.raises(BitbyteError, match=r"D beside a name that is the same"):
            archive.unpack(hostile(both), tmp_path / "out", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_text_there(tmp_path, monkeypatch):
    """Windows names are text, and an archive of Linux may hold any bytes."""
    entry = b"\0\x04caf\xe9\0\0\0"
    with monkeypatch.context() as windows:
        windows.setattr(os, "fsdecode", lambda raw: raw.decode("utf-8", "surrogatepass"))
        with pytest.raises(BitbyteError, match=r"not UTF-8, b'caf.xe9'"):
            archive.unpack([bytes([len(entry)]) + entry], tmp_path / "out", "x")


def test_a_table_is_checked_while_it_is_read(tmp_path, monkeypatch):
    """A few bytes can stand for a table of any size."""
    size, read = 200 << 20, []

    def blocks():
        yield archive.varint(size)
        for _ in range(size >> 20):
            read.append(1)
            yield bytes(1 << 20)

    with pytest.raises(BitbyteError, match="not a plain name"):
        archive.unpack(blocks(), tmp_path / "out", "x")
    assert len(read) == 1
    monkeypatch.setattr(archive, "MAX_ENTRIES", 3)
    entries = [archive.Entry(archive.FOLDER, str(i), 0o755, 0) for i in range(4)]
    assert archive.unpack(hostile(entries[:3]), tmp_path / "three", "x") == (0, 0)
    with pytest.raises(BitbyteError, match="more than 3 entries"):
        archive.unpack(hostile(entries), tmp_path / "out", "x")
    table = archive.table(entries)
    reader = archive._Reader([table], "x")
    while piece := reader.some(1):  # a copy of the rest for each byte would be quadratic
        assert piece.obj is table


@pytest.mark.parametrize("blocks", [
    [b""], [b"\x05"], [b"\x03\x09aa"], hostile([FILE, FILE], b"hihi"), hostile([FILE], b"h"),
    hostile([FILE], b"hih"), hostile([archive.Entry(archive.FILE, "a", 0o644, 0, 1 << 61)]),
    [b"\xff" * 12], [archive.varint(4) + b"\x01\x01d\0\0"],
    hostile([FILE, archive.Entry(archive.FILE, "ok/x", 0o644, 0, 0)], b"hi"),
])  # fmt: skip
def test_tables_that_do_not_fit(blocks, tmp_path):
    with pytest.raises((BitbyteError, OSError)):
        archive.unpack(blocks, tmp_path / "out", "x")
    with pytest.raises(BitbyteError):
        archive.check(blocks, "x")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_do_not_end_are_refused():
    for raw in (b"\x80" * 10 + b"\0", b"\x06"):
        with pytest.raises(BitbyteError, match="too large"):
            archive._Reader([raw], "x").varint(5)
        with pytest.raises(BitbyteError, match="is damaged"):
            frames.Source(io.BytesIO(raw), "x").varint(5)


@given(st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_table(tmp_path_factory, table):
    folder = tmp_path_factory.mktemp("any")
    try:
        archive.unpack([table], folder / "out", "x")
    except BitbyteError:
        assert list(folder.iterdir()) == []


def test_a_file_that_changes_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"a")
    entries = archive.collect([tmp_path / "in"])
    (tmp_path / "in" / "a").write_bytes(b"longer")
    monkeypatch.setattr(archive, "collect", lambda _: entries)
    with pytest.raises(BitbyteError, match="changed while"):
        mixed.compress([tmp_path / "in"], tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_an_archive_that_is_written_into_its_own_folder_ends(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"a" * (1 << 20))
    (tmp_path / "in" / "out").write_bytes(b"")
    entries = archive.collect([tmp_path / "in"])
    with (
        open(tmp_path / "in" / "out", "ab", buffering=0) as out,
        pytest.raises(BitbyteError, match=r"out changed while .* output elsewhere"),
    ):
        for i, piece in enumerate(archive.pieces(entries)):
            assert i < 20
            out.write(piece.data)


@pytest.mark.skipif(os.name == "nt", reason="Windows has shorter paths")
def test_folders_deeper_than_functions_call_one_another(tmp_path):
    top = str(tmp_path / "in")
    deepest = top + "/d" * 1100
    os.makedirs(top)
    here = os.open(top, os.O_RDONLY)
    try:
        for _ in range(1100):
            os.mkdir("d", dir_fd=here)
            inner = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
        names = [entry.name for entry, _ in archive.collect([Path(top)])]
        assert len(names) == 1100 and deepest.endswith(names[-1])
    finally:
        os.close(here)
        archive._remove(Path(top))  # pytest could not
    table = [archive.Entry(archive.FOLDER, "d" + "/d" * n, 0o755, 0) for n in range(1100)]
    with pytest.raises(BitbyteError, match="does not cover all files"):
        archive.unpack(hostile(table, b"x"), tmp_path / "out", "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_nobody_else_reads_what_is_being_restored(folder, tmp_path, monkeypatch):
    packed, back = tmp_path / "p", tmp_path / "back"
    mixed.compress([folder], packed)
    copy, seen = archive._copy, set()

    def spied(reader, file, size):
        top = tmp_path / Path(file.name).relative_to(tmp_path).parts[0]
        seen.add(stat.S_IMODE(top.stat().st_mode))
        copy(reader, file, size)

    monkeypatch.setattr(archive, "_copy", spied)
    before = os.umask(0o027)
    try:
        mixed.decompress(packed, back)
    finally:
        os.umask(before)
    assert seen == {0o700} and stat.S_IMODE(back.stat().st_mode) == 0o750
    assert {path.name for path in tmp_path.iterdir()} == {"top", "p", "back"}
    (back / "locked").chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_what_is_made_of_a_private_file_is_private(files):
    source, packed, back = files
    source.chmod(0o600)
    mixed.compress([source], packed)
    mixed.decompress(packed, back)
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600] * 3
    packed.chmod(0o640)
    mixed.compress([source], packed, allow_overwrite=True)
    assert stat.S_IMODE(packed.stat().st_mode) == 0o640  # that of the file it replaces


def test_links_that_cannot_be_made_are_found_before_anything_is_decoded(tmp_path, monkeypatch):
    def refused(target, path):
        raise PermissionError(1, "Operation not permitted", target)

    def blocks():
        yield archive.table([*links_of({"l": "ok"}), FILE])
        raise AssertionError("decoded")

    monkeypatch.setattr(os, "symlink", refused)
    with pytest.raises(BitbyteError, match="x holds 1 symbolic links, which cannot be made here"):
        archive.unpack(blocks(), tmp_path / "out", "x")
    assert list(tmp_path.iterdir()) == []


def test_processes_of_one_id_do_not_delete_what_the_other_writes(tmp_path):
    """Containers that share a folder have such processes."""

    def blocks(others: int):
        yield archive.table([FILE])
        if others:
            assert archive.unpack(blocks(others - 1), tmp_path / "out", "x") == (1, 2)
        yield b"hi"

    with pytest.raises(BitbyteError, match="written by another process"):
        archive.unpack(blocks(1), tmp_path / "out", "x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "ok"]


def child(*words: object, **options):
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [sys.executable, "-m", "bitbyte", *map(str, words)], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, stdin=subprocess.PIPE, **options,
    )  # fmt: skip


def test_standard_streams(tmp_path):
    packed, said = child("compress", "none", "-", "-").communicate(FOX, timeout=120)
    assert len(packed) < 200 and b"bits per byte" in said
    back, said = child("decompress", "-", "-").communicate(packed, timeout=120)
    assert back == FOX and b"SHA-256" in said
    process = child("decompress", "-", tmp_path / "x")
    assert b"cut off" in process.communicate(packed[:-5], timeout=120)[1]
    assert process.returncode == 2 and not (tmp_path / "x").exists()


def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(TEXT)
    Path("d").mkdir()
    Path("d/b").write_bytes(FOX)
    assert main(["compress", "none", "a", "o"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["test", "o"]) == 0
    assert "undamaged" in capsys.readouterr().out
    assert main(["decompress", "o", "back"]) == 0
    assert Path("back").read_bytes() == TEXT
    assert main(["compress", "none", "a", "d", "all", "--memory", "16"]) == 0
    assert main(["compress", "none", "a", "o", "--device", "auto", "--allow_overwrite"]) == 0
    assert main(["decompress", "all", "x"]) == 0 and Path("x/d/b").read_bytes() == FOX
    for wrong, word in (
        (["compress", "none", "a"], "a file to write"),
        (["compress", "none", "nobody", "y"], "no file"),
        (["compress", "none", "-", "a", "y"], "alone"),
        (["compress", "none", "a", "y", "--memory", "1"], "between 16"),
        (["compress", "none", "a", "y", "--mode", "native"], "needs a model"),
        (["compress", "none", "a", "y", "--lanes", "4", "--device", "cuda", "--threads", "9"],
         "--lanes, --device, --threads: no effect without a model; leave it out"),
        (["certify", "none", "a", "--lanes", "4", "--threads", "9"], "--lanes, --threads: no"),
        (["compress", "some-run", "a", "d", "y"], "no checkpoint"),
        (["test", "a"], "is not a bitbyte"), (["test", "d"], "is a folder"),
        (["decompress", "o", "back"], "exists"), (["decompress", "all", "-"], "needs a folder"),
    ):  # fmt: skip
        assert main(wrong) == 2, wrong
        assert word in capsys.readouterr().err
    assert sorted(os.listdir()) == ["a", "all", "back", "d", "o", "x"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("what", ["compress", "decompress"])
def test_killed_half_way(number, what, tmp_path):
    source, packed, target = tmp_path / "s", tmp_path / "p", tmp_path / "t"
    source.write_bytes(words(30_000))
    call = ["compress", "none", source, target, "--allow_overwrite"]
    if what == "decompress":
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "s").write_bytes(source.read_bytes())
        mixed.compress([tmp_path / "d" / "s"], packed)
        call = ["decompress", packed, target, "--allow_overwrite"]
    target.write_bytes(b"before")
    process = child(*call)
    until(lambda: list(tmp_path.glob(".tmp*")), process)
    time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    if process.returncode == 0:
        return  # it was faster
    assert target.read_bytes() == b"before"
    assert len(list(tmp_path.glob(".tmp*"))) == (number == signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="limits")
def test_full_disk(files, tmp_path):
    resource = pytest.importorskip("resource")
    source, packed, back = files
    mixed.compress([source], packed)
    mixed.compress([source, packed], tmp_path / "all")
    before = sorted(path.name for path in tmp_path.iterdir())
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, old[1]))
    try:
        for call in (lambda: mixed.decompress(packed, back), lambda: mixed.compress([source], back),
                     lambda: mixed.decompress(tmp_path / "all", back)):  # fmt: skip
            with pytest.raises(OSError, match="large"):
                call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_two_at_once(files):
    """Two writers of one file: one of them says so, and the file is whole."""
    source, packed, back = files
    both = [child("compress", "none", source, packed) for _ in range(2)]
    codes = sorted(process.wait(timeout=120) for process in both)
    for process in both:
        process.communicate()
    assert codes in ([0, 2], [0, 0])
    mixed.decompress(packed, back)
    assert back.read_bytes() == TEXT


def cut(data: bytes, sizes: list[int]) -> list:
    """What `segments.frames` makes of pieces with these sizes."""
    pieces, at = [], 0
    for size in [*sizes, len(data)]:
        pieces.append(segments.Piece(data[at : at + size], None, False))
        at += size
    return [part for part, _ in segments.frames(pieces)]


LEAST = segments.LEAST_RUN


@pytest.mark.parametrize("sizes", [[], [LEAST + 5, 3 * LEAST], [1 << 17] * 9], ids=len)
def test_runs_are_cut_out(sizes):
    block = segments.BLOCK
    data = TEXT + bytes(3 * LEAST) + b"\1" * 2 * LEAST + TEXT + b"\1" * (LEAST - block)
    data += TEXT + bytes(2 * LEAST)
    parts = cut(data, sizes)
    runs = [part for part in parts if isinstance(part, segments.Run)]
    whole = [bytes([p.byte]) * p.length if isinstance(p, segments.Run) else p for p in parts]
    assert b"".join(whole) == data
    assert [run.byte for run in runs] == [0, 1, 0]
    for run, length in zip(runs, (3 * LEAST, 2 * LEAST, 2 * LEAST), strict=True):
        # Short stretches at the ends of pieces and of the run are left to the mixer.
        assert max(LEAST, length - LEAST - 2 * block) <= run.length <= length


def test_a_run_is_one_frame_however_it_was_read():
    assert cut(bytes(5 << 20), [1 << 20] * 5) == [segments.Run(0, 5 << 20)]
    longest = segments.MAX_RUN
    pieces = [segments.Piece(bytes(segments.FRAME), None, False)] * (longest // segments.FRAME + 1)
    runs = [run.length for run, _ in segments.frames(pieces)]
    assert runs == [longest, segments.FRAME]


def test_runs_are_not_coded_one_by_one(tmp_path, monkeypatch):
    """A hundred megabytes of zeros would take a quarter of an hour."""
    coded, encode = [], codec.Codec.encode

    def counted(self, data, shape, tick=int):
        coded.append(len(data))
        return encode(self, data, shape, tick)

    monkeypatch.setattr(codec.Codec, "encode", counted)
    assert round_trip(bytes(9 << 20), tmp_path).size < 50 and not coded
    done = round_trip(TEXT + bytes(5 << 20) + TEXT + b"x" * (1 << 20) + TEXT, tmp_path)
    assert done.size < len(TEXT) + 200
    assert sum(coded) < 10 * (len(TEXT) + 2 * segments.BLOCK)  # with trials of how to look at it
    round_trip(wav(bytes(300_001)), tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_bytes(bytes(1 << 20))
    (tmp_path / "d" / "y").write_bytes(TEXT)
    mixed.compress([tmp_path / "d"], tmp_path / "a")
    mixed.decompress(tmp_path / "a", tmp_path / "e")
    assert (tmp_path / "e" / "x").read_bytes() == bytes(1 << 20)
    assert (tmp_path / "e" / "y").read_bytes() == TEXT


def test_damaged_runs(files):
    source, packed, _ = files
    source.write_bytes(b"a" + bytes(1 << 17))
    mixed.compress([source], packed)
    whole = packed.read_bytes()
    for i in range(len(whole)):
        damaged(packed, whole[:i])
        damaged(packed, whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])


def test_sparse_files_need_no_memory_of_their_size(tmp_path, monkeypatch):
    """Reading goes by frames: a long file of zeros is never in memory as a whole."""
    source = tmp_path / "s"
    with open(source, "wb") as file:
        file.truncate(1 << 40)
    with open(source, "rb") as file:
        parts = segments.frames(segments.pieces(file))
        assert [next(parts)[0].length for _ in range(2)] == [segments.MAX_RUN] * 2
    buckets, ring_bits = codec.sizes_for(1 << 40)
    assert 64 * buckets + (1 << ring_bits) <= codec.MEMORY << 20


def test_read_header_of_frames_round_trips():
    header = frames.Header(
        archive=True, n_buckets=5 << 10, ring_bits=20, model=bytes(16), fingerprint=b"f" * 16
    )
    source = frames.Source(io.BytesIO(header.pack()), "x")
    assert frames.read_header(source) == header
