"""Where bytes come from: files, compressed files, folders, records, built-in text, bad input."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from bitbyte import shards
from bitbyte.data import corpora, pack, readers
from bitbyte.files import BitbyteError

SHARED = ROOT.parent / "shared" / "corpora"
zstandard = pytest.importorskip("zstandard", reason="needs the extra data")

PACKERS = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip
TEXT = b"".join(b"line %d of a text that repeats\n" % (i % 977) for i in range(20_000))


def content(documents) -> list[bytes]:
    return [b"".join(document.chunks) for document in documents]


def read(path, size=1 << 20, **options) -> bytes:
    return b"".join(readers.read_chunks(Path(path), size, **options))


# --- files and folders


def test_folder_is_read_whole_sorted_and_as_it_is(tmp_path):
    everything = bytes(range(256)) * 40
    for name, data in (("b/2", b"two"), ("b/1", b""), ("a.bin", everything), ("c", b"\xff\x00")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert content(corpora.file_documents([tmp_path])) == [everything, b"", b"two", b"\xff\x00"]
    documents, facts = corpora.open_corpus([tmp_path / "c", tmp_path / "b"])
    assert content(documents) == [b"\xff\x00", b"", b"two"]
    assert facts["kind"] == "files" and facts["size"] == 5 and facts["sep_byte"] is None
    assert facts["name"] == "c-and-1"


@given(st.integers(0, 100), st.integers(1, 17), st.lists(st.integers(1, 9)))
def test_pieces_have_exactly_the_size_asked_for(n, size, cuts):
    data, chunks, at = bytes(range(n)), [], 0
    for cut in [*cuts, 100]:
        chunks.append(data[at : at + cut])
        at += cut
    pieces = list(readers._reblock(iter(chunks), size))
    assert b"".join(pieces) == data
    assert all(len(piece) == size for piece in pieces[:-1]) and all(pieces)


def test_piece_size_depends_on_the_input_only(tmp_path):
    for name, size, piece in (("a", 9000, 4096), ("b", 2_560_000, 10_000)):
        (tmp_path / name).write_bytes(bytes(size))
        (document,) = corpora.file_documents([tmp_path / name])
        assert not document.whole
        assert {len(chunk) for chunk in document.chunks} == {piece, size % piece or piece}


def test_links_are_followed_once_and_loops_survived(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "real").write_bytes(b"real")
    (tmp_path / "data" / "again").symlink_to("real")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "self").symlink_to("self")
    (tmp_path / "data" / "gone").symlink_to("nowhere")
    (tmp_path / "other").symlink_to("data")
    assert content(corpora.file_documents([tmp_path])) == [b"real"]
    assert capsys.readouterr().err.count("leads nowhere") == 2


def test_links_out_of_a_folder_are_not_followed(tmp_path, capsys):
    for name in ("mine/text", "others/a", "others/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "mine" / "folder").symlink_to(tmp_path / "others")
    (tmp_path / "mine" / "file").symlink_to(tmp_path / "others" / "a")
    assert content(corpora.file_documents([tmp_path / "mine"])) == [b"mine/text"]
    assert capsys.readouterr().err.count("a link out of the folder") == 2
    named = [tmp_path / "mine" / "folder", tmp_path / "mine" / "file"]
    assert content(corpora.file_documents(named)) == [b"others/a", b"others/b"]
    (tmp_path / "way").symlink_to(tmp_path / "mine")  # a folder that is named may itself be a link
    assert content(corpora.file_documents([tmp_path / "way"])) == [b"mine/text"]


def test_files_are_chosen_by_patterns(tmp_path, capsys):
    for name in ("a.py", "b.md", "docs/c.md", "docs/d.PY", "docs/[x].py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())

    def taken(**patterns):
        documents, facts = corpora.open_corpus([tmp_path], **patterns)
        names = [b"".join(document.chunks).decode() for document in documents]
        assert facts["size"] == sum(map(len, names))
        return names

    assert taken(include=["*.py"]) == ["a.py", "docs/[x].py"]
    assert taken(include=["*.py", "*.md"], exclude=["docs/*"]) == ["a.py", "b.md"]
    assert taken(exclude=["*.py", "c.*"]) == ["b.md", "docs/d.PY"]
    capsys.readouterr()
    assert len(taken()) == 5
    assert capsys.readouterr().err == "note: 5 files: 3 .py, 2 .md\n"
    with pytest.raises(BitbyteError, match="has no files that --include and --exclude leave"):
        taken(include=["*.txt"])
    (document,) = corpora.open_corpus([tmp_path / "a.py"], exclude=["*"])[0]  # named: taken
    assert document.name.endswith("a.py")
    with pytest.raises(BitbyteError, match="stories has no files to choose"):
        corpora.open_corpus("stories", include=["*"])
    (tmp_path / "r.jsonl").write_text('{"text": "a"}')
    with pytest.raises(BitbyteError, match=r"r\.jsonl: JSON records, which are held out one by"):
        corpora.open_corpus([tmp_path / "r.jsonl"], whole_files=True)


def test_whole_files_stay_together(tmp_path):
    """Each file is in one split; otherwise its two pieces, 4096 and 2000 bytes, may be in both."""
    for number in range(40):
        (tmp_path / f"{number}.txt").write_bytes(bytes([number]) * 6096)
    for whole in (False, True):
        documents, facts = corpora.open_corpus([tmp_path], whole_files=whole)
        folder = tmp_path.parent / f"packed-{whole}"
        pack.pack(documents, folder, source=facts, val_fraction=0.3)
        train, val = ({*(folder / f"{name}_00000.bin").read_bytes()} for name in ("shard", "val"))
        assert train and val and train | val == {*range(40)}
        assert bool(train & val) is not whole


def test_hidden_files_are_read_only_by_name(tmp_path):
    for name in ("text", ".DS_Store", ".git/config", "deep/.x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert content(corpora.file_documents([tmp_path])) == [b"text"]
    assert content(corpora.file_documents([tmp_path / ".DS_Store"])) == [b".DS_Store"]
    assert content(corpora.file_documents([tmp_path / ".git"])) == [b".git/config"]
    with pytest.raises(BitbyteError, match="deep has no files"):
        corpora.open_corpus(tmp_path / "deep")


def test_packed_shards_below_a_folder_are_passed_over(tmp_path, capsys):
    (tmp_path / "text").write_bytes(os.urandom(9000))
    documents, facts = corpora.open_corpus(tmp_path)
    pack.pack(documents, tmp_path / "out", source=facts, progress=False)
    assert content(corpora.open_corpus(tmp_path)[0]) == [(tmp_path / "text").read_bytes()]
    assert "out: packed shards" in capsys.readouterr().err
    assert corpora.open_corpus(tmp_path / "out")[1]["size"] > 9000  # named directly
    for other in ('{"name": "app", "icons": []}', "broken", "[]"):  # a manifest of something else
        (tmp_path / "out" / "manifest.json").write_text(other)
        assert corpora.open_corpus(tmp_path)[1]["size"] == 18_000 + len(other)


def test_what_is_no_file_is_passed_over_in_folders_and_refused_by_name(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_bytes(b"text")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "sock"))
        assert content(corpora.file_documents([tmp_path])) == [b"text"]
    assert capsys.readouterr().err.count("not a regular file") == 2
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(BitbyteError, match="neither a file nor a folder"):
            corpora.open_corpus(str(path))


def test_file_that_becomes_a_fifo_does_not_block(tmp_path):
    (tmp_path / "x").write_bytes(b"text")
    documents, _ = corpora.open_corpus(tmp_path)
    (tmp_path / "x").unlink()
    os.mkfifo(tmp_path / "x")
    with pytest.raises(BitbyteError, match="x is not a regular file"):
        content(documents)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "has no files"),
        (lambda path: (path / "deep").mkdir(parents=True), "has no files"),
    ],
)
def test_nothing_there(make, word, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(BitbyteError, match=f"x:? {word}"):
        corpora.open_corpus(str(tmp_path / "x"))


def test_an_empty_path_is_not_the_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("secret").write_bytes(b"x")
    for source in ("", ["secret", ""]):
        with pytest.raises(BitbyteError, match="an empty name is not a file or folder"):
            corpora.open_corpus(source)
    with pytest.raises(BitbyteError, match="an empty name is not a file or folder"):
        shards.open_dataset("", 1)


def test_unreadable_file_is_named(tmp_path):
    folder = Path(tempfile.mkdtemp())  # the parents of tmp_path are closed to other users
    try:
        folder.chmod(0o755)
        (folder / "secret\nfile").write_bytes(b"x")
        (folder / "secret\nfile").chmod(0)
        code = f"""
