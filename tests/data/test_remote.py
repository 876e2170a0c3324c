"""Packed data at an address: copied once, whole and checked; what goes wrong, in one line."""

import subprocess
import sys
import threading

import pytest

from bitbyte import shards
from bitbyte.cli.dispatch import main
from bitbyte.config import TrainConfig
from bitbyte.data import pack as pack_module
from bitbyte.data import remote
from bitbyte.data.readers import find_data
from bitbyte.files import BitbyteError, RunError, folder_lock, user_path
from bitbyte.shards import MANIFEST, open_dataset
from bitbyte.train import train

fsspec = pytest.importorskip("fsspec")
ADDRESS = "memory://bucket/poems"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The file system of `ADDRESS`, which holds packed data; artifacts are in tmp_path."""
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    documents = [bytes([65 + i % 26]) * 900 for i in range(40)]
    pack_module.pack(documents, tmp_path / "poems", shard_size_gb=9e-6, progress=False)
    system = fsspec.filesystem("memory")
    system.put(f"{tmp_path / 'poems'}/", "/bucket/poems/", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


@pytest.fixture
def opened(place, monkeypatch):
    """The names of the remote files that are read, as they are."""
    names, plain = [], type(place).open

    def spy(self, path, *args, **options):
        names.append(path.rpartition("/")[2])
        return plain(self, path, *args, **options)

    monkeypatch.setattr(type(place), "open", spy)
    return names


def test_a_copy_is_an_ordinary_packed_folder_and_is_made_once(place, opened, tmp_path):
    folder = find_data(ADDRESS)
    assert folder.parent == tmp_path / "artifacts" / "cache" and folder.name.startswith("poems-")
    assert shards.verify(folder) == shards.verify(tmp_path / "poems")
    a, b = (open_dataset(path, 100).fingerprint for path in (folder, tmp_path / "poems"))
    assert a == b
    opened.clear()
    assert find_data(ADDRESS + "/") == folder and opened == [MANIFEST]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".tmp")] == []


def test_only_the_split_that_is_asked_for(place, opened):
    folder = find_data(ADDRESS, "val")
    assert {name.partition("_")[0] for name in opened} == {MANIFEST, "val"}
    assert open_dataset(folder, 100, split="val").n_bytes
    with pytest.raises(BitbyteError, match="missing"):
        open_dataset(folder, 100, split="train")
    assert find_data(ADDRESS) == folder and open_dataset(folder, 100).n_bytes


def test_an_interrupted_copy_goes_on_where_it_stopped(place, opened, monkeypatch):
    plain, copied = remote._copy, []

    def dies(*args):
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(args[3].name)
        plain(*args)

    monkeypatch.setattr(remote, "_copy", dies)
    with pytest.raises(KeyboardInterrupt):
        find_data(ADDRESS)
    monkeypatch.setattr(remote, "_copy", plain)
    opened.clear()
    folder = find_data(ADDRESS)
    assert not set(copied) & set(opened)
    shards.verify(folder)
    (folder / copied[0]).write_bytes(b"cut")  # by a full disk, or a hand
    opened.clear()
    shards.verify(find_data(ADDRESS))
    assert opened == [MANIFEST, copied[0]]


def test_other_bytes_than_the_manifest_says_are_refused(place):
    name = "/bucket/poems/shard_00001.bin"
    good = place.cat_file(name)
    for bad in (good[:-1], b"x" + good[1:], good + b"x"):
        place.pipe_file(name, bad)
        with pytest.raises(BitbyteError, match=r"shard_00001\.bin is not what manifest"):
            find_data(ADDRESS)
    folder = next(path for path in user_path(remote.artifacts("cache")).iterdir())
    assert not (folder / MANIFEST).exists() and not (folder / "shard_00001.bin").exists()
    place.pipe_file(name, good)
    shards.verify(find_data(ADDRESS))


def test_data_that_was_packed_anew_is_another_folder(place, tmp_path):
    first = find_data(ADDRESS)
    pack_module.pack([b"new" * 999] * 9, tmp_path / "new", progress=False)
    place.rm("/bucket/poems", recursive=True)
    place.put(f"{tmp_path / 'new'}/", "/bucket/poems/", recursive=True)
    second = find_data(ADDRESS)
    assert second != first
    shards.verify(first)


def test_two_processes_copy_once(place, opened, monkeypatch):
    folder = find_data(ADDRESS)
    (folder / "shard_00000.bin").unlink()
    monkeypatch.setattr(remote, "WAIT", 0.01)
    opened.clear()
    found = []
    with folder_lock(folder):
        other = threading.Thread(target=lambda: found.append(find_data(ADDRESS)))
        other.start()
        other.join(0.2)
        assert other.is_alive() and opened == [MANIFEST]
        (folder / "shard_00000.bin").write_bytes(place.cat_file("/bucket/poems/shard_00000.bin"))
    other.join(60)
    assert found == [folder] and opened == [MANIFEST]


def test_what_cannot_be_read_is_said_in_one_line(place, monkeypatch):
    with pytest.raises(BitbyteError, match=r"there is no memory://bucket/none/manifest\.json"):
        find_data("memory://bucket/none")
    with pytest.raises(BitbyteError, match=r"no-such://x: Protocol not known"):
        find_data("no-such://x")

    def breaks(*args, **options):
        raise TimeoutError("the store does not answer\nat all")

    monkeypatch.setattr(type(place), "open", breaks)
    said = r"cannot read .*manifest.json \(TimeoutError: the store does not answer at all\)"
    with pytest.raises(RunError, match=said):
        find_data(ADDRESS)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(BitbyteError, match=r'needs fsspec: pip install "bitbyte\[remote\]"'):
        find_data(ADDRESS)


def test_an_address_is_not_a_path():
    """A Path would make s3:/bucket of it, and a folder of that name."""
    for name in ("s3://bucket/x", "memory://x"):
        with pytest.raises(BitbyteError, match="is an address, not a file or folder here"):
            user_path(name)
    with pytest.raises(BitbyteError, match="is an address"):
        train(TrainConfig(data="s3://bucket/x"))
    assert not remote.is_address("C:/data") and not remote.is_address("a/b:c")


def test_the_commands_take_addresses(place, tmp_path, capsys):
    words = ["--n_layer=1", "--d_model=32", "--seq_len=32", "--steps=2", "--device=cpu"]
    words += ["--no_progress", "--batch_size=2"]
    assert main(["train", "ar", "--data", ADDRESS, "--out", str(tmp_path / "run"), *words]) == 0
    assert main(["info", ADDRESS]) == 0
    assert "shards" in capsys.readouterr().out
    words = ["--resume", "--steps=3", "--out", str(tmp_path / "run"), "--data", ADDRESS]
    assert main(["train", "ar", *words]) == 0
    assert main(["pack", str(tmp_path / "poems"), "--out", "s3://bucket/x"]) == 2


def test_a_protocol_that_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    fsspec.get_filesystem_class.__globals__["_registry"].pop("s3", None)
    with pytest.raises(BitbyteError) as caught:
        find_data("s3://bucket/poems")
    advice = 's3fs is missing: pip install "bitbyte[remote]"'  # fsspec's own is not repeated
    assert str(caught.value) == f"s3://bucket/poems: {advice}"


def test_nothing_of_it_is_imported_unasked():
    code = "import sys, bitbyte.data.readers; sys.exit('fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_s3(place, tmp_path, monkeypatch):
    """A real client against a server on this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("bucket")
        system.put(f"{tmp_path / 'poems'}/", "bucket/poems/", recursive=True)
        folder = find_data("s3://bucket/poems")
        assert shards.verify(folder) == shards.verify(tmp_path / "poems")
        assert folder == find_data(ADDRESS)  # the same data
        with pytest.raises(BitbyteError, match="there is no s3://bucket/none/manifest"):
            find_data("s3://bucket/none")
    finally:
        server.stop()
