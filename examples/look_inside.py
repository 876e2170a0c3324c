"""Load a model, let it write, score a text, and take activations by name.

    python examples/look_inside.py [MODEL] [TEXT]

MODEL, which has to predict next bytes, is a run, a step folder, or a packed model.
"""

import sys

from bitbyte.checkpoint import load_model
from bitbyte.config import SamplingConfig
from bitbyte.evaluate.analysis import activations
from bitbyte.evaluate.entropy import read
from bitbyte.generate import generate

name, text = (sys.argv[1:] + ["wiki-small", "The city of Amsterdam"][len(sys.argv) - 1 :])[:2]
model, meta = load_model(name)

print(generate(model, text.encode(), SamplingConfig(temperature=0.7, max_new_tokens=80)).text)

costs = read(model, text.encode())
print(f"{costs.bpb:.3f} bits per byte; one by one:", costs.bits.round(1))

inside = "*.mixer" if model.config.family == "mamba" else "*.mlp"
for layer, value in activations(model, text.encode(), inside, "norm", "logits").items():
    print(f"{layer}: {tuple(value.shape)}, mean square {value.square().mean():.3f}")
