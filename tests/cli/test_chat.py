"""The chat in a terminal and through pipes: what it makes, refuses, keeps and survives."""

import dataclasses
import errno
import io
import os
import select
import subprocess
import sys

import pytest
from support import save_bold

from bitbyte import checkpoint, generate
from bitbyte.cli import chat as chatting
from bitbyte.cli.text import chat
from bitbyte.config import SamplingConfig
from bitbyte.files import BitbyteError
from bitbyte.process import Terminated

RANGES = {
    "temp": "from 0 (greedy) to 10",
    "topk": "from 0 (off) to 256",
    "topp": "above 0 and at most 1 (off)",
    "minp": "from 0 (off) to 1",
    "rep": "from 0.1 to 10, 1 = off",
    "length": "at least 1",
    "seed": "from 0 to 2^63 - 1",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed, family in enumerate(("ar", "mamba", "diffusion")):
        save_bold(folder / family, family, seed=seed)
    return folder


@pytest.fixture
def piped(runs, monkeypatch, capsysbinary):
    """Chat through a pipe: (what the lines get on stdout, on stderr)."""

    def go(*lines, ckpt="ar", **options):
        data = b"".join(x if isinstance(x, bytes) else f"{x}\n".encode() for x in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        names = options.keys() & {field.name for field in dataclasses.fields(SamplingConfig)}
        settings = {"max_new_tokens": 12} | {name: options.pop(name) for name in names}
        chat(str(runs / ckpt), SamplingConfig(**settings), **options)
        said = capsysbinary.readouterr()
        return said.out, said.err.decode()

    return go


def wanted(runs, ckpt, prompt, **config) -> bytes:
    model, _ = checkpoint.load_model(runs / ckpt)
    config = SamplingConfig(**({"max_new_tokens": 12} | config))
    return generate.generate(model, prompt, config).bytes


def shown(before: bytes, new: bytes) -> bytes:
    """What a turn writes: the characters that ``new`` completes."""
    stream = generate.Utf8Stream()
    stream.push(before)
    return (stream.push(new) + stream.flush() + "\n").encode()


@pytest.mark.parametrize("ckpt", ["ar", "mamba"])
def test_turns_are_those_of_generate(piped, runs, ckpt):
    out, err = piped("Once", "//x", "", ckpt=ckpt, temperature=0.7, seed=3)
    text, pieces = b"", []
    for typed in (b"Once", b"/x", b""):
        text += typed
        new = wanted(runs, ckpt, text, temperature=0.7, seed=3)
        pieces.append(shown(text, new))
        text += new
    assert out == b"".join(pieces) and err == ""  # no prompt, no numbers, no escape codes


def test_settings_change_what_is_made(piped, runs):
    changes = {"temp": 0.5, "topk": 20, "topp": 0.9, "minp": 0.01, "rep": 1.2, "seed": 9}
    lines = [f"/{word} {value}" for word, value in changes.items()]
    out, err = piped(*lines, "/length 5", "Once", "/config", "/temp")
    config = {chatting.SETTINGS[word]: value for word, value in changes.items()}
    new = wanted(runs, "ar", b"Once", max_new_tokens=5, **config)
    first = shown(b"Once", new)
    assert out.startswith(first)
    table = out[len(first) :].decode()
    for word, value in (changes | {"length": 5}).items():
        assert f"{chatting.SETTINGS[word]} = {value} ({RANGES[word]})" in table
    assert "text of 9 bytes" in table
    assert err.endswith("temperature = 0.5 (from 0 (greedy) to 10)\n")


def test_settings_have_the_names_of_the_options_too(piped):
    _, err = piped("/temperature 0.25", "/top_k 7", "/temp", "/topk")
    assert "temperature = 0.25 (" in err and "top_k = 7 (" in err and "no command" not in err


@pytest.mark.parametrize("word", RANGES)
@pytest.mark.parametrize("value", ["-1", "abc", "nan", "1e999", "-" + "9" * 5000, "0x1", "1 2"])
def test_bad_values_are_refused_with_the_range(piped, word, value):
    out, err = piped(f"/{word} {value}", "/config")
    assert err.startswith("error: ") and RANGES[word] in err and err.count("\n") == 1
    field = chatting.SETTINGS[word]
    default = 12 if word == "length" else getattr(SamplingConfig(), field)
    assert f"{field} = {default} (" in out.decode()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/nothing", "no command /nothing; see /help"),
        ("/te\x1bmp 1", "no command /te\\x1bmp"),
        ("/save", "/save needs a name after it"),
        ("/reset now", "/reset takes nothing after it"),
        ("/quit now", "/quit takes nothing after it"),
        ("/undo", "nothing to undo"),
        ("/load nowhere/at/all", "there is no file nowhere/at/all"),
        ("/load .", ". is a folder"),
        ("/load -", "there is no file -"),
        ("/load ~nobody-of-this-name/x", "no home folder is known for ~nobody-of-this-name"),
        ("/save ~nobody-of-this-name/x", "no home folder is known for ~nobody-of-this-name"),
        ("/model ~nobody-of-this-name/x", "no home folder is known for ~nobody-of-this-name"),
        ("/load a\0b", "a\\x00b: a name cannot contain a zero byte"),
        ("/save nowhere/at/all", "nowhere/at/all is in a folder that does not exist"),
        ("/model nowhere", "no checkpoint 'nowhere'"),
    ],
)
def test_mistakes_are_one_line_and_the_chat_goes_on(piped, line, said):
    out, err = piped(line, "/help")
    assert said in err and err.startswith("error: ") and err.count("\n") == 1
    assert b"/load FILE" in out


