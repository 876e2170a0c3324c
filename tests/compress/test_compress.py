"""Round trips of files: any bytes, any layout; damage, other models, kills, a full disk."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Bytes, save_run

from bitbyte import checkpoint, models, scoring
from bitbyte.cli.dispatch import main
from bitbyte.compress import codec, container, predictors, rans
from bitbyte.compress.codec import compress_file, decode_block, decompress_file, encode_block
from bitbyte.compress.container import HEADER_BYTES, LEAST, Header
from bitbyte.config import DiffusionConfig, MambaConfig, TransformerConfig
from bitbyte.device import settings_kept
from bitbyte.files import BitbyteError
from bitbyte.kernels import engine
from bitbyte.vocab import START

AR = TransformerConfig(n_layer=1, d_model=32, d_ff=32, n_head=2, seq_len=32, linear="dense")
MAMBA = MambaConfig(n_layer=1, d_model=64, seq_len=32, d_state=4)
TERNARY = dataclasses.replace(AR, d_model=64, linear="ternary")


def built(config, seed=0):
    """A model with random weights that has preferences: its own texts cost 4 to 6 bits a byte."""
    model = models.build(config, seed)
    with torch.no_grad():
        model.embed.normal_(std=0.25, generator=torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def drawn(model, n: int, seed=0) -> bytes:
    """A text that the model likes: drawn from it, window by window."""
    generator, out = torch.Generator().manual_seed(seed), []
    while len(out) < n:
        state, now = model.init_state(1), torch.tensor([START])
        for _ in range(model.config.seq_len):
            logits, state = model.step(now, state)
            now = torch.multinomial(logits.softmax(-1), 1, generator=generator)[0]
            out.append(int(now))
    return bytes(out[:n])


TEXT = drawn(built(AR), 190)
CASES = {
    "empty": b"", "one": b"x", "zero": b"\0", "all": bytes(range(256)), "text": TEXT,
    "noise": random.Random(0).randbytes(500), "same": b"a" * 300, "window": TEXT[:32],
    "one more": TEXT[:33],
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return built(AR)


@pytest.fixture
def files(tmp_path):
    """source, packed, back: paths; the first holds TEXT."""
    paths = [tmp_path / name for name in ("source", "packed", "back")]
    paths[0].write_bytes(TEXT)
    return paths


def round_trip(data, model, folder, **options):
    source, packed, back = (folder / name for name in ("s", "p", "b"))
    source.write_bytes(data)
    coded = compress_file(source, packed, model, allow_overwrite=True, **options)
    decompress_file(packed, back, model, allow_overwrite=True)
    assert back.read_bytes() == data
    assert coded.size == packed.stat().st_size
    return coded


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_what_is_made_of_a_private_file_is_private(files, model):
    source, packed, back = files
    source.chmod(0o600)
    compress_file(source, packed, model)
    decompress_file(packed, back, model)
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600] * 3


class Weather:
    """A predictor without a model, of the last two ids: bytes below 64 are likelier."""

    mode, fingerprint, window, kernels = "float", bytes(16), 16, {}

    def __init__(self, at_once=False, window=16):
        self.at_once, self.window, self.seen = at_once, window, 0
        logits = np.random.default_rng(3).standard_normal((64, 256)) + 4 * (np.arange(256) < 64)
        self.table = predictors.counts_from_floats(logits)

    def start(self, n_lanes):
        return np.zeros(n_lanes, np.int64)

    def step(self, ids_S, state):
        self.seen += len(ids_S)
        return self.table[(ids_S * 7 + state) % 64], ids_S.copy()

    def windows(self, ids_ST):
        if not self.at_once:
            return None
        before = np.pad(ids_ST[:, :-1], ((0, 0), (1, 0)))
        return self.table[(ids_ST * 7 + before) % 64]


def header_for(lanes, window, groups, length):
    return Header(
        mode="float", lanes=lanes, window=window, block=lanes * window * groups, length=length,
        model=bytes(16), fingerprint=bytes(16),
    )  # fmt: skip


LIKELY = st.one_of(st.integers(0, 63), st.integers(0, 63), st.integers(0, 255))


@given(st.lists(LIKELY, min_size=1, max_size=600), st.integers(1, 40), st.integers(1, 30),
       st.booleans())  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_blocks_of_any_bytes_in_any_layout(values, lanes, window, at_once):
    data = bytes(values)
    law, header = Weather(at_once, window), header_for(lanes, window, 1000, len(data))
    payload, n_states, bits, _ = encode_block(data, header, law, lambda *_: None)
    assert len(payload) <= len(data)
    assert decode_block(payload, n_states, len(data), header, law, lambda _: None)[0] == data
    if n_states:
        assert 8 * len(payload) <= bits + 64 * n_states + 1


def test_many_states_and_groups(monkeypatch):
    """Several coder states, and a last group that is not full."""
    monkeypatch.setattr(rans, "n_states_for", lambda *_: 8)
    law, header = Weather(at_once=True), header_for(30, 16, 200, 50_001)
    data = np.random.default_rng(1).integers(0, 64, 50_001).astype(np.uint8).tobytes()
    payload, n_states, bits, _ = encode_block(data, header, law, lambda *_: None)
    assert n_states == 8 and bits < 7 * len(data)
    assert 0 < len(payload) * 8 - bits < 64 * 8
    assert decode_block(payload, n_states, len(data), header, law, lambda _: None)[0] == data


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lanes", [1, 3, 128])
def test_files_of_all_kinds(name, lanes, model, tmp_path):
    coded = round_trip(CASES[name], model, tmp_path, mode="float", lanes=lanes)
    assert coded.header.length == len(CASES[name])
    if not CASES[name]:
        assert coded.size == LEAST


@given(st.binary(max_size=300), st.integers(1, 12), st.integers(1, 400))
@settings(max_examples=25, deadline=None)
def test_any_bytes_lanes_and_blocks(tmp_path_factory, data, lanes, block):
    small = built(AR)
    round_trip(data, small, tmp_path_factory.mktemp("any"), mode="float", lanes=lanes, block=block)


def test_either_engine(tmp_path):
    """Files of both decode; the native engine encodes whole windows, with any number of threads."""
    model = built(dataclasses.replace(AR, d_model=64))
    if engine.described(model) != "native":
        pytest.skip(engine.described(model))
    source, packed, back = (tmp_path / name for name in "spb")
    source.write_bytes(TEXT)
    sizes = []
    for how in ("torch", "native"):
        engine.choose(model, how)
        for threads in (1, 2):
            with settings_kept():
                torch.set_num_threads(threads)
                coded = compress_file(source, packed, model, mode="float", allow_overwrite=True)
            assert coded.kernels["engine"].split()[0] == how
            engine.choose(model, "auto")
            decompress_file(packed, back, model, allow_overwrite=True)
            assert model.engine == "auto"  # whichever decoded
            assert back.read_bytes() == TEXT
            sizes.append(coded.size)
            engine.choose(model, how)
        if how == "native":
            predictor = predictors.FloatPredictor(model, 3)
            ids_ST = np.random.default_rng(0).integers(0, 256, (3, 32))
            state, steps = predictor.start(3), []
            for ids_S in ids_ST.T:
                counts_SV, state = predictor.step(ids_S, state)
                steps.append(counts_SV)
            assert np.array_equal(predictor.windows(ids_ST), np.stack(steps, 1))
    assert max(sizes) - min(sizes) <= 8


@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
@pytest.mark.parametrize("linear", ["dense", "ternary"])
def test_mamba(ssm, linear, tmp_path):
    small = built(dataclasses.replace(MAMBA, ssm=ssm, linear=linear))
    coded = round_trip(drawn(small, 200), small, tmp_path)
    assert not coded.stored and coded.payload < 200


def test_portable_is_the_default_where_there_is_one(tmp_path):
    small = built(TERNARY)
    assert predictors.supports(TERNARY) and not predictors.supports(AR)
    engine.choose(small, "torch")  # else it would be native
    modes = {mode: round_trip(TEXT, small, tmp_path, mode=mode) for mode in ("auto", "float")}
    assert [coded.header.mode for coded in modes.values()] == ["portable", "float"]
    assert round_trip(b"", small, tmp_path).header.mode == "portable"
    with pytest.raises(BitbyteError, match="no portable mode"):
        round_trip(TEXT, built(AR), tmp_path, mode="portable")
    with pytest.raises(BitbyteError, match="auto, native, portable, float"):
        round_trip(TEXT, small, tmp_path, mode="fast")


def test_size_is_what_evaluate_promises(model, tmp_path):
    data = drawn(model, 4000)
    coded = round_trip(data, model, tmp_path, mode="float")
    score = scoring.score(model, Bytes(data))
    assert abs(coded.table_bits / score.bits - 1) < 1e-4
    assert 0 < coded.payload * 8 - coded.table_bits <= 64 and not coded.stored


def test_what_coding_would_make_longer_is_stored(model, tmp_path):
    coded = round_trip(CASES["noise"], model, tmp_path, mode="float")
    assert coded.stored == coded.payload == 500
    assert coded.size == 500 + LEAST + container.LEAST_BLOCK - 1
    assert coded.table_bits > 4000


def test_lanes_change_the_file_and_not_what_comes_back(model, tmp_path):
    packed = set()
    for lanes in (1, 2, 6):
        assert round_trip(TEXT, model, tmp_path, mode="float", lanes=lanes).header.lanes == lanes
        packed.add((tmp_path / "p").read_bytes())
    assert len(packed) == 3
    assert [codec.lanes_for(n, 32, 4) for n in (0, 1, 32, 33, 128, 129, 160, 999)] == [
        1, 1, 1, 2, 4, 3, 3, 4,
    ]  # fmt: skip


def test_counts():
    logits = np.array([[0.0] * 256, [1e4] + [0.0] * 255, [-1e30] * 255 + [5.0]])
    counts = predictors.counts_from_floats(logits)
    assert counts.dtype == np.uint32 and (counts.sum(1) == rans.TOTAL).all() and counts.min() == 1
    assert set(counts[0]) == {rans.TOTAL // 256}
    assert counts[1, 0] == counts[2, 255] == rans.TOTAL - 255
    for bad in (np.nan, np.inf):
        with pytest.raises(BitbyteError, match="NaN or infinite"):
            predictors.counts_from_floats(np.full((1, 256), bad))


# --- damage


@pytest.fixture(scope="module")
def real_file(model, tmp_path_factory):
    """(packed bytes, a folder): TEXT in two blocks, coded with the model."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "s").write_bytes(TEXT)
    coded = compress_file(folder / "s", folder / "p", model, mode="float", lanes=3, block=40)
    assert not coded.stored and coded.header.n_blocks == 2 and coded.payload > 50
    return (folder / "p").read_bytes(), folder


