"""Writing a text in turns with a model, in a terminal or through a pipe.

Typed lines are appended to the text, and the model continues it; nothing is put between the turns.
The text is bytes: unprintable ones are shown escaped and saved unchanged.  The model's output and
the answers to /help and /config go to standard output, everything else to standard error.
"""

import contextlib
import dataclasses
import math
import os
import sys
import time

from bitbyte import checkpoint, generate, runs
from bitbyte.config import SamplingConfig
from bitbyte.device import choose_device
from bitbyte.files import BitbyteError, read_input, reason, shown, user_path, write_atomic
from bitbyte.kernels.engine import choose
from bitbyte.process import Terminated, say
from bitbyte.vocab import on_terminal, printable

SETTINGS = {  # command -> field of SamplingConfig
    "temp": "temperature",
    "topk": "top_k",
    "topp": "top_p",
    "minp": "min_p",
    "rep": "repetition_penalty",
    "length": "max_new_tokens",
    "seed": "seed",
}
HELP = """\
What you type is added to the text, and the model continues from there.  An empty line continues
without adding anything; a line that begins with // adds a line that begins with /.
  /config                 show the settings and the length of the text
  /temp N  /topk N  /topp N  /minp N  /rep N  /length N  /seed N
                          change a setting; without N: show it and its range
  /undo                   take back the last turn
  /reset                  start a new text, with the same settings
  /load FILE              replace the text with the bytes of a file
  /save FILE              write the bytes of the text to a new file
  /model CKPT             continue with another checkpoint
  /quit                   leave, as Ctrl-D does; Ctrl-C only stops the model"""


def allowed(field: str) -> str:
    """The range of a field of SamplingConfig, as its error words it; no field allows -1."""
    try:
        SamplingConfig(**{field: -1})
    except BitbyteError as error:
        return str(error).partition("it must be ")[2]