def test_every_command_is_in_the_help():
    for word in (*chatting.SETTINGS, "undo", "reset", "load", "save", "model", "quit", "config"):
        assert f"/{word}" in chatting.HELP


def test_texts_are_saved_loaded_reset_and_taken_back(piped, runs, tmp_path):
    bad = b"caf\xc3\xa9 \xff\0\n"
    (tmp_path / "in put").write_bytes(bad)
    target = tmp_path / "out"
    new = wanted(runs, "ar", bad)
    out, err = piped(
        f"/load {tmp_path}/in put", "", f"/save {target}", f"/save {target}", "/undo",
        f"/save {target}2", "/reset", f"/save {target}3", "/undo", "/undo", f"/save {target}4",
    )  # fmt: skip
    assert target.read_bytes() == bad + new
    assert "error: " + str(target) + " exists; choose a new name" in err
    assert (tmp_path / "out2").read_bytes() == bad
    assert (tmp_path / "out3").read_bytes() == b"" == (tmp_path / "out4").read_bytes()
    assert out == shown(bad, new) and "the text has 9 bytes: caf\u00e9 \\xff\\x00\\n" in err


def test_any_bytes_may_be_typed_and_another_model_may_go_on(piped, runs, tmp_path):
    piped(b"\xff\xc3\r\n", f"/model {runs / 'mamba'}", b"\xa9\n", f"/save {tmp_path / 'out'}")
    text = b"\xff\xc3" + wanted(runs, "ar", b"\xff\xc3") + b"\xa9"
    assert (tmp_path / "out").read_bytes() == text + wanted(runs, "mamba", text)


def test_no_memory_for_a_file_ends_the_command_and_not_the_chat(piped, monkeypatch):
    def too_big(name):
        raise MemoryError

    monkeypatch.setattr(chatting, "read_input", too_big)
    out, err = piped("/load x", "/config")
    assert err == "error: out of memory\n" and b"text of 0 bytes" in out


def test_a_file_that_cannot_be_saved_is_named_and_leaves_nothing(piped, monkeypatch, tmp_path):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out, err = piped(f"/save {tmp_path / 'x'}", "/config")
    assert err == f"error: No space left on device, nothing was written: {tmp_path / 'x'}\n"
    assert b"text of 0 bytes" in out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_kill_ends_the_chat_in_the_midst_of_a_turn(runs, monkeypatch, on_terminal):
    """Unlike Ctrl-C, which on a terminal only ends what the model is saying."""

    def killed(*_, **__):
        yield 65
        raise Terminated

    monkeypatch.setattr(chatting.generate, "stream", killed)
    talk = chatting.Chat(str(runs / "ar"), SamplingConfig(), "exact", "cpu")
    monkeypatch.setattr(talk, "read", lambda: b"Once")
    talk.on_terminal = on_terminal
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    with pytest.raises(Terminated):
        talk.run()
    assert talk.text == b"OnceA"