@pytest.fixture
def small_file(model, tmp_path, monkeypatch):
    """(packed bytes, a folder): three blocks, coded with the fast predictor, also to be decoded."""
    monkeypatch.setattr(codec, "predictor_for", lambda *_, **__: Weather(window=32))
    (tmp_path / "s").write_bytes(bytes(i * i % 61 for i in range(192)) + bytes(range(200, 208)))
    coded = compress_file(tmp_path / "s", tmp_path / "p", model, lanes=3, block=40)
    assert coded.stored == 8 and coded.header.n_blocks == 3
    return (tmp_path / "p").read_bytes(), tmp_path


def refused(raw, model, folder) -> str:
    """The message for a damaged file; nothing may be left behind."""
    path, back = folder / "damaged", folder / "never"
    path.write_bytes(raw)
    with pytest.raises(BitbyteError) as error:
        decompress_file(path, back, model)
    assert not back.exists() and "\n" not in str(error.value)
    assert not [p for p in folder.iterdir() if p.name.startswith(".tmp")]
    return str(error.value)


def test_truncation_at_every_offset(model, small_file):
    packed, folder = small_file
    for size in range(len(packed)):
        assert refused(packed[:size], model, folder)
    assert "bytes after its end" in refused(packed + b"x", model, folder)


def test_edits_of_single_bytes(model, small_file):
    packed, folder = small_file
    random.seed(5)
    for _ in range(1000):
        place, change = random.randrange(len(packed)), random.randrange(1, 256)
        edited = bytearray(packed)
        edited[place] ^= change
        assert refused(bytes(edited), model, folder)


