"""Pages that hold a model: the same bits as Python, in node; escaping, policy, refusals."""

import base64
import dataclasses
import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite")

from support import save_run

from bitbyte import models
from bitbyte.cli.dispatch import main
from bitbyte.compress import codec, predictors
from bitbyte.config import DiffusionConfig, MambaConfig, SamplingConfig, TransformerConfig
from bitbyte.files import BitbyteError
from bitbyte.generate import generate
from bitbyte.kernels import engine
from bitbyte.kernels.native.engine import KERNELS
from bitbyte.kernels.native.machine import sources_hash
from bitbyte.plots import model_page
from bitbyte.vocab import START

SHAPE = TransformerConfig(n_layer=2, d_model=64, d_ff=96, n_head=2, seq_len=48)
PRIOR = {"prior": "counts", "prior_orders": 3, "prior_rows": 64, "prior_rank": 32}
CONFIGS = {
    "ternary": SHAPE,
    "dense": dataclasses.replace(SHAPE, linear="dense"),
    "prior": dataclasses.replace(SHAPE, **PRIOR),
    "blocks": DiffusionConfig(n_layer=2, d_model=64, d_ff=96, n_head=2, seq_len=48, block=8),
    "mamba1": MambaConfig(n_layer=2, d_model=64, seq_len=48, ssm="mamba1", **PRIOR),
    "mamba2": MambaConfig(n_layer=2, d_model=64, seq_len=48, linear="dense"),
}
TEXT = b"the old mill, the old mill, \xff\x00 the old"


def model_of(name):
    model = models.build(CONFIGS[name], 0)
    with torch.no_grad():
        model.embed.normal_(std=0.25, generator=torch.Generator().manual_seed(0))
    if model.prior:
        for number, buffer in enumerate((model.prior.codes, model.prior.scale)):
            random = torch.Generator().manual_seed(number)
            buffer.copy_(
                torch.randint(1, 256, buffer.shape, generator=random) / (255 if number else 1)
            )
    return model.eval()


def in_node(page: str, code: str, before: str = "", **given):
    """What ``code`` returns, with `Engine` of a page and ``given``; it sees what ``before`` has."""
    node = shutil.which("node")
    if not node:
        pytest.skip("needs node")
    stored = {
        name: re.search(rf'id="{name}">(.*?)</script>', page, re.DOTALL)[1]
        for name in ("engine", "kernels", "weights")
    }
    script = model_page.source()
    program = f"""
const {{ stored: texts, given }} = JSON.parse(require('fs').readFileSync(0));
globalThis.document = {{ getElementById: (id) => ({{ textContent: texts[id] }}) }};
{script}
const opened = Engine.open();
{before}
const act = async (engine) => {{ {code} }};
opened.then(act).then((result) => console.log(JSON.stringify(result)));
"""
    done = subprocess.run(
        [node, "-e", program], input=json.dumps({"stored": stored, "given": given}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_kernels_are_those_of_the_engine():
    """If not: python tests/tools/build_wasm.py."""
    noted = model_page.WASM.with_suffix("").with_suffix(".sha256").read_text().strip()
    assert noted == sources_hash(KERNELS)
    assert gzip.decompress(model_page.WASM.read_bytes())[:4] == b"\0asm"


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_python(name):
    """After each id, in pieces of other lengths, and in a window that was used before."""
    model = model_of(name)
    ids = [START, *TEXT]
    with torch.no_grad():
        want = engine.engine_for(model).counts(torch.tensor([ids]))[0]
    code = """
      const runs = [];
      for (const cuts of given.cuts) {
        engine.clear();
        const counts = [];
        for (let i = 0; i + 1 < cuts.length; i++) {
          counts.push(...engine.counts(given.ids.slice(cuts[i], cuts[i + 1])));
        }
        runs.push(counts);
      }
      return runs;"""
    n = len(ids)
    cuts = [[*range(n), n], [0, 16, 32, n], [0, 3, 4, 17, 30, n]]
    for made in in_node(model_page.page(model, "x", {}), code, ids=ids, cuts=cuts):
        assert np.array_equal(np.array(made).reshape(n, 256), want)


@pytest.mark.parametrize(
    "choices", [{}, {"top_p": 0.9, "min_p": 0.02}, {"temperature": 0}], ids=str
)
@pytest.mark.parametrize("name", ["prior", "mamba1"])
def test_draws_are_those_of_python(name, choices):
    model, config = model_of(name), SamplingConfig(**{"temperature": 1.0} | choices)
    points = np.random.default_rng(0).random(8)
    from bitbyte.kernels.native.sampling import settings

    with torch.no_grad():
        state = engine.engine_for(model).state(1)
    state.feed(torch.tensor([[START, *TEXT]]))
    want, logits = state.draw(points, config)
    code = """
      engine.begin(given.text);
      return given.points.map((point) => {
        const [byte, logits] = engine.draw(point, given.settings);
        return [byte, [...logits]];
      });"""
    given = {"text": list(TEXT), "points": points.tolist(), "settings": settings(config).tolist()}
    made = in_node(model_page.page(model, "x", {}), code, **given)
    assert [byte for byte, _ in made] == want.tolist()
    assert np.array_equal(np.array([row for _, row in made], np.float32), logits)


def written_by(model, n):
    """Bytes that are likely under a model: it drew them."""
    return generate(model, b"", SamplingConfig(max_new_tokens=n, temperature=0.7)).bytes


def page_of(model):
    names = codec.model_names(model, None)[0] + predictors.NativePredictor(model).fingerprint
    return model_page.page(model, "x", {}, names=names)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "prior") for name in ("text", "blocks", "short", "empty")]
    + [("text", "mamba1"), ("text", "blocks")],
)
def test_compressed_files_are_those_of_python(name, kind, tmp_path):
    """Byte for byte, and each side restores the other's.  Blocks are small; the last is stored."""
    model = model_of(kind)
    T = model.config.seq_len
    data = {
        "text": written_by(model, 3 * T + 5),
        "blocks": written_by(model, 4 * T) + bytes(range(0, 256, 3)),
        "short": b"the",
        "empty": b"",
    }[name]
    (tmp_path / "original").write_bytes(data)
    done = codec.compress_file(
        tmp_path / "original", tmp_path / "coded", model, mode="native", lanes=1, block=2 * T
    )
    coded = (tmp_path / "coded").read_bytes()
    assert done.stored == {"blocks": 86, "short": 3}.get(name, 0)
    code = """
      const codec = new Codec(engine, async () => {});
      codec.block = given.block;
      const coded = await codec.compress(Uint8Array.from(given.data));
      const back = await codec.decompress(Uint8Array.from(given.coded));
      return { coded: [...coded], back: [...back] };"""
    made = in_node(page_of(model), code, data=list(data), coded=list(coded), block=2 * T)
    assert bytes(made["coded"]) == coded
    assert bytes(made["back"]) == data