import os
from bitbyte.data import corpora
corpora.shown("\\n")  # loads its codec while this user may
os.chdir({str(folder)!r})
if os.getuid() == 0:
    os.setgroups([])
    os.setuid(65534)
try:
    corpora.open_corpus(".")
except corpora.BitbyteError as error:
    print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True
        )
        assert done.stderr == ""
        assert done.stdout == "secret\\nfile: cannot be read (permission denied)\n"
    finally:
        shutil.rmtree(folder)


def test_memory_does_not_grow_with_the_file(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(96 << 20)
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(bytes(48 << 20), 1))
    tracemalloc.start()
    for document in corpora.file_documents([tmp_path]):
        for chunk in document.chunks:
            assert len(chunk) <= readers.CHUNK
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_name_of_any_bytes_is_one_line_of_text(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\n<b>"
    with open(path, "wb") as file:
        file.write(b"x")
    documents, facts = corpora.open_corpus(os.fsdecode(path))
    assert facts["inputs"][0].endswith(r"/\xff\n<b>") and facts["name"] == "b"
    json.dumps(facts).encode()
    assert [document.name for document in documents] == facts["inputs"]


# --- packed files


@pytest.mark.parametrize("suffix", PACKERS)
class TestPacked:
    def test_round_trip_members_and_padding(self, suffix, tmp_path):
        path, packed = tmp_path / f"t.txt{suffix}", PACKERS[suffix](TEXT)
        path.write_bytes(packed)
        documents, facts = corpora.open_corpus(path)
        assert content(documents) == [TEXT]
        assert facts["size"] is None and facts["name"] == "t"
        path.write_bytes(packed + PACKERS[suffix](b"") + packed + bytes(8))
        assert read(path) == TEXT + TEXT
        assert {len(piece) for piece in list(readers.read_chunks(path, 4099))[:-1]} == {4099}

    def test_incompressible(self, suffix, tmp_path):
        data = os.urandom(3_000_000)
        (tmp_path / f"x{suffix}").write_bytes(PACKERS[suffix](data))
        assert read(tmp_path / f"x{suffix}") == data

    def test_damage_is_named(self, suffix, tmp_path):
        path, packed = tmp_path / f"x{suffix}", PACKERS[suffix](TEXT)
        half = packed + packed[:9]
        for bad in (packed[:-1], packed[:5], b"plain text", b"p", b"", half, bytes(9)):
            path.write_bytes(bad)
            with pytest.raises(BitbyteError, match=rf"x\{suffix}: cannot be unpacked \(.+\)"):
                read(path)

    def test_what_follows_the_end_is_ignored_with_a_warning(self, suffix, tmp_path, capsys):
        path, packed = tmp_path / f"x{suffix}", PACKERS[suffix](TEXT)
        for more in (b"g", b"garbage\n", bytes(5) + b"x" * 200_000):
            path.write_bytes(packed + more)
            assert read(path) == TEXT
            n = len(more.lstrip(b"\0"))
            assert f"x{suffix}: {n} bytes after the end of the packed" in capsys.readouterr().err

    def test_a_plain_file_of_that_name_is_told_from_a_damaged_one(self, suffix, tmp_path):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(b"plain text")
        with pytest.raises(
            BitbyteError, match=rf"its content is not \{suffix}\); take \{suffix} off"
        ):
            read(path)

    @settings(max_examples=60)
    @given(data=st.data())
    def test_flipped_bytes_never_pass_silently(self, suffix, data):
        packed = bytearray(PACKERS[suffix](TEXT[:3000]))
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"x{suffix}")
            path.write_bytes(packed)
            try:
                assert read(path) == TEXT[:3000] or suffix == ".zst"  # no checksum by default
            except BitbyteError as error:
                assert f"x{suffix}" in str(error)  # damaged, or said to unpack to too much

    def test_limit(self, suffix, tmp_path):
        (tmp_path / f"x{suffix}").write_bytes(PACKERS[suffix](TEXT))
        assert read(tmp_path / f"x{suffix}", max_unpacked=len(TEXT)) == TEXT
        with pytest.raises(BitbyteError, match="decompression bomb"):
            read(tmp_path / f"x{suffix}", max_unpacked=len(TEXT) - 1)