def test_edits_behind_the_check_sums(model, small_file):
    """Even with the checksums rewritten, a damaged file never yields wrong bytes."""
    packed, folder = small_file
    header = container.parse_header(packed, len(packed), "x")
    blocks, at = [], HEADER_BYTES
    for _ in range(header.n_blocks):
        _, n_states, n_words = container.BLOCK.unpack_from(packed, at)
        stop = at + container.BLOCK.size + 8 * n_states + 4 * n_words
        if not n_states:
            stop = at + container.BLOCK.size + container.BLOCK.unpack_from(packed, at)[0]
        blocks.append((at, stop))
        at = stop + 4
    random.seed(6)
    messages = set()
    for turn in range(300):
        start, stop = random.choice(blocks) if turn % 3 else (0, HEADER_BYTES - 4)
        edited = bytearray(packed)
        place = random.randrange(start, stop)
        if 64 <= place < HEADER_BYTES - 4:
            continue  # the thread count: another one may well give the same numbers
        edited[place] ^= random.randrange(1, 256)
        edited[stop : stop + 4] = zlib.crc32(edited[start:stop]).to_bytes(4, "little")
        messages.add(refused(bytes(edited), model, folder))
    assert any("SHA-256" in text for text in messages)  # of a stored block


@pytest.fixture
def counted(monkeypatch):
    """The numbers of CPU threads asked for, in order; none is started."""
    asked = [1]
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1])
    return asked


