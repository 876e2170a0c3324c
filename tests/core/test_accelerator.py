"""Paths of an accelerator, walked without one: on PyTorch's meta device, which has no values.

Apple GPUs have no float64, so none may be made there; and no branch of "not a CPU" may be one
that nothing ever ran.  What comes back to the CPU is made up here.
"""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from support import CONFIGS, Bytes
from torch.utils._python_dispatch import TorchDispatchMode

from bitbyte import generate, infill, models, scoring
from bitbyte.compress import predictors
from bitbyte.config import SamplingConfig
from bitbyte.device import settings_kept
from bitbyte.evaluate import analysis, entropy, leaks
from bitbyte.files import BitbyteError
from bitbyte.optim import create_optimizer
from bitbyte.transformer import attention_for

META = torch.device("meta")
TEXT = bytes(range(30))


class Accelerator(TorchDispatchMode):
    """Makes up what is read from the meta device, and refuses float64 on it.

    Where it must be deterministic, it refuses a running sum of floats, as CUDA does.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name == "cumsum" and torch.are_deterministic_algorithms_enabled():
            floats = args[0].device == META and args[0].is_floating_point()
            assert not floats, "cumsum has no deterministic implementation"
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        there = source is not None and source.device == META
        if name == "_local_scalar_dense" and there:
            return True if source.dtype == torch.bool else 1
        if name in ("_to_copy", "copy_") and any(
            isinstance(v, torch.Tensor) and v.device == META for v in args
        ):
            target = kwargs.get("device", args[0].device)
            if name == "copy_" and args[0].device != META:
                return args[0].fill_(0)
            if name == "_to_copy" and torch.device(target).type == "cpu":
                assert kwargs.get("dtype") in (None, source.dtype), "converted as it leaves"
                return torch.zeros(source.shape, dtype=source.dtype)
        out = function(*args, **kwargs)
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and value.device == META:
                assert value.dtype != torch.float64, f"{name} makes float64 on the device"
        return out


PRIOR = {"prior": "counts", "prior_orders": 2, "prior_rows": 64, "prior_rank": 4}
ALL = CONFIGS | {"ar prior": dataclasses.replace(CONFIGS["ar"], **PRIOR)}


@pytest.fixture(params=ALL)
def model(request, monkeypatch):
    """A model on the device, with the mode on."""
    # No autocast for meta; in float32 it would be off.
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(models, "only_bytes", lambda ids_BT: ids_BT.long())  # looks at values
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: adamw(*a, **k | {"fused": False}))
    model = models.build(ALL[request.param]).to(META)
    models.use_kernels(model)
    with Accelerator():
        yield model


def test_a_training_step(model):
    optimizer = create_optimizer(model, lr=1e-3, embed_lr=1e-3)
    ids_BT = torch.arange(48).byte().view(2, 24).to(META)
    nats_BT = model(ids_BT, torch.arange(2, device=META))
    nats_BT.mean().backward()
    assert all(p.grad is not None and p.grad.device == META for p in model.parameters())
    optimizer.step()
    optimizer.state_tensors()


@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
def test_a_deterministic_training_step(ssm, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    model = models.build(CONFIGS[ssm]).to(META)
    with settings_kept(), Accelerator():
        torch.use_deterministic_algorithms(True)
        model(torch.zeros(2, 24, dtype=torch.uint8, device=META)).mean().backward()
        state = model.init_state(2)
        model.logits(torch.zeros(2, 9, dtype=torch.uint8, device=META))
        model.step(torch.zeros(2, dtype=torch.uint8, device=META), state)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kernel", ["cuda", "mps", "meta"])
def test_attention_in_chunks_is_for_a_cpu(kernel):
    with pytest.raises(BitbyteError, match=f"on a CPU only, not on {kernel}"):
        attention_for("chunked", torch.device(kernel), 8, 8)
    assert attention_for("auto", torch.device(kernel), 8, 8) == "sdpa"


@pytest.mark.parametrize("mode", ["auto", "portable"])
def test_portable_mode_needs_a_device_with_float64(mode):
    with Accelerator(), pytest.raises(BitbyteError, match="no portable inference on meta; use cpu"):
        predictors.predictor_for(models.build(ALL["ar prior"]).to(META), mode=mode, lanes=2)


def test_scores(model):
    kinds = ["exact"] if model.exact else scoring.KINDS[1:]
    for kind in kinds:
        score = scoring.score(model, Bytes(TEXT), kind=kind, draws=2, stride=12)
        assert score.n_bytes == 30
    if model.exact:
        rows = np.arange(48, dtype=np.uint8).reshape(2, 24)
        leaks.check(model, rows)


def test_the_lens(model):
    costs = entropy.read(model, TEXT)
    entropy.edited(model, costs, 3, 7)
    analysis.probs_at(model, TEXT, 5)
    analysis.calibration(model, TEXT)
    analysis.confusion(model, TEXT)
    analysis.embedding_map(model)


def test_samples(model):
    config = SamplingConfig(max_new_tokens=20, top_k=5, top_p=0.9)
    if not model.exact:
        infill.sample(model, TEXT[:10], config)
        return
    for slide in generate.SLIDES:
        generate.generate(model, TEXT[:10], config, slide=slide)
    generate.filter_effect(generate.next_byte_logits(model, TEXT[:10]), config)
    generate.likeliest(generate.next_byte_logits(model, TEXT[:10])[None], 3)


def test_infills(model):
    ids_T = infill.random_masks(torch.arange(20), 0.3, 0)
    for temperature in (0, 1):
        config = SamplingConfig(temperature=temperature)
        assert len(infill.infill(model, ids_T, config, candidates=3).data) == 20


def test_the_mode_finds_what_it_is_for():
    with Accelerator():
        x = torch.zeros(3, device=META)
        assert x.cpu().double().dtype == torch.float64
        with pytest.raises(AssertionError, match="float64 on the device"):
            x.double()
        with pytest.raises(AssertionError, match="float64 on the device"):
            torch.arange(3, dtype=torch.float64, device=META)
        with pytest.raises(AssertionError, match="converted as it leaves"):
            x.to("cpu", torch.float64)
