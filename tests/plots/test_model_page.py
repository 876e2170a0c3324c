"""Pages that hold a model: the same bits as Python, in node; escaping, policy, refusals."""

import base64
import dataclasses
import gzip
import hashlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite")

from support import save_run

from bitbyte import models
from bitbyte.cli.dispatch import main
from bitbyte.config import MambaConfig, SamplingConfig, TransformerConfig
from bitbyte.files import BitbyteError
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


def in_node(page: str, code: str, **given):
    """What ``code`` returns, with `Engine` of a page and ``given``."""
    node = shutil.which("node")
    if not node:
        pytest.skip("needs node")
    stored = {
        name: re.search(rf'id="{name}">(.*?)</script>', page, re.DOTALL)[1]
        for name in ("engine", "kernels", "weights")
    }
    script = (model_page.HERE / "model_page.js").read_text("utf-8")
    program = f"""
const {{ stored: texts, given }} = JSON.parse(require('fs').readFileSync(0));
globalThis.document = {{ getElementById: (id) => ({{ textContent: texts[id] }}) }};
{script}
Engine.open().then((engine) => console.log(JSON.stringify((() => {{ {code} }})())));
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
def test_draws_are_those_of_python(choices):
    model, config = model_of("prior"), SamplingConfig(**{"temperature": 1.0} | choices)
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
    source = (model_page.HERE / "model_page.js").read_text("utf-8")
    assert source.isascii()
    assert page == model_page.page(model_of("ternary"), hostile, {hostile: hostile}, hostile)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", source
    )


def test_what_has_no_page():
    with pytest.raises(BitbyteError, match="models of family ar, not mamba"):
        model_page.memory(models.build(MambaConfig(n_layer=1, d_model=64, seq_len=32)))
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