def test_damaged_files_are_refused():
    """Every length cut and every byte changed: an error, never other bytes."""
    model = model_of("dense")
    data = written_by(model, 60)
    code = """
      const codec = new Codec(engine, async () => {}), wrong = [], bad = [], said = {};
      const coded = await codec.compress(Uint8Array.from(given.data));
      for (let i = 0; i < coded.length; i++) {
        bad.push(coded.slice(0, i), coded.map((byte, j) => (i === j ? byte ^ (1 << i % 8) : byte)));
      }
      for (const file of [...bad, Uint8Array.from([...coded, 0])]) {
        try {
          wrong.push([...(await codec.decompress(file))]);
        } catch (error) {
          said[error.message] = 1;
        }
      }
      return { wrong, said: Object.keys(said), n: coded.length };"""
    made = in_node(page_of(model), code, data=list(data))
    assert made["wrong"] == [] and made["n"] < 120 + len(data)  # coded, not stored
    assert all("file" in text for text in made["said"]), made["said"]


@pytest.mark.parametrize("n", [0, 1, 55, 56, 63, 64, 65, 1000])
def test_hashes_are_those_of_python(n):
    data = bytes((7 * i * i + i) % 256 for i in range(n))
    code = """
      const data = Uint8Array.from(given.data);
      return [[...sha256(data)], crc32(data)];"""
    made = in_node(model_page.page(model_of("dense"), "x", {}), code, data=list(data))
    assert bytes(made[0]) == hashlib.sha256(data).digest() and made[1] == zlib.crc32(data)


# What a page has and node has not, as far as `Costs` and `Page.pack` need it.
FAKES = """
  const live = { views: 0, urls: [], revoked: [] };
  class View {
    constructor() { live.views += 1; }
    close() { live.views -= 1; }
  }
  const element = () => ({
    children: [],
    replaceChildren() { this.children = []; },
    get firstChild() { return this.children[0] ?? null; },
  });
  const make = (tag, kind, text, parent) => {
    parent.children.push(element());
    return parent.children.at(-1);
  };
  const elements = { packed: element() };
  globalThis.document = { getElementById: (id) => elements[id] };
  URL.createObjectURL = () => {
    live.urls.push(`blob:${live.urls.length}`);
    return live.urls.at(-1);
  };
  URL.revokeObjectURL = (url) => live.revoked.push(url);
"""