def test_bomb_of_79_bytes(tmp_path):
    bomb = bz2.compress(bytes(64 << 20))
    assert len(bomb) < 80
    (tmp_path / "bomb.bz2").write_bytes(bomb)
    with pytest.raises(BitbyteError, match=r"bomb\.bz2 unpacks to more than \d+ bytes"):
        read(tmp_path / "bomb.bz2")
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(bytes(64 << 20)))
    assert len(read(tmp_path / "zeros.gz")) == 64 << 20  # no gzip file is refused by default


def test_decoders_memory_is_bounded(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 512 << 20, "preset": 0}]
    header = lzma.compress(b"x", filters=[{**filters[0], "dict_size": 4096}])
    big = bytearray(header)
    big[big.index(b"\x21\x01") + 2] = 34  # the code of a dictionary of 512 MiB
    big[20:24] = zlib.crc32(bytes(big[12:20])).to_bytes(4, "little")
    (tmp_path / "x.xz").write_bytes(big)
    with pytest.raises(BitbyteError, match=r"x\.xz.*[Mm]emory"):
        read(tmp_path / "x.xz")
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([20 << 3]) + b"\x01\x00\x00"  # window of 1 GiB
    (tmp_path / "x.zst").write_bytes(frame)
    with pytest.raises(BitbyteError, match=r"x\.zst.*memory"):
        read(tmp_path / "x.zst")


