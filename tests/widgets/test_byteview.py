"""ByteView: state, messages and what a view makes of them; escaping; the page's closed doors."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import threading

import anywidget
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Page

from bitbyte.files import BitbyteError
from bitbyte.plots.page import (
    GIVEN,
    HERE,
    MASKED,
    PARTS,
    SCRIPT,
    START,
    STYLE,
    characters,
    columns,
    describe,
    join,
    pack,
    page,
    scale,
    static,
)
from bitbyte.widgets.byteview import ByteView

EVIL = (
    b"</script><script>alert(1)</script>\"'&<!--\x00\x1b\x7f\xff\xe2\x82" + "\u202e\u00e9".encode()
)


class Mirror:
    """What byteview.js does with the messages, in Python."""

    def __init__(self, view: ByteView, monkeypatch):
        self.parts, self.messages, self.serial = None, [], None
        monkeypatch.setattr(view, "send", self.receive)
        self.view = view

    def hello(self):
        self.view._handle_custom_msg({"op": "hello"}, [])

    def receive(self, content, buffers):
        assert json.loads(json.dumps(content)) == content
        self.messages.append(content)
        if content["op"] == "all":
            self.parts = self.unpack(content, buffers)
        else:
            assert content["serial"] == self.serial + 1
        self.serial = content["serial"]
        if content["op"] == "append":
            assert content["start"] == len(self.parts)
            self.parts = join([self.parts, self.unpack(content, buffers)])
        elif content["op"] == "truncate":
            self.parts = self.parts.take(slice(0, content["n"]))
        elif content["op"] == "flags":
            self.parts.flags[:] = np.frombuffer(buffers[0], np.uint8)
        elif content["op"] == "paint":
            where, new = np.frombuffer(buffers[5], "<u4"), self.unpack(content, buffers)
            self.parts.data[where], self.parts.flags[where] = new.data, new.flags
            for name, values in new.layers.items():
                self.parts.layers[name][where] = values

    def unpack(self, content, buffers):
        data, flags, values, ids, probs = buffers[:5]
        n, k = len(data), content["k"]
        rows = np.frombuffer(values, "<f4").reshape(len(content["names"]), n)
        return columns(
            data,
            dict(zip(content["names"], rows, strict=True)),
            flags=np.frombuffer(flags, np.uint8),
            top_ids=np.frombuffer(ids, np.uint8).reshape(n, k),
            top_probs=np.frombuffer(probs, "<u2").reshape(n, k) / 65535,
        )

    def agrees(self):
        assert self.parts.data.tobytes() == self.view.data
        assert self.parts.flags.tolist() == self.view.flags.tolist()
        assert list(self.parts.layers) == list(self.view.layers)
        for name, values in self.view.layers.items():
            np.testing.assert_array_equal(self.parts.layers[name], values)


def test_nothing_is_sent_before_hello_and_everything_after(monkeypatch):
    view = ByteView()
    mirror = Mirror(view, monkeypatch)
    view.append(b"ab", {"surprisal": [1.0, 2.0]}, top_ids=[[97], [98]], top_probs=[[0.5], [0.25]])
    assert mirror.messages == []
    mirror.hello()
    mirror.agrees()
    assert mirror.parts.probs[:, 0].tolist() == pytest.approx([0.5, 0.25], abs=1e-5)
    mirror.hello()  # a second view: the same state under the same number
    assert [m["op"] for m in mirror.messages] == ["all", "all"]
    assert mirror.messages[0]["serial"] == mirror.messages[1]["serial"]


def test_every_change_reaches_a_view(monkeypatch):
    view = ByteView(b"abc", {"surprisal": [1, 2, 3]})
    mirror = Mirror(view, monkeypatch)
    mirror.hello()
    view.append(b"de", {"entropy": [4, 5]}, flags=[GIVEN, 0])
    mirror.agrees()
    assert (
        np.isnan(view.layers["surprisal"][3:]).all() and np.isnan(view.layers["entropy"][:3]).all()
    )
    view.paint([4, 0], b"XY", {"surprisal": [7, 8]}, [MASKED, START])
    mirror.agrees()
    assert view.data == b"YbcdX" and view.layers["surprisal"][[4, 0]].tolist() == [7, 8]
    assert view.layers["entropy"][4] == 5  # what paint does not name stays
    assert view.flags.tolist() == [START, 0, 0, GIVEN, MASKED]
    view.paint([1], b"B")
    assert view.flags.tolist() == [START, 0, 0, GIVEN, MASKED] and view.layers["surprisal"][1] == 2
    view.set_flags([0, 1, 2, 4, 8])
    mirror.agrees()
    view.truncate(2)
    mirror.agrees()
    assert view.data == b"YB" and len(view) == 2
    view.set(b"new")
    mirror.agrees()
    assert view.layers == {}
    ops = ["all", "append", "paint", "paint", "flags", "truncate", "all"]
    assert [m["op"] for m in mirror.messages] == ops


def test_append_sends_only_the_new_bytes(monkeypatch):
    view, sent = ByteView(b"x" * 100_000, {"surprisal": np.ones(100_000)}), []
    view._handle_custom_msg({"op": "hello"}, [])
    monkeypatch.setattr(view, "send", lambda content, buffers: sent.append(sum(map(len, buffers))))
    view.append(b"12345678", {"surprisal": [1] * 8})
    assert sent == [8 * (1 + 1 + 4)]


def test_threads_append_without_loss(monkeypatch):
    view = ByteView()
    mirror = Mirror(view, monkeypatch)
    mirror.hello()

    def work(byte: int):
        for _ in range(200):
            view.append(bytes([byte]) * 3, {"surprisal": [byte] * 3})

    threads = [threading.Thread(target=work, args=(byte,)) for byte in b"abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mirror.agrees()
    assert sorted(view.data) == sorted(b"abcd" * 600)
    assert view.layers["surprisal"].astype(int).tolist() == list(view.data)


def test_traits_follow_the_bytes():
    view = ByteView(b"hello", {"a": [0] * 5, "b": [0] * 5})
    assert view.layer == "a"
    view.layer, view.cursor, view.selection = "b", 4, (3, 5)
    view.append(b"!")
    assert (view.layer, view.cursor, view.selection) == ("b", 4, (3, 5))
    view.truncate(4)
    assert (view.cursor, view.selection) == (-1, (0, 0))
    view.set(b"x", {"c": [1]})
    assert view.layer == "c"
    view.layer = "none"
    view.set(b"y", {"c": [1]})
    assert view.layer == "none"
    view.set_state({"selection": [0, 1], "choice": [0, 65, 1]})  # as the browser does
    assert view.selection == (0, 1) and view.choice == [0, 65, 1]


def test_repr():
    assert repr(ByteView()) == "ByteView(0 bytes)"
    assert repr(ByteView(b"a", {"rank": [3]})) == "ByteView(1 byte)"
    assert (
        repr(ByteView(b"abc", {"surprisal": [1, 2.5, np.nan]}))
        == "ByteView(3 bytes, 1.75 bits/byte)"
    )
    bundle = ByteView(b"ab")._repr_mimebundle_()
    assert (bundle[0] if isinstance(bundle, tuple) else bundle)["text/plain"] == "ByteView(2 bytes)"
    assert ByteView()  # empty, and still a widget


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda v: v.append(b"ab", {"s": [1]}), "'s' has shape"),
        (lambda v: v.append(b"ab", flags=[1]), "'flags' has shape"),
        (lambda v: v.append(b"ab", top_ids=[[1], [2]]), "belong together"),
        (lambda v: v.append(b"ab", top_ids=[[1]], top_probs=[[1]]), "must be"),
        (lambda v: v.set_flags([1]), "shape"),
        (lambda v: v.paint([3], b"x"), "outside"),
        (lambda v: v.paint([-1], b"x"), "outside"),
        (lambda v: v.paint([0, 1], b"x"), "2 positions for 1"),
    ],
)
def test_mistakes_are_named_and_change_nothing(change, word):
    view = ByteView(b"abc", {"s": [1, 2, 3]})
    with pytest.raises(BitbyteError, match=re.escape(word)):
        change(view)
    assert view.data == b"abc" and view.layers["s"].tolist() == [1, 2, 3]


def test_join_pads_what_a_part_lacks():
    one = columns(b"a", {"x": [1]}, top_ids=[[1]], top_probs=[[0.5]])
    two = columns(b"b", {"y": [2]}, top_ids=[[2, 3]], top_probs=[[0.5, 0.25]])
    both = join([one, two])
    assert both.ids.tolist() == [[1, 0], [2, 3]] and both.probs.tolist() == [[0.5, 0], [0.5, 0.25]]
    assert np.isnan(both.layers["x"]).tolist() == [False, True]


def test_scale():
    assert scale(np.array([np.nan])) == (0, 1)
    assert scale(np.array([2.0, 2.0])) == (2, 3)
    assert scale(np.array([0.0, 1, 2, 3])) == (0, 3)
    many = np.r_[np.zeros(50), np.ones(50), 1000]  # one outlier
    assert scale(many)[1] == pytest.approx(many.mean() + 2.5 * many.std())
    low, high = scale(np.array([-1.0, 3.0]))
    assert low == -high == -3


def test_characters():
    text = "a\u00e9 \U0001f600\n".encode() + b"\xff\xc3"
    shown = [(0, 1, "a"), (1, 2, "\u00e9"), (3, 1, " "), (4, 4, "\U0001f600"), (8, 1, "\u23ce")]
    assert list(characters(text)) == [*shown, (9, 1, "ff"), (10, 1, "c3")]
    assert [c[2] for c in characters("\u202e".encode())] == ["e2", "80", "ae"]
    assert [c[2] for c in characters(b"\xed\xa0\x80\xc0\x80\xf4\x90\x80\x80")] == [
        *("ed", "a0", "80", "c0", "80", "f4", "90", "80", "80")
    ]
    assert [c[1] for c in characters("\u00e9".encode(), [0, MASKED])] == [1, 1]


@given(st.binary(max_size=60))
def test_characters_cover_every_byte_once(data):
    places = [(i, size) for i, size, _ in characters(data)]
    assert [i for i, _ in places] == list(np.cumsum([0, *(s for _, s in places)])[: len(places)])
    assert sum(size for _, size in places) == len(data)


def test_static_view_escapes_everything():
    n = len(EVIL)
    text = ByteView(EVIL, {'<i>"x': np.arange(n)}, flags=[GIVEN, MASKED] + [0] * (n - 2)).to_html(
        "<script>t</script>"
    )
    seen = Page(text)
    assert set(seen.tags) == {"div", "strong", "small", "pre", "span"}
    assert {name for tag, found in seen.attributes if tag == "span" for name in found} <= {
        "title",
        "style",
    }
    assert "<script" not in text and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    assert "alert(1)" in seen.texts["span"] and seen.texts["strong"] == "<script>t</script> "
    tips = [found["title"] for tag, found in seen.attributes if tag == "span"]
    assert tips[2] == 'byte 2: 0x73 s; <i>"x 2 bits' and tips[1].startswith("byte 1: hidden")


def test_static_view_says_what_it_leaves_out():
    text = static(columns(b"x" * 100, {"rank": np.zeros(100)}), layer="rank", limit=10)
    assert text.count("<span") == 10 and "only the first 10 are shown here" in text
    assert "tint: rank from 0 to 1;" in text


def test_offsets_count_from_the_start():
    start, data = 262_144, b"l\xff"
    numbers = {"surprisal": np.array([1.0, 2.0])}
    shown = columns(data, numbers, top_ids=[[0xFF], [0x6C]], top_probs=[[0.5], [0]])
    told = [describe(shown, i, start=start) for i in (0, 1)]
    assert told[0] == "byte 262,144: 0x6c l; surprisal 1 bits; expected ff 50 %"
    assert told[1] == "byte 262,145: 0xff; surprisal 2 bits"
    still = ByteView(data, numbers, start=start).to_html()
    assert "byte 262,145: 0xff" in still and "2 bytes from byte 262,144" in still
    text = page(data, numbers, title="x", start=start)
    assert "byte 262,145: 0xff" in text
    assert stored_in(text)["state"]["start"] == start
    assert stored_in(page(data, title="x"))["state"]["start"] == ByteView().start == 0
    view = ByteView(data, start=start)
    view.cursor, view.selection = 1, (1, 2)  # these count from the first byte shown
    assert view.data[view.cursor] == 0xFF and view.get_state()["start"] == start


def test_a_page_offers_nothing_to_choose():
    state = stored_in(page(b"x", title="x"))["state"]
    synced = {*ByteView(b"x").keys} - {*anywidget.AnyWidget().keys, "_css"}
    assert state["locked"] is True and {*state} == synced
    assert ByteView().locked is False


def stored_in(text: str) -> dict:
    """What a page holds for its script."""
    return json.loads(re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)[0])


def test_page_is_closed_and_whole():
    n, facts = len(EVIL), {"<b>model": "<img src=x onerror=alert(3)>"}
    layers = {"</script>": np.arange(n), "surprisal": np.linspace(0, 8, n)}
    text = page(EVIL, layers, title="</title><script>alert(2)</script>", facts=facts)
    seen = Page(text)
    assert seen.tags.count("script") == 2 and "img" not in seen.tags and "b" not in seen.tags
    assert not re.search(
        r"https?:|//[a-z]|\bsrc=(?!x)|@import|url\(", re.sub(r"(?m)//.*$", "", text)
    )
    assert "http://" not in text and "https://" not in text
    policy = next(a["content"] for tag, a in seen.attributes if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "connect" not in policy
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    stored = json.loads(data)
    assert base64.b64decode(stored["buffers"][0]) == EVIL
    assert stored["message"]["names"] == list(layers) and stored["state"]["layer"] == "</script>"
    numbers = np.frombuffer(base64.b64decode(stored["buffers"][2]), "<f4").reshape(2, n)
    np.testing.assert_array_equal(numbers[1], layers["surprisal"].astype(np.float32))


def test_the_script_can_stand_in_a_page():
    assert "</script" not in SCRIPT.lower() and "<!--" not in SCRIPT
    assert SCRIPT.isascii() and STYLE.isascii()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", SCRIPT
    )
    assert not re.search(r"https?://|import\b", SCRIPT) and "url(" not in STYLE
    for name in PARTS:
        assert len(HERE.joinpath(name).read_text().splitlines()) <= 450


def in_node(code: str, value: object):
    node = shutil.which("node")
    if not node:
        pytest.skip("needs node")
    source = HERE.joinpath("byteview_bytes.js").read_text()
    code = f"{source}\nconst given = JSON.parse(require('fs').readFileSync(0));\n{code}"
    done = subprocess.run(
        [node, "-e", code], check=False, input=json.dumps(value), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FILL = """