def with_threads(packed: bytes, n: int) -> bytes:
    """The same file, as if made with another number of threads."""
    raw = container.HEADER.pack(*container.HEADER.unpack_from(packed)[:-1], n)
    return raw + zlib.crc32(raw).to_bytes(4, "little") + packed[HEADER_BYTES:]


@pytest.mark.parametrize("processors", [1, 64, None])
def test_as_many_threads_decode_as_made_the_file(
    processors, model, real_file, tmp_path, counted, monkeypatch
):
    """Fewer would sum in a different order on some machines; more than processors are slow."""
    packed, folder = real_file
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    for threads in (1, 3, codec.MOST_THREADS):
        (folder / "other").write_bytes(with_threads(packed, threads))
        decompress_file(folder / "other", tmp_path / str(threads), model)
        assert (tmp_path / str(threads)).read_bytes() == TEXT
        assert counted[-2:] == [threads, 1]  # and those of before again
    (folder / "other").write_bytes(with_threads(packed, 0))
    decompress_file(folder / "other", tmp_path / "0", model)
    assert counted[-2:] == [1, 1]


def test_more_threads_than_can_be_had_are_refused(model, real_file, files, counted, monkeypatch):
    packed, folder = real_file
    (folder / "other").write_bytes(with_threads(packed, codec.MOST_THREADS + 1))
    with pytest.raises(BitbyteError, match=r"was made with 513 CPU threads .* at most 512 can be"):
        decompress_file(folder / "other", folder / "never", model)
    torch.set_num_threads(600)
    with pytest.raises(BitbyteError, match="float mode with 600 threads"):
        compress_file(*files[:2], model, mode="float")
    assert not (folder / "never").exists() and not files[1].exists()
    monkeypatch.setattr(os, "cpu_count", lambda: 600)
    assert compress_file(*files[:2], model, mode="float").header.threads == 600
    torch.set_num_threads(1)
    decompress_file(*files[1:], model)
    assert files[2].read_bytes() == TEXT and counted[-2:] == [600, 1]


@pytest.mark.parametrize("name", ["length", "block", "lanes", "window", "bits", "mode"])
def test_absurd_headers(name, model, small_file):
    packed, folder = small_file
    fields = list(container.HEADER.unpack_from(packed))
    place = {"mode": 2, "bits": 3, "lanes": 4, "window": 5, "block": 6, "length": 7}[name]
    absurd = [0, 2**64 - 1, 2**63] if name == "length" else [0, 255, 2**32 - 1]
    for value in absurd if name not in ("mode", "bits") else [9, 255]:
        fields[place] = value
        raw = container.HEADER.pack(*fields)
        raw += zlib.crc32(raw).to_bytes(4, "little")
        tracemalloc.start()
        refused(raw + packed[HEADER_BYTES:], model, folder)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


@pytest.mark.parametrize(("states", "words"), [(0, 5), (2**32 - 1, 0), (1, 2**32 - 1), (4, 0)])
def test_absurd_blocks(states, words, model, small_file):
    packed, folder = small_file
    n_bytes = container.BLOCK.unpack_from(packed, HEADER_BYTES)[0]
    block = container.BLOCK.pack(n_bytes, states, words)
    edited = packed[:HEADER_BYTES] + block + packed[HEADER_BYTES + len(block) :]
    assert "damaged" in refused(edited, model, folder)


def test_other_models_versions_and_files(model, real_file, monkeypatch):
    packed, folder = real_file
    assert "another model" in refused(packed, built(AR, seed=1), folder)
    longer = built(dataclasses.replace(AR, seq_len=64))
    assert "another model" in refused(packed, longer, folder)
    for version, said in ((2, "was made by the mixer"), (3, "version 3, made by a newer")):
        other = packed[:8] + bytes([version, 0]) + packed[10:]
        assert said in refused(other, model, folder)
    for other in (b"", b"x", b"PK\3\4" + bytes(200), bytes(300)):
        assert "not a bitbyte-compressed file" in refused(other, model, folder)
    monkeypatch.setattr(predictors, "counts_from_floats", shifted(predictors.counts_from_floats))
    message = refused(packed, model, folder)
    assert "the numbers differ" in message and "processor" in message