# --- records

OTHER = st.none() | st.integers() | st.lists(st.text("a[{"))
RECORDS = st.lists(
    st.fixed_dictionaries(
        {"story": st.text(st.characters(exclude_categories=["Cs"]))}, optional={"source": OTHER}
    ),
    max_size=5,
)


@settings(max_examples=200)
@given(RECORDS, st.sampled_from(["list", "indented", "lines"]), st.booleans(), st.data())
def test_json_is_the_same_however_it_is_cut(records, shape, escaped, data):
    dump = {
        "list": lambda: json.dumps(records, ensure_ascii=escaped),
        "indented": lambda: "\ufeff" + json.dumps(records, indent=20, ensure_ascii=escaped),
        "lines": lambda: "".join(json.dumps(r, ensure_ascii=escaped) + "\r\n" for r in records),
    }[shape]().encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(dump)), max_size=20)))
    edges = [0, *cuts, len(dump)]
    chunks = (dump[a:b] for a, b in itertools.pairwise(edges) if a < b)
    assert list(corpora.json_strings(chunks, "x", "story")) == [r["story"] for r in records]


@settings(max_examples=300)
@given(RECORDS.filter(bool), st.booleans(), st.data())
def test_broken_json_only_raises_bitbyte_errors(records, lines, data):
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1)
    broken = bytearray(text.encode())
    at = data.draw(st.integers(0, len(broken) - 1))
    if data.draw(st.booleans()):
        broken[at] = data.draw(st.integers(0, 255))
    else:
        del broken[at:]
    try:
        strings = list(corpora.json_strings(iter([bytes(broken)]), "file", "story"))
        assert all(isinstance(string, str) for string in strings)
    except BitbyteError as error:
        assert str(error).startswith("file: ") and "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"story": "a"},\n {"story": "b}]', r"line 2, byte 28: not valid JSON \(Unterminated"),
        ('[{"story": "a"},\n {"story" "b"}]', r"line 2, byte 27: not valid JSON \(Expecting ':'"),
        ('[{"story": "a"}\n {"story": "b"}]', "line 2, byte 17: expected a comma or ]"),
        ('[{"story": "a"},\n]', "line 2, byte 17: expected an object after"),
        ('[{"story": "a"}\n', "line 2, byte 16: the list is not closed"),
        ('[{"story": "a"}] x', "line 1, byte 17: there is more text after the list"),
        ('{"story": "a"}\n\n{"text": "b", "id": 1}', "line 3, byte 16: no field 'story'; it has: "
         "text, id"),
        ('{"story": "a"}\n7', "line 2, byte 15: expected an object with"),
        ('[{"story": 7}]', "the field 'story' is a number, not text"),
        (r'[{"story": "\ud800"}]', "half of a surrogate pair"),
        ("[" * 200_000, "line 1, byte 1: not valid JSON"),
        ('[{"story": ' + "1" * 5000 + "}]", "line 1, byte 1: not valid JSON"),
    ],
)  # fmt: skip
def test_broken_json_names_file_and_place(text, message, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(BitbyteError, match=rf"bad\.json: .*{message}"):
        list(corpora.tinystories_documents(tmp_path / "bad.json"))


def test_bytes_that_are_no_utf8_are_counted_over_chunks():
    chunks = [b'[{"story": "\xc3', b'\xa4"}, {"story": "', b'ok\xff"}]']
    with pytest.raises(BitbyteError, match="x: byte 31 is not UTF-8"):
        list(corpora.json_strings(iter(chunks), "x", "story"))


def test_original_shape_folder_and_field(tmp_path):
    original = [{"story": "\n\nOnce.\n\nEnd.\n", "instruction": {"prompt:": "p"}, "summary": "s"}]
    (tmp_path / "data00.json").write_text(json.dumps(original))
    (tmp_path / "data01.jsonl").write_text('{"story": "Two"}\n\n{"story": "Three\\u00e9"}\n')
    expected = [b"Once.\n\nEnd.", b"Two", "Three\u00e9".encode()]
    assert content(corpora.tinystories_documents(tmp_path)) == expected
    documents, facts = corpora.open_corpus(tmp_path)
    assert content(documents) == expected
    assert facts["kind"] == "json" and facts["field"] == "story" and facts["sep_byte"] == 0
    documents, facts = corpora.open_corpus(tmp_path / "data00.json", field="summary")
    assert content(documents) == [b"s"] and facts["field"] == "summary"
    with pytest.raises(BitbyteError, match="no field 'body'; it has: story, instruction, summ"):
        content(corpora.open_corpus(tmp_path, field="body")[0])
    (tmp_path / "data01.jsonl.gz").write_bytes(gzip.compress(b'{"story": "Packed"}'))
    assert content(corpora.tinystories_documents(tmp_path)) == [*expected, b"Packed"]


def test_folder_of_records_and_others_is_refused(tmp_path, capsys):
    (tmp_path / "data00.json").write_text('[{"story": "one"}]')
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert corpora.open_corpus(tmp_path)[1]["kind"] == "json"
    (tmp_path / "README.txt").write_text("about")
    message = r"\(data00\.json\) and other files \(README\.txt\); name the \.json files, or"
    with pytest.raises(BitbyteError, match=message):
        corpora.open_corpus(tmp_path)
    for name in "abc":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BitbyteError, match=r"other files \(a, README\.txt, \.\.\.\)"):
        corpora.open_corpus([tmp_path / "a", tmp_path])
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert corpora.open_corpus(files)[1]["kind"] == "files"
    assert "data00.json: JSON records, taken as bytes" in capsys.readouterr().err


