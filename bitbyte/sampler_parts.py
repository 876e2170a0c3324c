"""What the sampler is made of, without a widget: samples, bars, a command.

Run names, prompts and errors are strangers' text: everything is escaped.
"""

import dataclasses
import html
import math
import shlex
from pathlib import Path

from bitbyte.files import artifacts
from bitbyte.generate import FilterEffect, SamplingConfig
from bitbyte.vocab import N_BYTES, byte_label, printable

N_BARS = 12  # bytes that get a bar
INK = "var(--jp-ui-font-color1, #222)"
BLUE, ORANGE, GREY = "#56B4E9", "#E69F00", "rgba(128, 128, 128, 0.5)"  # Okabe-Ito
MONO = "var(--jp-code-font-family, monospace)"


# --- what was made


@dataclasses.dataclass
class Sample:
    """Bytes that continue ``prompt``, and the laws they were drawn from."""

    prompt: bytes = b""
    made: bytearray = dataclasses.field(default_factory=bytearray)
    bits: list = dataclasses.field(default_factory=list)  # cost of each under the model's own law
    logits: list = dataclasses.field(default_factory=list)  # (V,) each; None: not known
    path: str = ""  # of the model that made the last bytes
    start: bytes = b""  # after these bytes, `config` makes all the others; a command can say that
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
    return dataclasses.replace(config, max_new_tokens=1)


def progress(word: str, n: int, seconds: float, bits: list[float], first: float = 0.0) -> str:
    """One line about a sample; ``first``: seconds to its first byte."""
    known = [b for b in bits if not math.isnan(b)]
    facts = [f"{n} bytes", f"{n / seconds:,.0f} bytes/s"]
    facts += [f"first byte after {1000 * first:.0f} ms"] if first else []
    facts += [f"{math.fsum(known) / len(known):.2f} bits/byte"] if known else []
    return f"{word}: {', '.join(facts)}"


# --- the command


def sample_command(sample: Sample) -> str:
    """The line for a shell that makes the bytes after ``sample.start`` again."""
    config = sample.config
    run = Path(sample.path)
    run = run.name if run.parent == artifacts("checkpoints").resolve() else sample.path
    words = ["bitbyte sample", shlex.quote(run), _prompt_option(sample.start)]
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
    if b"\0" in prompt:
        return "--prompt_file FILE_WITH_THE_PROMPT"  # no word of a command can hold a zero byte
    plain = prompt.translate(None, b"\n\t")
    if printable(plain).encode() == plain:
        quoted = shlex.quote(prompt.decode())
    else:  # what a terminal would not show as it is
        bodies = (chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\x{b:02x}" for b in prompt)
        quoted = f"$'{''.join(bodies)}'"
    return f"--prompt{'=' if prompt.startswith(b'-') else ' '}{quoted}"


def status_html(message: str, command: str) -> str:
    """A line of news, and the command: one click selects it all."""
    return (
        f'<div role="status" style="color:{INK};line-height:20px;height:22px;overflow:hidden;'
        f'white-space:nowrap;text-overflow:ellipsis" title="{html.escape(message)}">'
        f"{html.escape(message)}</div>"
        f'<pre style="color:{INK};font:12px/16px {MONO};margin:0;height:50px;overflow:auto;'
        f'white-space:pre-wrap;overflow-wrap:anywhere;user-select:all">{html.escape(command)}</pre>'
    )


# --- the law of one byte


def sentence(effect: FilterEffect, config: SamplingConfig) -> str:
    """What the settings do to a law, in words."""
    words = (
        f"keeps {effect.kept} of {N_BYTES} bytes, {100 * effect.mass:.1f} % of the probability, "
        f"entropy {effect.bits_before:.2f} to {effect.bits_after:.2f} bits"
    )
    return f"greedy, always the likeliest byte: {words}" if config.temperature == 0 else words


def law_html(title: str, effect: FilterEffect) -> str:
    """Bars of the likeliest bytes before and after the filters; a cut one says what cut it."""
    order = effect.before.argsort(descending=True, stable=True).tolist()
    top = max(float(effect.before.max()), float(effect.after.max()))
    rows = [_row("th", "byte", "model", "after your settings")]
    for byte in order[:N_BARS]:
        before, after = float(effect.before[byte]), float(effect.after[byte])
        rule = html.escape(effect.rules[byte])
        rows.append(
            _row(
                "td",
                f"<b>{html.escape(byte_label(byte))}</b> <i>{byte:02x}</i>",
                _bar(before / top, GREY if rule else BLUE, f"{100 * before:.1f} %"),
                _bar(after / top, ORANGE, f"cut by {rule}" if rule else f"{100 * after:.1f} %"),
            )
        )
    rest = order[N_BARS:]
    sums = [float(p_V[rest].sum()) for p_V in (effect.before, effect.after)]
    bars = (_bar(0, GREY, f"{100 * p:.1f} %") for p in sums)
    rows.append(_row("td", f"{len(rest)} others", *bars))
    return (
        f'<div style="color:{INK};line-height:22px;white-space:nowrap;overflow:hidden">'
        f"{html.escape(title)}</div>"
        f'<table style="color:{INK};font:12px/18px {MONO};border-spacing:0;table-layout:fixed;'
        f'width:100%">{"".join(rows)}</table>'
    )


def _row(tag: str, *cells: str) -> str:
    style = "text-align:left;padding:0 4px;white-space:nowrap;overflow:hidden;width"
    widths = zip(("20%", "38%", "42%"), cells, strict=True)
    row = "".join(f'<{tag} style="{style}:{width}">{cell}</{tag}>' for width, cell in widths)
    return f"<tr>{row}</tr>"


def _bar(share: float, colour: str, text: str) -> str:
    return (
        '<span style="display:inline-block;width:46%"><span style="display:inline-block;'
        f"height:11px;vertical-align:middle;background:{colour};width:{100 * share:.1f}%"
        f'"></span></span> {text}'
    )