def test_views_and_links_that_are_replaced_are_let_go():
    code = """
      const costs = new Costs(element(), 100);
      costs.clear();
      costs.clear();
      const page = Object.assign(Object.create(Page.prototype), { engine, say: () => {} });
      for (const name of ["a", "b"]) {
        const file = { name, size: 3, arrayBuffer: async () => Uint8Array.from([1, 2, 3]).buffer };
        await page.pack(file);
      }
      return { ...live, shown: elements.packed.firstChild.href };"""
    made = in_node(page_of(model_of("dense")), code, before=FAKES)
    assert made["views"] == 1
    assert made["revoked"] == ["blob:0"] and made["shown"] == "blob:1"


def test_points_are_uniform():
    code = (
        "const p = points(given.seed); return Array.from({ length: 4000 }, () => p.next().value);"
    )
    page = model_page.page(model_of("dense"), "x", {})
    a, b = (np.array(in_node(page, code, seed=seed)) for seed in (0, 1))
    assert a.min() >= 0 and a.max() < 1 and abs(a.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.06


def test_what_a_page_holds():
    hostile = "</script><img src=x onerror=alert(1)>"
    page = model_page.page(model_of("ternary"), hostile, {hostile: hostile}, hostile)
    assert "{{" not in page.replace("${{", "") and page.isascii()
    assert "<img" not in page and page.count("</script>") == 4
    script = re.search(r'<script type="module">(.*)</script>', page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{digest}' 'wasm-unsafe-eval'; "
        "style-src 'unsafe-inline'"
    )
    source = model_page.source()
    assert source.isascii()
    assert page == model_page.page(model_of("ternary"), hostile, {hostile: hostile}, hostile)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", source
    )


def textarea(page: str) -> str:
    """What a browser puts into the field of the prompt."""
    raw = re.search(r'<textarea id="prompt"[^>]*>(.*?)</textarea>', page, re.DOTALL)[1]
    return html.unescape(raw.removeprefix("\n"))


@pytest.mark.parametrize(
    "prompt", ["", "\n\none\ttwo\n", "zero\u200bwidth \u00e4 &amp; <b>", "{{title}} {{weights}}"]
)
def test_the_prompt_is_the_text_that_was_given(prompt):
    page = model_page.page(model_of("ternary"), "x", {}, prompt)
    assert textarea(page) == prompt
    assert len(page) < len(model_page.page(model_of("ternary"), "x", {}, "")) + 100


def test_a_prompt_that_is_not_utf_8_has_a_page():
    page = model_page.page(model_of("ternary"), "x", {}, "a\udcffb")
    assert textarea(page) == "a?b" and page.encode()


def test_names_are_not_filled_in_as_if_they_were_the_page():
    page = model_page.page(model_of("ternary"), "{{facts}}", {"{{prompt}}": "{{script}}"}, "x")
    assert "<h1>{{facts}}</h1>" in page and "<th>{{prompt}}</th><td>{{script}}</td>" in page


def test_what_has_no_page():
    windows = DiffusionConfig(n_layer=1, d_model=64, n_head=2, seq_len=32)
    with pytest.raises(BitbyteError, match="writes byte by byte, which a diffusion model of whole"):
        model_page.memory(models.build(windows))
    with pytest.raises(
        BitbyteError, match=r"Mambas with windows of at most [\d,]+ bytes, not 9000"
    ):
        model_page.memory(models.build(MambaConfig(n_layer=1, d_model=64, seq_len=9000)))
    narrow = models.build(dataclasses.replace(SHAPE, d_model=24))
    with pytest.raises(BitbyteError, match=r"needs the native engine: .*multiples of 32"):
        model_page.memory(narrow)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", model_of("ternary"))
    assert main(["page", "run", "--prompt", "<b>"]) == 0
    assert "&lt;b&gt;" in (tmp_path / "page.html").read_text()
    assert main(["page", "run"]) == 2
    assert "page.html exists" in capsys.readouterr().err
    assert main(["page", "wiki-small", "--out", "wiki.html"]) == 0
    assert (tmp_path / "wiki.html").stat().st_size < 2_500_000