def test_json_of_other_kinds_and_other_files_are_bytes(tmp_path):
    for name, text in (("a.json", '{"name": 1}'), ("b.json", "// no"), ("c.py", "pass")):
        (tmp_path / name).write_text(text)
    (tmp_path / "d.json").write_bytes(b'{"\xff')
    assert corpora.open_corpus(tmp_path)[1]["kind"] == "files"


FOREIGN = "x.json: does not begin with a JSON object in UTF-8 of up to 1 MiB, taken as bytes"
RECORDS = '{"text": "caf\u00e9"}\n{"text": "x"}\n'


@pytest.mark.parametrize(
    ("data", "noted"),
    [
        (b"{}", ""), (b"[]", ""), (b"", ""),
        (b'{"name": "package"}', "x.json: JSON without a field text or story"),
        (b"[1, 2]", FOREIGN), (b'"x"', FOREIGN), (b'["one"]\n["two"]\n', FOREIGN),
        (b'{"text": "on\n{"text": "two"}\n', FOREIGN), (b"// no\n" + RECORDS.encode(), FOREIGN),
        (RECORDS.encode("latin-1"), FOREIGN), (RECORDS.encode("utf-16"), FOREIGN),
    ],
)  # fmt: skip
def test_other_json_is_bytes(data, noted, tmp_path, capsys):
    (tmp_path / "x.json").write_bytes(data)
    documents, facts = corpora.open_corpus(tmp_path)
    assert facts["kind"] == "files" and content(documents) == [data]
    said = capsys.readouterr().err
    assert said.startswith(f"note: {noted}") if noted else not said