def test_quit_ends_it_at_once(piped):
    assert piped("/quit", "Once") == (b"", "")


def test_other_families_and_bad_options_are_refused(piped, runs):
    with pytest.raises(BitbyteError, match=r"family diffusion.*use bitbyte infill or bitbyte samp"):
        piped(ckpt="diffusion")
    out, err = piped(f"/model {runs / 'diffusion'}", "/config")
    assert "family diffusion" in err and f"{runs.name}/ar, text".encode() in out.replace(
        b"\\", b"/"
    )
    with pytest.raises(BitbyteError, match="top_p is 2"):
        piped(top_p=2.0)
    with pytest.raises(BitbyteError, match="no slide 'off'"):
        piped(slide="off")


def test_a_damaged_model_ends_the_turn_and_not_the_chat(piped, monkeypatch):
    def broken(*_, **__):
        yield 65
        raise BitbyteError("the model gives NaN")

    monkeypatch.setattr(chatting.generate, "stream", broken)
    out, err = piped("Once", "/config")
    assert out.startswith(b"A\n") and err == "error: the model gives NaN\n"
    assert b"text of 5 bytes" in out


START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "import sys; from bitbyte.cli import chat, text; from bitbyte.config import SamplingConfig;"
)


def test_through_a_real_pipe(runs):
    code = START + f"text.chat({str(runs / 'ar')!r}, SamplingConfig(max_new_tokens=12))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=b"On\xffce", capture_output=True, check=False
    )
    assert done.returncode == 0 and done.stderr == b""
    new = wanted(runs, "ar", b"On\xffce")
    assert done.stdout.replace(b"\r", b"") == shown(b"On\xffce", new).replace(b"\r", b"")


@pytest.mark.skipif(os.name == "nt", reason="a pty is a POSIX thing")
def test_in_a_terminal_ctrl_c_stops_the_model_and_not_the_program(runs):
    import pty

    code = START + (
        "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # Ctrl-C is for it
        "import time; stream = chat.generate.stream\n"
        "def slow(*a, **k):\n"
        "    for byte in stream(*a, **k): time.sleep(0.005); yield byte\n"
        "chat.generate.stream = slow\n"
        f"text.chat({str(runs / 'ar')!r}, SamplingConfig(max_new_tokens=100000))"
    )
    main, side = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=side, stdout=side, stderr=side, start_new_session=True,
        env=os.environ | {"TERM": "dumb"},
    )  # fmt: skip
    os.close(side)
    said = bytearray()

    def more(seconds: float = 60) -> bool:
        ready = select.select([main], [], [], seconds)[0]
        said.extend(os.read(main, 4096) if ready else b"")
        return bool(ready)

    def until(text: bytes, since: int = 0) -> int:
        """Read up to ``text``; the place after it."""
        while text not in said[since:]:
            assert more(), bytes(said)
        return said.index(text, since) + len(text)

    try:
        until(b"> ")
        assert b"temperature = 0.8" in said
        os.write(main, b"Once\n")
        at = until(b"Once\r\n")
        while len(said) < at + 40:
            assert more(), bytes(said)
        os.write(main, b"\x03")
        at = until(b"> ", until(b"[stopped, "))
        # With nothing to stop it only says how to leave.  A signal between prompt and reading is
        # heard with the next key: press again.
        while b"/quit leaves)" not in said[at:]:
            os.write(main, b"\x03")
            more(1)
        at = until(b"> ", until(b"/quit leaves)", at))
        os.write(main, b"/seed 77\n")
        at = until(b"> ", until(b"seed = 77", at))
        os.write(main, b"\x1b[A\n")  # arrow up: the same command again
        at = until(b"> ", until(b"seed = 77", at))
        os.write(main, b"/config\n")
        until(b"> ", until(b"text of ", at))
        os.write(main, b"\x04")
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()
        os.close(main)
