"""Pack a file, train a small model on it, score it, and let it write.

    python examples/train_and_sample.py FILE OUT [--minutes 1]

Any file will do; from about 100 kB on there is something to learn.
"""

import argparse
from pathlib import Path

from bitbyte.checkpoint import load_model
from bitbyte.config import SamplingConfig, TrainConfig
from bitbyte.data.corpora import open_corpus
from bitbyte.data.pack import pack
from bitbyte.evaluate import evaluate
from bitbyte.generate import generate
from bitbyte.train import train

parser = argparse.ArgumentParser()
parser.add_argument("file")
parser.add_argument("out", type=Path)
parser.add_argument("--minutes", type=float, default=1.0)
parser.add_argument("--preset", default="tiny")
options = parser.parse_args()

documents, source = open_corpus(options.file)
manifest = pack(documents, options.out / "data", source=source)
print(manifest.summary())

config = TrainConfig(
    family="mamba", preset=options.preset, minutes=options.minutes,
    data=str(options.out / "data"), out=str(options.out / "run"),
)  # fmt: skip
run = train(config).run

model, meta = load_model(run)
record, _ = evaluate(model, options.out / "data", name="example", meta=meta)
print(f"{record['bpb']:.3f} bits per byte on {record['bytes']:,} bytes that were held out")

print(generate(model, b"The ", SamplingConfig(temperature=0.7, max_new_tokens=200)).text)