@pytest.mark.parametrize("other", ["00_info.json", "zz_info.json"])
def test_a_folder_where_one_file_holds_no_records_is_refused(other, tmp_path):
    (tmp_path / other).write_text('{"description": "x"}')
    (tmp_path / "data00.json").write_text('[{"story": "Once."}]')
    with pytest.raises(BitbyteError, match=rf"records \(data00.json\) and other files \({other}"):
        corpora.open_corpus(tmp_path)
    (tmp_path / other).write_text("[]")  # a list without an object does not matter
    assert content(corpora.open_corpus(tmp_path)[0]) == [b"Once."]


def test_a_field_that_is_asked_for_is_taken_or_refused(tmp_path):
    records = '{"content": "one"}\n{"content": "two"}\n'
    for name in ("x.ndjson", "x.jsonl", "x.json"):
        (tmp_path / name).write_text(records)
        documents, facts = corpora.open_corpus(tmp_path / name, field="content")
        assert content(documents) == [b"one", b"two"] and facts["name"] == "x"
        for field in ("story", "text", "body"):
            with pytest.raises(BitbyteError, match=f"line 1, .*no field '{field}'; it has: cont"):
                content(corpora.open_corpus(tmp_path / name, field=field)[0])
    (tmp_path / "x.txt").write_text(records)
    for source in (tmp_path / "x.txt", tmp_path, [tmp_path / "x.json", tmp_path / "x.txt"]):
        with pytest.raises(BitbyteError, match=r"x\.txt is not JSON by its name"):
            corpora.open_corpus(source, field="content")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(BitbyteError, match="line 1, byte 1: expected an object with"):
        content(corpora.open_corpus(tmp_path / "x.json", field="content")[0])
    for built_in in corpora.BUILT_IN:
        with pytest.raises(BitbyteError, match="without fields"):
            corpora.open_corpus(built_in, field="text")
    with pytest.raises(BitbyteError, match="'en' is a configuration of a Hugging Face set"):
        corpora.open_corpus(tmp_path, name="en")


def test_records_taken_as_bytes_are_mentioned(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"content": "one", "id": 1}\n')
    assert corpora.open_corpus(tmp_path / "x.jsonl")[1]["kind"] == "files"
    said = capsys.readouterr().err
    assert "x.jsonl: JSON without a field text or story, taken as bytes" in said
    assert "--field takes the text of one of: content, id" in said


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("x.docx", b"PK\x03\x04....", "a zip archive"),
        ("x", b"PK\x03\x04....", "a zip archive"),
        ("x.parquet", b"PAR1....PAR1", "a Parquet file; taken as bytes; --hf takes"),
        ("x.pdf", b"%PDF-1.4", "a PDF"),
        ("x.tgz", gzip.compress(b"x", mtime=0), "compressed with gzip"),
        ("x.tar.gz", gzip.compress(b"x", mtime=0), "unpacks to a tar archive"),
        ("x.tar", bytes(257) + b"ustar" + bytes(250), "a tar archive"),
        ("x.txt", b"plain PK\x03\x04", None),
        ("x.txt.gz", gzip.compress(b"x", mtime=0), None),
        ("x.bin", b"", None),
    ],
)
def test_archives_taken_as_bytes_are_mentioned(name, data, word, tmp_path, capsys):
    (tmp_path / name).write_bytes(data)
    corpora.open_corpus(tmp_path)
    said = capsys.readouterr().err
    assert f"note: {name}: {word}" in said if word else said == ""


def test_joined_files_may_each_begin_with_a_bom(tmp_path):
    one = "\ufeff" + json.dumps({"text": "\ufeffkept"}, ensure_ascii=False) + "\r\n"
    (tmp_path / "x.jsonl").write_text(one * 3)
    assert content(corpora.open_corpus(tmp_path)[0]) == ["\ufeffkept".encode()] * 3


def test_folder_names_differ_where_inputs_do(tmp_path):
    names = {}
    for name in ("\u0434\u0430\u043d.txt", "\u8cc7\u6599", "+++", "***.txt", "a b.txt", "n" * 250):
        (tmp_path / name).write_bytes(b"x")
        names[name] = corpora.open_corpus(tmp_path / name)[1]["name"]
    assert len(set(names.values())) == 6 and names["a b.txt"] == "a-b"
    assert names["\u8cc7\u6599"] == "\u8cc7\u6599"
    for name in names.values():
        (tmp_path / "out" / f"{name}-and-999-files-0123456789").mkdir(parents=True)