const view = (bytes) => new DataView(Uint8Array.from(bytes).buffer);
const filled = ({ fields, buffers }) => {
  const bytes = new Bytes();
  bytes.write(fields, buffers.map(view), (i) => i, buffers[0].length);
  return bytes;
};
const each = (act) => console.log(JSON.stringify(given.map((one) => act(filled(one)))));
"""


def packed(shown) -> dict:
    fields, buffers = pack(shown)
    return {"fields": fields, "buffers": [list(buffer) for buffer in buffers]}


def texts() -> list[bytes]:
    rng = np.random.default_rng(0)
    alphabet = list(b"a \n\x80\xbf\xc2\xc3\xe0\xed\xa0\xf0\x9f\xf4\xff")
    cases = ["a\u00e9\u65e5\U0001f600\u0301".encode() * 3, b"\xed\xa0\x80\xc0\x80\xf4\x90\x80\x80"]
    return [EVIL, *cases, *(bytes(rng.choice(alphabet, 60)) for _ in range(60))]


def test_browser_and_python_see_the_same_characters():
    code = FILL + "each((b) => { b.classify(0); return [...b.kinds.slice(0, b.n)]; })"
    kinds = in_node(code, [packed(columns(text)) for text in texts()])
    for text, found in zip(texts(), kinds, strict=True):
        expected = []
        for i, size, shown in characters(text):
            lone = size == 1 and text[i] >= 0x80
            assert not lone or shown == f"{text[i]:02x}"
            expected += [5 if lone else size] + [0] * (size - 1)
        assert found == expected, text


def test_a_stream_is_cut_like_the_whole():
    code = """
    each((b) => {
      const { n } = b, rows = [0], whole = [0];
      for (b.n = 1; b.n <= n; b.n++) {
        const from = b.classify(b.n - 1), row = rows.findLastIndex((start) => start <= from);
        b.breakLines(rows, Math.max(0, row - 1), 10, false, n % 2 === 0);
      }
      b.n = n;
      const kinds = [...b.kinds.slice(0, n)];
      b.classify(0);
      b.breakLines(whole, 0, 10, false, n % 2 === 0);
      return [rows, whole, kinds, [...b.kinds.slice(0, n)]];
    })"""
    cases = [text[: len(text) - k % 2] for k, text in enumerate(texts())]
    for rows, whole, streamed, kinds in in_node(FILL + code, [packed(columns(t)) for t in cases]):
        assert rows == whole and streamed == kinds and rows == sorted(set(rows))


def test_browser_and_python_share_scale_and_lines():
    rng = np.random.default_rng(1)
    layers = [rng.gamma(1, 2, 50), rng.normal(0, 1, 50), np.ones(5), np.r_[np.zeros(40), 900]]
    code = (
        "console.log(JSON.stringify(given.map((v) => { const s = newSums('x');"
        "addUp(s, v, v.length >> 1); addUp(s, v, v.length); return scaleOf(s); })))"
    )
    found = in_node(code, [list(layer) for layer in layers])
    np.testing.assert_allclose(found, [scale(layer) for layer in layers], rtol=1e-6, atol=1e-9)
    text = b"The cat sat on\nthe mat " + "\u65e5".encode() * 3 + b"\xff\xff averylongword"
    lines = f"""{FILL} const b = filled(given); b.classify(0);
        const rows = (hex, wrap) => {{
          const r = [0]; b.breakLines(r, 0, 8, hex, wrap); return r;
        }};
        console.log(JSON.stringify([rows(false, false), rows(false, true), rows(true, false)]))"""
    hard, soft, hex_rows = in_node(lines, packed(columns(text)))
    assert hard[:4] == [0, 8, 15, 23] and hex_rows == list(range(0, len(text), 8))
    assert soft[:4] == [0, 8, 15, 23] and text[soft[-2] : soft[-1]] == b"averylon"
