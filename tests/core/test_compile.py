"""Under torch.compile: numbers and gradients of the plain model, and no function of ours."""

import dataclasses

import pytest
import torch
from support import CONFIGS

from bitbyte import bitlinear, mamba, models, scans, transformer
from bitbyte.config import TrainConfig
from bitbyte.files import BitbyteError
from bitbyte.kernels import numba_scan
from bitbyte.train import train

ALL = CONFIGS | {
    f"{kind} prior": dataclasses.replace(
        CONFIGS[kind], prior="counts", prior_orders=2, prior_rows=64, prior_rank=4
    )
    for kind in ("ar", "mamba2")
}
BY_HAND = [
    value
    for module in (bitlinear, transformer, mamba, scans, numba_scan)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, torch.autograd.Function)
]


def gradients(model, forward) -> dict:
    ids = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(1)).byte()
    model.zero_grad()
    folds = torch.arange(72).view(3, 24) % 2 if model.prior else None
    nats = forward(ids, torch.arange(3), folds)
    nats.mean().backward()
    return {"nats": nats.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def built(kind: str) -> torch.nn.Module:
    """A model; what it reads of a prior's tables matters."""
    model = models.build(ALL[kind], seed=1)
    if model.prior:
        noise = torch.Generator().manual_seed(1)
        shape = model.prior.codes.shape
        codes = torch.randint(256, (3, *shape), generator=noise, dtype=torch.uint8)
        model.prior.fill(codes, torch.full_like(model.prior.scale, 0.3))
        with torch.no_grad():
            for parameter in (model.prior.direct, model.prior.gate, model.prior.match):
                parameter.normal_(std=0.1, generator=noise)
    return model


@pytest.mark.parametrize("kind", ALL)
def test_gradients_are_those_of_the_plain_model(kind):
    model = built(kind)
    models.use_kernels(model, linear="reference", scan="reference")
    want = gradients(model, model)
    models.use_kernels(model, compiled=True)
    torch._dynamo.reset()
    got = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    for name in want:
        gap = (got[name] - want[name]).norm() / want[name].norm()
        assert gap < 0.02, name  # an int8 activation may turn with the last bit of a sum
        assert gap < 1e-4 or "dense" not in kind, name


@pytest.mark.parametrize("kind", ALL)
def test_no_function_of_ours_runs(kind, monkeypatch):
    """torch 2.11 compiles an autograd.Function that works in place without its gradients."""

    def refuse(*args):
        raise AssertionError("an autograd.Function runs under torch.compile")

    assert len(BY_HAND) >= 9
    for function in BY_HAND:
        monkeypatch.setattr(function, "forward", staticmethod(refuse))
    model = built(kind)
    models.use_kernels(model, compiled=True)
    with pytest.raises(AssertionError, match=r"an autograd\.Function runs"):
        gradients(model, model)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    gradients(model, model)


def test_a_compiled_run(tmp_path, monkeypatch):
    data = tmp_path / "data.bin"
    data.write_bytes(bytes((i * i // 7 + i * 31) % 97 for i in range(4096)))
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: plain(model, backend="aot_eager"))
    losses = {}
    for compile in (False, True):
        config = TrainConfig(
            n_layer=1, d_model=32, d_ff=48, n_head=2, seq_len=32, batch_size=2, steps=4, seed=1,
            data=str(data), val_data=str(data), out=str(tmp_path / str(compile)), dtype="fp32",
            device="cpu", progress=False, log_every=1, compile=compile,
            optimizer="adamw",  # Muon in bf16 makes a last bit into 2e-3 within four steps
        )  # fmt: skip
        result = train(config)
        losses[compile] = [row["loss"] for row in result.metrics]
    assert losses[True] == pytest.approx(losses[False], rel=2e-4)


def test_kernels_that_cannot_be_compiled_are_refused():
    model = models.build(CONFIGS["ar"])
    with pytest.raises(BitbyteError, match="int8 kernel cannot be compiled"):
        models.use_kernels(model, linear="int8", compiled=True)
    with pytest.raises(BitbyteError, match=r"chunked attention .*not under torch\.compile"):
        models.use_kernels(model, attention="chunked", compiled=True)
    chosen = models.use_kernels(model, compiled=True)
    assert chosen == {"compile": "inductor", "attention": "sdpa", "linear": "reference"}
    model = models.build(CONFIGS["mamba1"])
    with pytest.raises(BitbyteError, match="cannot take the numba scan"):
        models.use_kernels(model, scan="fast", compiled=True)
    assert models.use_kernels(model, compiled=True)["scan"] == "chunked"
