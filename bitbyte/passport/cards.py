"""A passport as one HTML page to look at or print: the verdict, every audit, and how.

The page has no script and makes no requests; its content security policy allows one style by its
hash.  Every text of a record is a stranger's and is escaped.
"""

import base64
import hashlib
import html
from collections.abc import Mapping
from pathlib import Path

from bitbyte.files import shown
from bitbyte.passport.audits import FAIL, OPEN, PASS, TITLES

STYLE = Path(__file__).with_name("card.css").read_text("utf-8")
MARKS = {PASS: "&#10003;", FAIL: "&#10007;", OPEN: "&ndash;"}
CLASSES = {PASS: "pass", FAIL: "fail", OPEN: "open"}
KINDS = {
    "exact": "exact: every cost is the model's own",
    "code": "the length of a compressed file",
    "chain_rule:left_to_right": "exact length of a code: hidden ids revealed from left to right",
}
SOURCES = {
    "run": "a model of bitbyte", "huggingface": "a model of transformers", "gguf": "a GGUF file",
    "ngram": "counted n-grams", "uniform": "the uniform distribution",
    "compressor": "a compressor", "object": "a Python object",
}  # fmt: skip


def card(record: dict) -> str:
    """The page of a passport's record."""
    r = record
    data = f"{r['data']['path']}, {r['data']['split']}"
    what = SOURCES.get(r["mode"], r["mode"])
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'"
    audits = "\n".join(
        f'<tr class="{CLASSES.get(a["verdict"], "open")}"><td>{MARKS.get(a["verdict"], "?")}</td>'
        f"<th>{_text(TITLES.get(a['name'], a['name']))}</th><td>{_text(a['text'])}</td></tr>"
        for a in r["audits"]
    )
    facts = "\n".join(
        f"<tr><th>{_text(name)}</th><td>{value}</td></tr>" for name, value in _facts(r).items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="referrer" content="no-referrer">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_text(r['model'])} on {_text(data)}: passport</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><span>Bits-per-byte passport</span><span>{_text(what)}</span></header>\n"
        f"<h1>{_text(r['model'])}</h1>\n<p>on {_text(data)}: {r['bytes']:,} bytes"
        f"{'' if r['data']['whole'] else ', the first part of the data'}</p>\n{_verdict(r)}"
        f'<h2>Audits</h2>\n<table class="audits">\n{audits}\n</table>\n'
        f'<h2>How it was measured</h2>\n<table class="facts">\n{facts}\n</table>\n'
        "<footer>&#10003; passed, &#10007; failed, &ndash; not possible, with the reason. A number "
        "that fails an audit is not printed as bits per byte. An interval covers the choice of "
        f"bytes, not of a training run. bitbyte {_text(r.get('bitbyte', ''))}.</footer>\n"
        "</body>\n</html>\n"
    )


def _verdict(r: dict) -> str:
    if r["bpb"] is None or r["verdict"] != PASS:
        first = [a for a in r["audits"] if a["verdict"] == FAIL][:1]
        place = f"<p>{_text(first[0]['text'])}</p>" if first else ""
        return (
            f'<div class="verdict fail"><div class="number">No bits per byte</div>'
            f"<p><strong>{_text(r['why'])}</strong></p>{place}</div>\n"
        )
    spread = "too few bytes for an interval"
    if r["kind"] == "code":
        spread = "the size of one file; no interval"
    if r["interval"]:
        spread = "95 % interval of these bytes {:.4f} to {:.4f}".format(*r["interval"])
    seen = " It was trained on these bytes." * bool(r.get("trained_on_it"))
    return (
        f'<div class="verdict pass"><div class="number">{r["bpb"]:.4f} '
        f"<small>bits per byte</small></div>\n<p>{spread}; {_text(r['why'])}.{seen}</p>"
        f"{_scale(r['bpb'])}</div>\n"
    )


def _scale(bpb: float) -> str:
    """A line from 0 to 8 bits with the number on it; above 8 it stands at the end."""
    at = 8 + 984 * min(bpb, 8.0) / 8
    ticks = "".join(
        f'<line x1="{8 + 123 * i}" y1="10" x2="{8 + 123 * i}" y2="18" stroke="#888"/>'
        f'<text x="{8 + 123 * i}" y="32" font-size="13" fill="#5c5c5c" '
        f'text-anchor="{"start" if i == 0 else "end" if i == 8 else "middle"}">'
        f"{i}</text>"
        for i in range(9)
    )
    return (
        '<svg viewBox="0 0 1000 36" role="img" aria-label="on a scale from 0 to 8 bits">'
        f'<line x1="8" y1="14" x2="992" y2="14" stroke="#888"/>{ticks}'
        f'<line x1="8" y1="14" x2="{at:.1f}" y2="14" stroke="#00674f" stroke-width="6"/>'
        f'<circle cx="{at:.1f}" cy="14" r="8" fill="#00674f"/></svg>'
    )


def _facts(r: dict) -> Mapping[str, str]:
    """Rows of the second table: names, and values as HTML."""
    facts = {"number": _text(KINDS.get(r["kind"], r["kind"]))}
    if r.get("bits") is not None:
        facts["bits / bytes"] = f"{r['bits']:,.1f} / {r['bytes']:,}"
    facts["sha256 of data"] = f"<code>{_text(r['data']['sha256'])}</code>"
    if r["context"]:
        c = r["context"]
        unit = "bytes" if r.get("ids") in (None, r["bytes"]) else "ids"
        scored = "all" if c["stride"] == c["window"] else f"the last {c['stride']:,}"
        facts["windows"] = f"{c['window']:,} {unit}, {scored} scored; {_text(c['start'])}"
    if r.get("ids") and r["ids"] != r["bytes"]:
        facts["ids"] = f"{r['ids']:,}, {r['bytes'] / r['ids']:.2f} bytes each"
    if r.get("parameters") is not None:
        facts["parameters"] = f"{r['parameters']:,}"
    for name, value in (r.get("facts") or {}).items():
        facts[str(name)] = _text(value)
    if r.get("claim") is not None:
        facts["claimed"] = f"{r['claim']:.4f}"
    about = r.get("environment") or {}
    machine = [
        str(about.get("cpu", "")),
        *(f"{k} {v}" for k, v in about.get("versions", {}).items()),
    ]
    facts["computed"] = _text(", ".join([f"seed {r.get('seed', 0)}", *filter(None, machine)]))
    if r.get("call"):
        facts["again"] = f"<code>{_text(r['call'])}</code>"
    return facts


def _text(value: object) -> str:
    return html.escape(shown(value))
