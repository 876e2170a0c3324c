"""Our passports beside figures that others have published, in one table.

A published figure is copied from its source and was not measured here.  The last column says why it
does not compare with ours: other bytes, another split, a model's size not charged, other training.
"""

from typing import NamedTuple

from bitbyte.evaluate.tables import cell


class Published(NamedTuple):
    """Bits per byte as its source prints it, and what must be known to read it."""

    model: str
    data: str
    bpb: float
    source: str  # Markdown
    differs: str


BELLARD = "[bellard.org/ts_zip](https://bellard.org/ts_zip/)"
AL_RFOU = "[arXiv:1808.04444](https://arxiv.org/abs/1808.04444)"
FINEZIP = "[arXiv:2602.19626](https://arxiv.org/abs/2602.19626)"
MEGALODON = "[megalodon-enwik8-jax](https://github.com/pszemraj/megalodon-enwik8-jax)"
WHOLE = "all 100 MB at once"
PRETRAINED = "all 100 MB; the model was trained elsewhere, and its size is not charged"
TESTED = "the last 5 MB, after training on the first 90 MB"
QUICK = "other bytes of enwik8; three minutes of training"
ENWIK8 = (
    Published("Nacrith, SmolLM2-135M", "enwik8", 0.9389, FINEZIP, PRETRAINED),
    Published("FineZip", "enwik8", 1.024, FINEZIP, PRETRAINED),
    Published("byte transformer, 64 layers, 235 M", "enwik8 test", 1.06, AL_RFOU, TESTED),
    Published("ts_zip, RWKV 169 M", "enwik8", 1.106, BELLARD, PRETRAINED),
    Published("byte transformer, 12 layers, 44 M", "enwik8 test", 1.11, AL_RFOU, TESTED),
    Published("cmix v19", "enwik8", 1.187, BELLARD, WHOLE),
    Published("xz", "enwik8", 1.989, BELLARD, WHOLE),
    Published("Megalodon 11.3 M, 1,200 steps", "enwik8", 2.15, MEGALODON, QUICK),
    Published("Llama 12.5 M, 1,200 steps", "enwik8", 2.21, MEGALODON, QUICK),
)  # fmt: skip
COLUMNS = ("model", "data", "BPB", "source", "what does not compare")


def markdown(passports: list[dict]) -> str:
    """Passports of enwik8 and published figures, best first."""
    rows = [(p.bpb, p.model, p.data, f"{p.bpb:g}", p.source, p.differs) for p in ENWIK8]
    for r in passports:
        data = r["data"]
        if r["verdict"] != "pass" or r["bpb"] is None or data["path"] != "enwik8":
            continue
        place = f"enwik8 {data['split']} {data['sha256'][:8]}"
        note = f"the first {r['bytes']:,} bytes" + ", trained on them" * r["trained_on_it"]
        rows.append((r["bpb"], r["model"], place, f"**{r['bpb']:.4f}**", "passport", note))
    head = f"| {' | '.join(COLUMNS)} |\n|---|---|--:|---|---|"
    return "\n".join([head, *(f"| {' | '.join(map(cell, row[1:]))} |" for row in sorted(rows))])