def test_packed_data_are_found_by_the_name_of_what_was_packed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "a"))
    name = "mes donn\u00e9es \u00fc"
    (tmp_path / name).mkdir()
    (tmp_path / name / "x.txt").write_bytes(b"text " * 100)
    documents, facts = corpora.open_corpus(name)
    pack.pack(documents, tmp_path / "a" / "datasets" / facts["name"])
    found = tmp_path / "a" / "datasets" / "mes-donn\u00e9es-\u00fc"
    assert readers.find_data(name) == found
    (tmp_path / name / "photo.bin").write_bytes(b"photo")  # it makes the folder data of its own
    said = []
    monkeypatch.setattr(readers, "_say_once", said.append)
    assert readers.find_data(name) == found
    assert said == [f"note: {name} is the data set {found}; ./{name} is what lies here"]
    for path in (f"./{name}", tmp_path / name):
        assert readers.find_data(path).absolute() == tmp_path / name
    assert len(said) == 1


def test_what_was_excluded_can_be_held_out(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "held.txt"):
        (folder / name).write_bytes(name.encode())
    for options in ({"exclude": ["held*"]}, {"include": ["[ab].txt"]}):
        documents, source = corpora.open_corpus(folder, **options)
        held, val_source = corpora.open_corpus(folder / "held.txt", **options)
        made = {"source": source, "val_documents": held, "val_source": val_source}
        manifest = pack.pack(documents, tmp_path / "out", overwrite=True, **made)
        assert (manifest.bytes_of("train"), manifest.bytes_of("val")) == (10, 8)
        made["val_source"] = val_source | {"inputs": [str(folder / "a.txt")]}
        with pytest.raises(BitbyteError, match="is training data too"):
            pack.pack(documents, tmp_path / "out", overwrite=True, **made)


def test_one_huge_json_value_is_bytes(tmp_path):
    (tmp_path / "x.json").write_text('{"points": [' + "1, " * 1_000_000 + "1]}")
    assert corpora.open_corpus(tmp_path)[1]["kind"] == "files"