class Chat:
    """The text, the settings and the model of one chat."""

    def __init__(
        self, ckpt: str, config: SamplingConfig, slide: str, device: str, engine: str = "auto",
        threads: int | None = None,
    ):  # fmt: skip
        self.config, self.slide, self.device = config, slide, device
        self.engine, self.threads = engine, threads
        self.text, self.before = b"", []  # before: earlier texts, for /undo
        self.on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.set_model(ckpt)

    def run(self) -> None:
        """Answer lines until the input ends."""
        if self.on_terminal:
            with contextlib.suppress(ImportError):  # not on Windows
                import readline  # noqa: F401 - gives input() arrow keys and a history
            sys.stdin.reconfigure(errors="surrogateescape")
            say(f"{self.ckpt}: type a beginning, /help for help")
            self.show_config()
        while True:
            try:
                line = self.read()
                if line is None or line == b"/quit":
                    return
                self.answer(line)
            except BitbyteError as error:
                say(f"error: {error}")
            except OSError as error:
                if isinstance(error, BrokenPipeError):
                    raise
                say(f"error: {shown(reason(error))}")
            except MemoryError:
                say("error: out of memory")
            except KeyboardInterrupt as stop:
                if not self.on_terminal or isinstance(stop, Terminated):
                    raise
                say("\n(Ctrl-D or /quit leaves)")

    def read(self) -> bytes | None:
        """One line without its line ending, None after the last one."""
        if not self.on_terminal:  # a pipe may hold any bytes, not only text
            line = sys.stdin.buffer.readline()
            return line.removesuffix(b"\n").removesuffix(b"\r") if line else None
        try:
            return input("> ").encode("utf-8", "surrogateescape")
        except EOFError:
            print()
            return None

    def answer(self, line: bytes) -> None:
        """Handle one line.  Raises BitbyteError, OSError."""
        if not line.startswith(b"/") or line.startswith(b"//"):
            return self.go_on(line[1:] if line.startswith(b"//") else line)
        word, _, rest = os.fsdecode(line[1:]).partition(" ")
        value = rest.strip()
        if word in SETTINGS or word in SETTINGS.values():  # also by the name of the option
            return self.set(SETTINGS.get(word, word), value)
        actions = {
            "help": lambda: print(HELP, flush=True), "config": self.show_config,
            "undo": self.undo, "reset": self.reset,
        }  # fmt: skip
        with_value = {"load": self.load, "save": self.save, "model": self.set_model}
        if word in actions and not value:
            actions[word]()
        elif word in with_value and value:
            with_value[word](value)
        elif word in with_value or word in actions or word == "quit":
            needs = "needs a name after it" if word in with_value else "takes nothing after it"
            raise BitbyteError(f"/{word} {needs}; see /help")
        else:
            raise BitbyteError(f"no command /{printable(os.fsencode(word))}; see /help")

    # --- commands

    def set_model(self, ckpt: str) -> None:
        folder = runs.resolve(ckpt)
        config = checkpoint.read_meta(folder)["config"]
        if config.get("family") == "diffusion" and not config.get("block"):
            raise BitbyteError(
                f"{ckpt} is of family diffusion, which has no next byte to chat with; use bitbyte "
                "infill or bitbyte sample for it, and here a model of ar, mamba or blocks"
            )
        model, _ = checkpoint.load_model(folder, device=choose_device(self.device))
        choose(model, self.engine, self.threads)
        self.model, self.ckpt = model, ckpt

    def set(self, field: str, text: str) -> None:
        if text:
            try:
                value = SamplingConfig.__annotations__[field](text)
            except ValueError:
                short = printable(os.fsencode(text))[:40]
                raise BitbyteError(f"{field} is {short!r}; it must be {allowed(field)}") from None
            self.config = dataclasses.replace(self.config, **{field: value})
        say(f"{field} = {getattr(self.config, field)} ({allowed(field)})")

    def show_config(self) -> None:
        for word, field in SETTINGS.items():
            print(f"  /{word:7}{field} = {getattr(self.config, field)} ({allowed(field)})")
        print(f"  model {self.ckpt}, text of {len(self.text)} bytes", flush=True)

    def undo(self) -> None:
        if not self.before:
            raise BitbyteError("there is nothing to undo")
        self.text = self.before.pop()
        self.show_end()

    def reset(self) -> None:
        self.before.append(self.text)
        self.text = b""
        say("the text is empty")

    def load(self, name: str) -> None:
        data = read_input(user_path(name))
        self.before.append(self.text)
        self.text = data
        self.show_end()

    def save(self, name: str) -> None:
        path = user_path(name)
        if path.exists():
            raise BitbyteError(f"{shown(path)} exists; choose a new name")
        write_atomic(path, self.text, follow=True, overwrite=False)
        say(f"{shown(path)}: {len(self.text)} bytes")

    def show_end(self) -> None:
        end = self.text[-60:]
        dots = "..." if len(end) < len(self.text) else ""
        say(f"the text has {len(self.text)} bytes: {dots}{printable(end)}")

    # --- sampling

    def go_on(self, typed: bytes) -> None:
        """Add the typed bytes, then what the model generates; Ctrl-C stops it early."""
        self.before.append(self.text)
        self.text += typed
        shown, made, bits = generate.Utf8Stream(), bytearray(), []
        shown.push(self.text)  # the first new bytes may complete a character of it
        begin, first, stopped = time.perf_counter(), 0.0, ""
        bytes_made = generate.stream(
            self.model, self.text, self.config, slide=self.slide,
            on_stats=lambda stats: bits.append(stats.bits),
        )  # fmt: skip
        try:
            for byte in bytes_made:
                first = first or time.perf_counter() - begin
                made.append(byte)
                self.write(shown.push(bytes([byte])))
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated):
                raise
            stopped = "stopped, "
        finally:
            self.text += made
            self.write(shown.flush() + "\n")
        if self.on_terminal and made:
            seconds = time.perf_counter() - begin
            say(
                f"[{stopped}{len(made)} bytes, {len(made) / seconds:.0f} bytes/s, first after "
                f"{1000 * first:.0f} ms, {math.fsum(bits) / len(bits):.2f} bits/byte]"
            )

    def write(self, text: str) -> None:
        sys.stdout.write(on_terminal(text) if self.on_terminal else text)
        sys.stdout.flush()