def shifted(plain):
    """As on a machine whose last digits differ."""

    def counts(logits):
        return plain(logits * np.float32(1 + 2**-20))

    return counts


def test_a_difference_that_the_probe_misses_is_found_at_the_end(model, real_file, monkeypatch):
    packed, folder = real_file
    plain, good = predictors.counts_from_floats, predictors.FloatPredictor(model, 3).fingerprint
    monkeypatch.setattr(predictors.FloatPredictor, "fingerprint", good)
    monkeypatch.setattr(predictors, "counts_from_floats", lambda x: np.roll(plain(x), 1, 1))
    assert "does not decode" in (text := refused(packed, model, folder)) or "SHA-256" in text


def test_families_without_a_next_byte(files):
    model = built(DiffusionConfig(n_layer=1, d_model=32, d_ff=32, n_head=2, seq_len=32))
    with pytest.raises(BitbyteError, match="diffusion model of whole windows has no next byte"):
        compress_file(*files[:2], model)
    assert not files[1].exists()


# --- files


def test_nothing_is_overwritten_unless_asked(model, files):
    source, packed, back = files
    compress_file(source, packed, model, mode="float")
    first = packed.read_bytes()
    with pytest.raises(BitbyteError, match="allow_overwrite"):
        compress_file(source, packed, model)
    back.write_bytes(b"mine")
    with pytest.raises(BitbyteError, match="allow_overwrite"):
        decompress_file(packed, back, model)
    assert packed.read_bytes() == first and back.read_bytes() == b"mine"
    decompress_file(packed, back, model, allow_overwrite=True)
    assert back.read_bytes() == TEXT
    decompress_file(packed, packed, model, allow_overwrite=True)  # in place
    assert packed.read_bytes() == TEXT


def test_bad_paths_and_numbers(model, files, tmp_path):
    source, packed, _ = files
    for path, words in ((tmp_path, "a folder"), (tmp_path / "no", "not exist"), ("-", "input")):
        with pytest.raises(BitbyteError, match=words):
            compress_file(path, packed, model)
    for path in (tmp_path, tmp_path / "no" / "file", "-"):
        with pytest.raises(BitbyteError, match=r"folder|output"):
            compress_file(source, path, model)
    for lanes in (0, -1, 5000):
        with pytest.raises(BitbyteError, match="between 1 and 4096"):
            compress_file(source, packed, model, lanes=lanes)
    assert not packed.exists()


@pytest.mark.skipif(os.name == "nt", reason="pipes by name are a POSIX thing")
def test_pipes(model, files, tmp_path):
    """They can be written to, and stay; compressing them fails with a clear message."""
    source, packed, back = files
    compress_file(source, packed, model, mode="float")
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    for work in (
        lambda: compress_file(source, pipe, model, mode="float").size,
        lambda: decompress_file(packed, pipe, model) and len(TEXT),
    ):
        reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
        reader.start()
        size = work()
        reader.join(30)
        assert size == len(got[-1])
    assert got == [packed.read_bytes(), TEXT] and pipe.is_fifo()
    for attempt in (lambda: compress_file(pipe, back, model), lambda: container.read_header(pipe)):
        with pytest.raises(BitbyteError, match="a pipe or a device, whose length is unknown"):
            attempt()


def test_a_file_that_grows_is_refused(model, files, monkeypatch):
    source, packed, _ = files

    def grow(*args):
        source.write_bytes(TEXT * 2)
        return encode_block(*args)

    monkeypatch.setattr(codec, "encode_block", grow)
    with pytest.raises(BitbyteError, match="changed while"):
        compress_file(source, packed, model, mode="float", block=32)
    assert not packed.exists()


def test_full_disk(model, files, monkeypatch, capsys, tmp_path):
    resource = pytest.importorskip("resource")
    source, packed, back = files
    compress_file(source, packed, model, mode="float")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, old[1]))
    try:
        with pytest.raises(OSError, match="nothing was written") as error:
            decompress_file(packed, back, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert error.value.filename == str(back)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 10}))
    with pytest.raises(OSError, match="nothing was written"):
        decompress_file(packed, back, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "source"]


