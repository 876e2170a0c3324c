"""A sample that can be cut and continued, and the command that reproduces it."""

import dataclasses
import math
import shlex

from bitbyte.config import SamplingConfig
from bitbyte.runs import short_name
from bitbyte.vocab import printable

LONGEST = 8000  # bytes of a prompt in a command; escaped they must fit the 32,767 of Windows


@dataclasses.dataclass
class Sample:
    """Bytes that continue ``prompt``, and the distributions they were drawn from."""

    prompt: bytes = b""
    made: bytearray = dataclasses.field(default_factory=bytearray)
    bits: list = dataclasses.field(default_factory=list)  # cost of each to the model
    logits: list = dataclasses.field(default_factory=list)  # (V,) each; None: unknown
    path: str = ""  # of the model that made the last bytes
    start: bytes = b""  # the prompt from which `config` reproduces all later bytes, by a command
    config: SamplingConfig | None = None
    denoise_options: dict = dataclasses.field(default_factory=dict)  # order and steps, if any

    @property
    def whole(self) -> bytes:
        return self.prompt + bytes(self.made)

    def until(self, n: int) -> "Sample":
        """A copy with the first n made bytes."""
        parts = {name: getattr(self, name)[:n] for name in ("made", "bits", "logits")}
        return dataclasses.replace(self, **parts)

    def add(self, byte: int, bits: float, logits_V) -> None:
        self.made.append(byte)
        self.bits.append(bits)
        # A copy: the model's tensor may be a row of all positions' logits.
        self.logits.append(None if logits_V is None else logits_V.detach().cpu().clone())


def but_length(config: SamplingConfig) -> SamplingConfig:
    """The settings with the length left out: what decides which bytes come, not how many."""
    return dataclasses.replace(config, max_new_tokens=1)


def progress(word: str, n: int, seconds: float, bits: list[float], first: float = 0.0) -> str:
    """One line about a sample; ``first``: seconds to its first byte."""
    known = [b for b in bits if not math.isnan(b)]
    facts = [f"{n} bytes", f"{n / seconds:,.0f} bytes/s"]
    facts += [f"first byte after {1000 * first:.0f} ms"] if first else []
    facts += [f"{math.fsum(known) / len(known):.2f} bits/byte"] if known else []
    return f"{word}: {', '.join(facts)}"


def sample_command(sample: Sample) -> str:
    """The shell command that reproduces the bytes after ``sample.start``."""
    config = sample.config
    words = ["bitbyte sample", shlex.quote(short_name(sample.path)), _prompt_option(sample.start)]
    defaults = SamplingConfig()
    for name in (
        "max_new_tokens", "seed", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
        "repetition_window",
    ):  # fmt: skip
        value = getattr(config, name)
        if name in ("max_new_tokens", "seed", "temperature") or value != getattr(defaults, name):
            words.append(f"--{name} {value}")
    words += [f"--{name} {value}" for name, value in sample.denoise_options.items() if value]
    return " ".join(words)


def _prompt_option(prompt: bytes) -> str:
    if b"\0" in prompt or len(prompt) > LONGEST:  # no shell word can hold it
        return "--prompt_file FILE_WITH_THE_PROMPT"
    plain = prompt.translate(None, b"\n\t")
    if printable(plain).encode() == plain:
        quoted = shlex.quote(prompt.decode())
    else:  # bytes that a terminal would not show as they are
        bodies = (chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\x{b:02x}" for b in prompt)
        quoted = f"$'{''.join(bodies)}'"
    return f"--prompt{'=' if prompt.startswith(b'-') else ' '}{quoted}"
