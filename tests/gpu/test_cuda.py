"""What to run the first time a CUDA card is at hand: ``pytest tests/gpu -n 8``, about two minutes.

Every family trains in every dtype, compiled and deterministic, resumes bit for bit, and is scored,
sampled and coded as on the CPU.
"""

import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import words

from bitbyte import bitlinear, checkpoint, generate, infill, models, runs
from bitbyte.compress import codec
from bitbyte.config import SSMS, SamplingConfig, TrainConfig, preset
from bitbyte.device import environment
from bitbyte.evaluate import evaluation
from bitbyte.files import BitbyteError
from bitbyte.mamba import mamba_ssm_problem
from bitbyte.train import train

DEVICE = os.environ.get("BITBYTE_TEST_DEVICE", "cuda")  # cpu: to try the tests themselves
CUDA = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = {
    "ar": {"family": "ar"},
    "mamba1": {"family": "mamba", "ssm": "mamba1"},
    "mamba2": {"family": "mamba", "ssm": "mamba2"},
    "diffusion": {"family": "diffusion"},
    "ar prior": {"family": "ar", "prior": "counts", "prior_rows": 4096},
    "mamba2 prior": {"family": "mamba", "ssm": "mamba2", "prior": "counts", "prior_rows": 4096},
    "diffusion prior": {"family": "diffusion", "prior": "counts", "prior_rows": 4096},
}
CAUSAL = [kind for kind in KINDS if "diffusion" not in kind]
SMALL = {"preset": "nano", "seq_len": 128, "batch_size": 8, "progress": False, "log_every": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """40 kB of words from a list of 60, the last 8 kB for validation."""
    text = words(9000)
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.bin").write_bytes(text[:32000])
    (folder / "val.bin").write_bytes(text[32000:40000])
    return str(folder)


def run(data: str, out, device: str = DEVICE, **changes):
    fields = SMALL | {"data": f"{data}/train.bin", "steps": 20, "device": device, "out": str(out)}
    return train(TrainConfig(**fields | changes))


def losses(result) -> list[float]:
    return [row["loss"] for row in result.metrics]


@pytest.mark.parametrize("linear", ["dense", "ternary"])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_learns_as_on_the_cpu(kind, linear, data, tmp_path):
    changes = KINDS[kind] | {"linear": linear, "dtype": "fp32", "deterministic": True}
    changes["threads"] = 4  # the last bits of a prior's tables depend on it
    there = losses(run(data, tmp_path / "gpu", **changes))
    here = losses(run(data, tmp_path / "cpu", device="cpu", **changes))
    assert there[:2] == pytest.approx(here[:2], rel=1e-4)
    assert there == pytest.approx(here, rel=2e-2 if linear == "ternary" else 5e-3)
    assert there[-1] < there[0] - 0.5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_learns_in_half_precision(kind, dtype, data, tmp_path):
    want = losses(run(data, tmp_path / "fp32", dtype="fp32", **KINDS[kind]))
    got = losses(run(data, tmp_path / "half", dtype=dtype, **KINDS[kind]))
    assert got == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("linear", ["dense", "ternary"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_learns_alike(kind, linear, data, tmp_path):
    changes = KINDS[kind] | {"linear": linear, "dtype": "bf16"}
    want = losses(run(data, tmp_path / "plain", **changes))
    result = run(data, tmp_path / "compiled", compile=True, **changes)
    assert losses(result) == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(kind, dtype, data, tmp_path):
    changes = KINDS[kind] | {"dtype": dtype, "deterministic": True}
    run(data, tmp_path / "whole", **changes)
    run(data, tmp_path / "parts", stop_after=9, **changes)
    train(TrainConfig(out=str(tmp_path / "parts"), resume=True, progress=False))
    whole, parts = (
        checkpoint.load_step(runs.resolve(tmp_path / name), with_optim=True)
        for name in ("whole", "parts")
    )
    for want, got in zip(whole[1:], parts[1:], strict=True):
        assert want.keys() == got.keys()
        for name in want:
            assert torch.equal(want[name], got[name]), name


@pytest.fixture(scope="module", params=[*KINDS, "ar dense", "mamba1 dense", "mamba2 dense"])
def trained(request, data, tmp_path_factory):
    """(kind, model on the CPU, the same on the card, meta)."""
    kind, linear = request.param.removesuffix(" dense"), "ternary"
    if kind != request.param:
        linear = "dense"
    out = tmp_path_factory.mktemp("run") / "run"
    run(data, out, linear=linear, steps=60, dtype="bf16", **KINDS[kind])
    here, meta = checkpoint.load_model(out)
    there, _ = checkpoint.load_model(out, device=DEVICE)
    return kind, here, there, meta


def test_scored_as_on_the_cpu(trained, data):
    _, here, there, _ = trained
    for options in ({}, {"stride": 64}):
        bpb = [
            evaluation.evaluate(
                m, f"{data}/val.bin", name="x", split="all", limit=4096, progress=False, draws=2,
                **options,
            )[0]["bpb"]
            for m in (here, there)
        ]  # fmt: skip
        assert bpb[0] == pytest.approx(bpb[1], abs=1e-5 if here.config.linear == "dense" else 2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scored_in_half_precision(trained, data, dtype):
    """The leak gate, run inside, has wider limits for these."""
    _, here, there, _ = trained
    bpb = [
        evaluation.evaluate(
            m, f"{data}/val.bin", name="x", split="all", limit=4096, progress=False, draws=2,
            dtype=t,
        )[0]["bpb"]
        for m, t in ((here, torch.float32), (there, dtype))
    ]  # fmt: skip
    assert bpb[0] == pytest.approx(bpb[1], abs=0.02)


def test_sampled_as_on_the_cpu(trained):
    kind, here, there, _ = trained
    if kind not in CAUSAL:
        config = SamplingConfig(temperature=0)
        ids = infill.parse_mask("a word \u25a1\u25a1\u25a1 and more \u25a1 of".encode())
        texts = [infill.infill(m, ids, config).data for m in (here, there)]
        assert len(texts[0]) == len(texts[1]) == len(ids)
        return
    config = SamplingConfig(temperature=0, max_new_tokens=200)
    for slide in generate.SLIDES:
        made = [generate.generate(m, b"the ", config, slide=slide) for m in (here, there)]
        pairs = zip(*(g.bytes for g in made), strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), 200)
        assert same >= 20  # near-ties of a greedy choice may part them later
        assert made[1].metrics["bytes_per_second"] > 0


def test_portable_code_is_that_of_the_cpu(trained, data, tmp_path):
    kind, here, there, meta = trained
    if kind not in CAUSAL or here.config.linear == "dense":
        pytest.skip("no portable form")
    source = tmp_path / "source"
    source.write_bytes(Path(data, "val.bin").read_bytes()[:1500])
    for name, model in (("cpu", here), ("gpu", there)):
        codec.compress_file(source, tmp_path / name, model, meta, mode="portable", lanes=8)
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "gpu").read_bytes()
    codec.decompress_file(tmp_path / "gpu", tmp_path / "back", here, meta)
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    codec.decompress_file(tmp_path / "cpu", tmp_path / "back2", there, meta)
    assert (tmp_path / "back2").read_bytes() == source.read_bytes()


def test_float_code_comes_back(trained, data, tmp_path):
    kind, _, there, meta = trained
    if kind not in CAUSAL:
        pytest.skip("no next byte")
    source = tmp_path / "source"
    source.write_bytes(Path(data, "val.bin").read_bytes()[:1000])
    codec.compress_file(source, tmp_path / "code", there, meta, mode="float", lanes=8)
    codec.decompress_file(tmp_path / "code", tmp_path / "back", there, meta)
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("M", [1, 16, 17, 33])
def test_int8_product(M):
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randint(-127, 128, (n, 64), dtype=torch.int8, generator=generator) for n in (M, 24)
    )
    got = bitlinear.int8_product(x.to(DEVICE), w.to(DEVICE)).cpu()
    assert torch.equal(got, (x.int() @ w.int().t()).int())
    if CUDA:
        with pytest.raises(BitbyteError, match="multiples of 8"):
            bitlinear.int8_product(x.cuda(), w[:23].cuda())


def test_int8_kernel_trains_and_scores(data, tmp_path):
    changes = {"dtype": "fp32", "val_data": f"{data}/val.bin", "eval_every": 10}
    want = losses(run(data, tmp_path / "reference", linear_kernel="reference", **changes))
    got = losses(run(data, tmp_path / "int8", linear_kernel="int8", **changes))
    assert got == pytest.approx(want, rel=2e-2)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_what_cannot_run_says_so(data, tmp_path):
    with pytest.raises(BitbyteError, match="chunked attention runs on a CPU only"):
        run(data, tmp_path / "chunked", attention="chunked")
    if mamba_ssm_problem("mamba1"):
        with pytest.raises(BitbyteError, match="cannot run here"):
            run(data, tmp_path / "scan", scan="mamba_ssm", **KINDS["mamba1"])


@pytest.mark.parametrize("ssm", SSMS)
def test_mamba_ssm_equals_ours(ssm):
    if problem := mamba_ssm_problem(ssm):
        pytest.skip(problem)
    config = preset("nano", "mamba", ssm=ssm)
    model = models.build(config, seed=1).to(DEVICE)
    ids = torch.randint(0, 256, (2, 256), device=DEVICE)
    answers = {}
    for scan in ("fast", "mamba_ssm"):
        models.use_kernels(model, scan=scan)
        nats = model(ids)
        nats.mean().backward()
        grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        answers[scan] = (nats.detach(), grad)
        model.zero_grad()
    for ours, theirs in zip(*answers.values(), strict=True):
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
        assert (ours - theirs).norm() / ours.norm() < 1e-2


def test_eight_bit_adamw(data, tmp_path):
    pytest.importorskip("bitsandbytes")
    changes = {"optimizer": "adamw8bit", "dtype": "bf16"}
    want = losses(run(data, tmp_path / "plain", optimizer="adamw", dtype="bf16"))
    whole = run(data, tmp_path / "whole", **changes)
    assert losses(whole) == pytest.approx(want, rel=0.05)
    run(data, tmp_path / "parts", stop_after=9, **changes)
    parts = train(TrainConfig(out=str(tmp_path / "parts"), resume=True, progress=False))
    assert losses(parts)[-1] == pytest.approx(losses(whole)[-1], rel=1e-3)


def test_noise_hides_the_same_bytes():
    model = models.build(preset("nano", "diffusion"))
    steps = models.build(preset("nano", "diffusion", diffusion_steps=64))
    noise_B = torch.arange(2**61, 2**61 + 64)
    for m in (model, steps):
        assert torch.equal(m.hide(noise_B, 256), m.hide(noise_B.to(DEVICE), 256).cpu())


def test_long_windows_and_checkpointed_blocks(data, tmp_path):
    """Beyond the lengths of the other tests, with recomputed blocks: the same first losses."""
    changes = {"seq_len": 4096, "batch_size": 2, "steps": 3, "dtype": "bf16", "n_layer": 2}
    for kind, family in KINDS.items():
        want = losses(run(data, tmp_path / f"{kind} plain", **changes, **family))
        got = losses(
            run(data, tmp_path / f"{kind} again", grad_checkpoint=True, **changes, **family)
        )
        assert got == pytest.approx(want, rel=1e-2) and all(map(math.isfinite, got))


def test_records_name_the_card(data, tmp_path):
    result = run(data, tmp_path / "run", steps=2)
    facts = checkpoint.read_meta(runs.resolve(result.run))
    assert facts["extra"]["device"] == DEVICE
    assert result.metrics[-1]["memory"] > 0
    assert not CUDA or environment()["gpu"] == torch.cuda.get_device_name()


def test_a_checkpoint_of_the_card_resumes_on_the_cpu(data, tmp_path, capsys):
    run(data, tmp_path / "run", steps=6, stop_after=3, dtype="fp16")
    fields = {"out": str(tmp_path / "run"), "resume": True, "device": "cpu", "progress": False}
    config = TrainConfig(**fields)
    assert train(config).step == 6
    assert not CUDA or "was trained with device cuda, now it is cpu" in capsys.readouterr().err
    assert dataclasses.asdict(config)["dtype"] == "auto"