def test_memory_does_not_grow_with_the_number_of_records(tmp_path):
    with open(tmp_path / "x.json", "w") as file:
        file.write("[" + ",\n".join(json.dumps({"story": "word " * 2000}) for _ in range(2000)))
        file.write("]")
    tracemalloc.start()
    n = sum(len(chunk) for d in corpora.tinystories_documents(tmp_path) for chunk in d.chunks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 2000 * 10_000 and peak < 12 << 20


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    home = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        pytest.importorskip("datasets", reason="needs the extra data")
        yield home


def test_hugging_face_sets_from_local_files(hf, tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["one", None, "two \u00e9", ""] * 3
    table = pyarrow.table({"id": list(range(12)), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts if text)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "rows.jsonl").write_text(lines)
    expected = [text.encode() for text in texts if text]
    for source in (tmp_path / "a.parquet", tmp_path / "b"):
        documents, facts = corpora.open_corpus(f"hf:{source}", field="text")
        assert [data for data in content(documents) if data] == expected
        assert facts["kind"] == "hf" and facts["sep_byte"] == 0
        with pytest.raises(BitbyteError, match=r"no field 'body'; it has: .*id"):
            list(corpora.hf_documents(str(source), field="body"))
    with pytest.raises(BitbyteError, match=r"must hold \.parquet files"):
        list(corpora.hf_documents(str(tmp_path)))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but broken")
    with pytest.raises(BitbyteError, match=r"a\.parquet: cannot be read") as error:
        list(corpora.hf_documents(str(tmp_path / "a.parquet")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "mistyped.parquet",
        "data/mistyped.jsonl",
        "./a",
        "/no/such",
        "a/b/c",
        "a b/c",
        "imdb",
        "a*/b",
    ],
)
def test_a_misspelt_file_is_not_looked_for_on_the_network(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # not even imported
    with pytest.raises(BitbyteError, match=r"there is no file or folder .*; a data set on the Hug"):
        corpora.open_corpus(f"hf:{name}")


def test_a_local_file_is_that_file_whatever_its_name(hf, tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    names = ("p[1].parquet", "p1.parquet", "part*.parquet", "part2.parquet", "x::y.parquet",
             "dir[2024]/a.parquet", "dir2/a.parquet", "q[1].jsonl", "q1.jsonl")  # fmt: skip
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        if name.endswith("jsonl"):
            Path(name).write_text(json.dumps({"text": name}))
        else:
            with open(name, "wb") as file:
                pyarrow.parquet.write_table(pyarrow.table({"text": [name]}), file)
    for name in names:
        assert content(corpora.hf_documents(name)) == [name.encode()]
    assert content(corpora.hf_documents("dir[2024]")) == [b"dir[2024]/a.parquet"]
    with pytest.raises(BitbyteError, match="there is no file or folder p"):
        corpora.hf_documents("p*.parquet")


def test_an_empty_cell_is_no_document_in_any_reader(hf, tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["one", None, "two"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    for source in (
        tmp_path / "x.jsonl",
        f"hf:{tmp_path / 'x.jsonl'}",
        f"hf:{tmp_path / 'x.parquet'}",
    ):
        assert content(corpora.open_corpus(source)[0]) == [b"one", b"two"]


def test_hugging_face_set_that_is_not_there(hf):
    with pytest.raises(BitbyteError, match="no file or folder nobody/nothing here, and it cannot"):
        list(corpora.hf_documents("nobody/nothing"))


def test_missing_extras_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "x.zst").write_bytes(b"x")
    for call in (lambda: list(corpora.hf_documents("a/x")), lambda: read(tmp_path / "x.zst")):
        with pytest.raises(BitbyteError, match=r'pip install "bitbyte\[data\]"'):
            call()


# --- built-in


def test_stories(monkeypatch, tmp_path, capsys):
    documents, facts = corpora.open_corpus("stories", n_bytes=5000, seed=3)
    texts = content(documents)
    assert sum(len(text) + 1 for text in texts) >= 5000 > sum(len(text) + 1 for text in texts[:-1])
    assert facts["name"] == "stories" and facts["seed"] == 3 and len(facts["grammar"]) == 64
    assert content(corpora.stories_documents(5000, 3)) == texts
    assert not set(texts) & set(content(corpora.stories_documents(5000, 3, "val")))
    monkeypatch.chdir(tmp_path)
    Path("stories").write_bytes(b"mine")
    assert corpora.open_corpus(["stories"])[1]["kind"] == "stories"
    assert "stories is the built-in text; for the file of that name" in capsys.readouterr().err
    for n_bytes in (0, -1):
        with pytest.raises(BitbyteError, match=f"^{n_bytes} bytes of stories"):
            list(corpora.open_corpus("stories", n_bytes=n_bytes)[0])
    documents, facts = corpora.open_corpus("./stories")
    assert content(documents) == [b"mine"] and facts["name"] == "stories-files"


def test_stdlib():
    documents, facts = corpora.open_corpus("stdlib")
    names = [document.name for document in documents]
    assert facts["size"] > 5_000_000 and len(names) > 300
    assert any(name.endswith("json/decoder.py") for name in names)
    assert not any("/test/" in name or "site-packages" in name for name in names)
    assert facts["python"] == sys.version.split()[0]
    first = next(corpora.stdlib_documents())
    assert b"".join(first.chunks) == Path(names[0]).read_bytes()


# --- real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/corpora is not there")
class TestReal:
    def test_tinystories(self):
        documents = corpora.tinystories_documents(
            SHARED / "tinystories" / "tinystories_v2_train_head.json"
        )
        stories = content(documents)
        text = (SHARED / "tinystories" / "tinystories_v2_train_head.txt").read_bytes()
        whole = [story.strip(b"\n") for story in text.split(b"<|endoftext|>")[:-1]]
        assert len(stories) == 1427 and stories == whole
        (story,) = content(
            corpora.tinystories_documents(SHARED / "tinystories" / "original_record.json")
        )
        assert story.startswith(b"Lily and Ben are friends.")

    def test_folder_of_records_and_text_is_refused(self):
        with pytest.raises(BitbyteError, match=r"JSON records .* and other files .*_head\.txt"):
            corpora.open_corpus(SHARED / "tinystories")

    def test_folders(self):
        documents, facts = corpora.open_corpus([SHARED / "canterbury", SHARED / "multilingual"])
        assert sum(map(len, content(documents))) == facts["size"]

    def test_xz(self):
        packed = SHARED / "enwik8" / "enwik8.valid.xz"
        assert read(packed) == lzma.decompress(packed.read_bytes())
