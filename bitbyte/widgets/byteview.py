"""ByteView: a widget that shows bytes as text or hex, tinted by numbers, while they stream in.

The state lives here, in Python.  A view in the browser says "hello" and is sent everything; after
that each change is one binary message with a serial number.  A view that notices a gap says
"hello" again, so there may be several views, and they may come late or go and come back.

All methods may be called from any thread.
"""

import threading
from collections.abc import Mapping, Sequence

import anywidget
import numpy as np
from traitlets import Bool, Dict, Float, Int, List, Tuple, Unicode

from bitbyte.files import BitbyteError
from bitbyte.plots.page import (
    SCRIPT,
    STATIC_LIMIT,
    STYLE,
    Columns,
    columns,
    join,
    pack,
    static,
)

NO_TINT = "none"
STILL = 300  # bytes of a view that a notebook stores; about 40 characters of HTML each


class ByteView(anywidget.AnyWidget):
    """A view of N bytes with layers, alternatives and flags.

    Layers are numbers (N,) by name, where NaN is no tint; ``top_ids`` and ``top_probs`` (N, K) are
    alternatives, of which those of probability 0 are not shown; for ``flags`` (N,) see
    `plots.page`.

    Traits that change in the browser or from code: ``layer`` (the one that tints, or "none"),
    ``cursor`` (a position or -1), ``selection`` (start, stop), ``hex``, ``wrap`` (break lines
    between words), ``low`` and ``high`` (of the tint; None: from the values).  ``choice`` is
    [position, byte, count] after the alternative ``byte`` was picked there; while ``locked`` none
    can be picked.  ``start`` is the offset of the first byte in its source: offsets on display
    count from there, all traits from the first byte.
    """

    _esm = SCRIPT
    _css = STYLE

    layer = Unicode("").tag(sync=True)
    cursor = Int(-1).tag(sync=True)
    selection = Tuple(Int(), Int(), default_value=(0, 0)).tag(sync=True)
    choice = List(Int()).tag(sync=True)
    hex = Bool(False).tag(sync=True)
    wrap = Bool(False).tag(sync=True)
    low = Float(None, allow_none=True).tag(sync=True)
    high = Float(None, allow_none=True).tag(sync=True)
    units = Dict(value_trait=Unicode(), key_trait=Unicode()).tag(sync=True)
    start = Int(0, min=0).tag(sync=True)
    locked = Bool(False).tag(sync=True)
    height = Int(360).tag(sync=True)  # px of the text
    controls = Bool(True).tag(sync=True)  # layer list and switches above the text

    def __init__(
        self,
        data: bytes = b"",
        layers: Mapping[str, Sequence[float]] | None = None,
        *,
        top_ids=None,
        top_probs=None,
        flags=None,
        **traits,
    ):
        self._lock = threading.RLock()
        self._parts = [columns(b"")]  # joined on reading
        self._n = 0
        self._serial = 0
        self._heard = False  # whether any view has said hello
        super().__init__(**traits)
        self.on_msg(self._answer)
        self.set(data, layers, top_ids=top_ids, top_probs=top_probs, flags=flags)

    def _answer(self, _widget, content, _buffers) -> None:
        if content.get("op") == "hello":
            with self._lock:
                self._heard = True
                self._send_all()

    def _send_all(self) -> None:
        fields, buffers = pack(self._joined())
        self.send({"op": "all", "serial": self._serial, **fields}, buffers)

    def _send_change(self, op: str, changed: Columns | None = None, more=(), **fields) -> None:
        """Send one change, if any view has said hello.  Call with the lock held."""
        self._serial += 1
        if self._heard:
            packed, buffers = pack(changed) if changed is not None else ({}, [])
            content = {"op": op, "serial": self._serial, **packed, **fields}
            self.send(content, [*buffers, *more])

    def _joined(self) -> Columns:
        if len(self._parts) > 1:
            self._parts = [join(self._parts)]
        return self._parts[0]

    def _tidy(self) -> None:
        """Reset traits that no longer fit the bytes.  Without the lock, as it runs observers."""
        names = list(dict.fromkeys(name for part in list(self._parts) for name in part.layers))
        if self.layer not in (*names, NO_TINT):
            self.layer = names[0] if names else ""
        if self.cursor >= self._n:
            self.cursor = -1
        if self.selection[1] > self._n:
            self.selection = (0, 0)

    def set(self, data: bytes, layers=None, *, top_ids=None, top_probs=None, flags=None) -> None:
        """Replace everything."""
        shown = columns(data, layers, top_ids=top_ids, top_probs=top_probs, flags=flags)
        with self._lock:
            self._parts, self._n = [shown], len(shown)
            self._serial += 1
            if self._heard:
                self._send_all()
        self._tidy()

    def append(self, data: bytes, layers=None, *, top_ids=None, top_probs=None, flags=None) -> None:
        """Append bytes; cheap at any length."""
        new = columns(data, layers, top_ids=top_ids, top_probs=top_probs, flags=flags)
        if not len(new):
            return
        with self._lock:
            start = self._n
            self._parts.append(new)
            self._n += len(new)
            self._send_change("append", new, start=start)
        self._tidy()

    def truncate(self, n: int) -> None:
        """Keep the first ``n`` bytes."""
        with self._lock:
            self._parts = [self._joined().take(slice(0, max(0, n)))]
            self._n = len(self._parts[0])
            self._send_change("truncate", n=self._n)
        self._tidy()

    def set_flags(self, flags) -> None:
        """Replace the flags of all bytes."""
        with self._lock:
            shown = self._joined()
            flags_N = np.array(flags, np.uint8)
            if flags_N.shape != shown.flags.shape:
                raise BitbyteError(f"flags have shape {flags_N.shape} for {len(shown)} bytes")
            shown.flags[:] = flags_N
            self._send_change("flags", more=[flags_N.tobytes()])

    def paint(
        self, positions, data: bytes, layers=None, flags=None, *, top_ids=None, top_probs=None
    ) -> None:
        """Change the bytes at ``positions``; layers, flags and alternatives not given stay."""
        where = np.array(positions, np.int64).reshape(-1)
        new = columns(data, layers, top_ids=top_ids, top_probs=top_probs, flags=flags)
        if len(where) != len(new):
            raise BitbyteError(f"{len(where)} positions for {len(new)} bytes")
        if not len(where):
            return
        with self._lock:
            if where.min() < 0 or where.max() >= self._n:
                raise BitbyteError(f"a position is outside the {self._n} bytes")
            empty = columns(b"", dict.fromkeys(new.layers, ()), top_ids=new.ids[:0],
                            top_probs=new.probs[:0])  # fmt: skip
            shown = join([self._joined(), empty])  # adds the new columns
            shown.data[where] = new.data
            for name, values in new.layers.items():
                shown.layers[name][where] = values
            if flags is not None:
                shown.flags[where] = new.flags
            if top_ids is not None:
                shown.ids[where], shown.probs[where] = 0, 0
                shown.ids[where, : new.ids.shape[1]] = new.ids
                shown.probs[where, : new.ids.shape[1]] = new.probs
            self._parts = [shown]
            self._send_change("paint", shown.take(where), [where.astype("<u4").tobytes()])
        self._tidy()

    @property
    def data(self) -> bytes:
        with self._lock:
            return self._joined().data.tobytes()

    @property
    def layers(self) -> dict[str, np.ndarray]:
        """Copies, float32 (N,) by name."""
        with self._lock:
            return {name: values.copy() for name, values in self._joined().layers.items()}

    @property
    def flags(self) -> np.ndarray:
        with self._lock:
            return self._joined().flags.copy()

    def __len__(self) -> int:
        return self._n

    def __bool__(self) -> bool:
        return True  # an empty view is still a widget

    def __repr__(self) -> str:
        size = f"{self._n} byte" + "s" * (self._n != 1)
        bits = self.layers.get("surprisal", np.zeros(0))
        known = bits[np.isfinite(bits)]
        return (
            f"ByteView({size}, {known.mean():.2f} bits/byte)" if len(known) else f"ByteView({size})"
        )

    def to_html(self, title: str = "", limit: int = STATIC_LIMIT, tips: bool = True) -> str:
        """The first ``limit`` bytes as static HTML without scripts, with hover tips if ``tips``."""
        with self._lock:
            options = {"layer": self.layer, "units": self.units, "limit": limit, "tips": tips}
            options |= {"low": self.low, "high": self.high, "start": self.start}
            return static(self._joined(), title, **options)

    def _repr_mimebundle_(self, **options):
        """Adds static HTML for readers without a kernel."""
        data, metadata = super()._repr_mimebundle_(**options)
        return data | {"text/html": self.to_html(limit=STILL, tips=False)}, metadata