def test_memory_does_not_grow_with_the_file(model, tmp_path, monkeypatch):
    law = Weather(at_once=True)
    monkeypatch.setattr(codec, "predictor_for", lambda *_, **__: law)
    peaks = []
    for size in (1 << 14, 1 << 17):
        source = tmp_path / "s"
        source.write_bytes(bytes(range(64)) * (size // 64))
        tracemalloc.start()
        options = {"lanes": 64, "block": 1 << 13, "allow_overwrite": True}
        wide = dataclasses.replace(AR, seq_len=16)
        monkeypatch.setattr(model, "config", wide)
        compress_file(source, tmp_path / "p", model, **options)
        decompress_file(tmp_path / "p", tmp_path / "b", model, allow_overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert source.read_bytes() == (tmp_path / "b").read_bytes()
    assert peaks[1] < 1.1 * peaks[0] + (1 << 16)


# --- processes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of the tiny model, in an artifacts folder of its own."""
    folder = tmp_path_factory.mktemp("artifacts") / "checkpoints" / "tiny"
    save_run(folder, built(AR))
    return folder


def command(run, *words, threads=1, code=None):
    """(command line, options) of ``bitbyte`` in a separate process."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "BITBYTE_ARTIFACTS": str(run.parents[1]),
    }  # fmt: skip
    start = (
        code or "import sys; from bitbyte.cli.dispatch import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", start, *map(str, words)], {"env": environment, "text": True}


def test_commands_find_the_checkpoint(run, files, monkeypatch, capsys):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(run.parents[1]))
    source, packed, back = map(str, files)
    assert main(["compress", "tiny", source, packed]) == 0
    assert main(["decompress", packed, back]) == 0
    assert files[2].read_bytes() == TEXT
    said = capsys.readouterr().out.splitlines()
    n = torch.get_num_threads()
    assert said[1].startswith(f"{packed}: float mode: it can only be decoded with {n} CPU thread")
    assert "a machine that computes the same numbers" in said[1] and len(said) == 3
    assert main(["decompress", packed, back]) == 2
    assert "--allow_overwrite" in capsys.readouterr().err
    assert main(["decompress", packed, back, "--ckpt", str(run), "--allow-overwrite"]) == 0
    capsys.readouterr()
    assert main(["compress", "tiny", source, packed + "2", "--threads", "-1"]) == 2
    assert "threads is -1; it must be at least 1" in capsys.readouterr().err
    if Path("/proc/self").is_dir():  # where nobody may write
        assert main(["compress", "tiny", source, "/proc/none"]) == 2
        assert "cannot write /proc/none" in capsys.readouterr().err
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(files[0].parent))
    assert main(["decompress", packed, back, "--allow-overwrite"]) == 2
    assert "--ckpt" in capsys.readouterr().err


def test_one_and_two_threads(run, files):
    """A float file decodes with the threads that made it, whatever the decoder starts with."""
    source, packed, back = files
    call, options = command(run, "compress", run, source, packed, threads=1)
    subprocess.run(call, **options, check=True)
    assert container.read_header(packed).threads == 1
    call, options = command(run, "decompress", packed, back, threads=2)
    subprocess.run(call, **options, check=True)
    assert back.read_bytes() == TEXT
    before = torch.get_num_threads()
    decompress_file(packed, files[0].with_name("again"), *checkpoint.load_model(run))
    assert torch.get_num_threads() == before


def test_two_processes_at_once(run, files):
    """Two writers of one name: one gets an error, and the file is whole."""
    source, packed, back = files
    call, options = command(run, "compress", run, source, packed)
    pair = [subprocess.Popen(call, **options, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 2], said
    decompress_file(packed, back, *checkpoint.load_model(run))
    assert back.read_bytes() == TEXT


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored, as in a job of a shell
from bitbyte.cli import main
from bitbyte.compress import codec
plain = codec.encode_block
def slow(*args):
    done = plain(*args)
    print("block", flush=True)
    time.sleep(20)
    return done
codec.encode_block = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(
    "number", [getattr(signal, f"SIG{name}", 0) for name in ("INT", "TERM", "HUP", "KILL")]
)
def test_killed_half_way(number, run, files):
    source, packed, _ = files
    packed.write_bytes(b"before")
    call, options = command(run, "compress", run, source, packed, "--allow_overwrite", code=SLOW)
    process = subprocess.Popen(call, **options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "block\n"
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 130)
    assert killed or "stopped" in said
    assert packed.read_bytes() == b"before"
    left = [path.name for path in packed.parent.iterdir() if path.name.startswith(".tmp")]
    assert len(left) == killed
    compress_file(source, packed, built(AR), mode="float", allow_overwrite=True)
