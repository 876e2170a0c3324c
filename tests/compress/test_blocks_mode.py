"""Files coded with a diffusion model, by its chain rule within blocks."""

import dataclasses

import numpy as np
import pytest
import torch
from support import Bytes

from bitbyte import models, scoring
from bitbyte.compress.codec import compress_file, decompress_file
from bitbyte.compress.predictors import MODES, predictor_for
from bitbyte.config import DiffusionConfig, TransformerConfig
from bitbyte.files import BitbyteError
from bitbyte.vocab import START

CONFIG = DiffusionConfig(
    n_layer=2, d_model=64, d_ff=64, n_head=2, seq_len=32, block=4, linear="dense"
)
PRIOR = {"prior": "counts", "prior_orders": 3, "prior_rows": 64, "prior_rank": 4}
CONFIGS = {
    "dense": CONFIG,
    "ternary": dataclasses.replace(CONFIG, linear="ternary"),
    "dense prior": dataclasses.replace(CONFIG, **PRIOR),
    "ternary prior": dataclasses.replace(CONFIG, linear="ternary", **PRIOR),
}
TEXT = np.random.default_rng(5).choice(np.frombuffer(b"aaaabbcd", np.uint8), 300).tobytes()


@pytest.fixture(params=CONFIGS)
def model(request):
    model = models.build(CONFIGS[request.param], 2).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.embed.normal_(std=0.25, generator=random)
        model.embed[97:101] += 0.3 * model.norm.weight.sign()
        if model.prior:
            codes = model.prior.codes
            codes.copy_(torch.randint(0, 256, codes.shape, generator=random))
            model.prior.scale.fill_(0.3)
            for parameter in (model.prior.direct, model.prior.gate, model.prior.match):
                parameter.copy_(torch.randn(parameter.shape, generator=random) / 8)
    return model


@pytest.mark.parametrize("n", [0, 1, 31, 300])
def test_what_is_coded_comes_back_at_the_promised_cost(model, n, tmp_path):
    source, packed, back = (tmp_path / name for name in ("source", "packed", "back"))
    source.write_bytes(TEXT[:n])
    coded = compress_file(source, packed, model, mode="blocks", lanes=3)
    decompress_file(packed, back, model)
    assert back.read_bytes() == TEXT[:n] and coded.header.mode == "blocks"
    if n == 300:
        data, kind = Bytes(TEXT), "chain_rule:left_to_right"
        promised = scoring.score(model, data, kind=kind, batch_size=3).bits
        assert coded.table_bits == pytest.approx(promised, rel=0.01)
        assert coded.table_bits != pytest.approx(scoring.score(model, data).bits, rel=1e-4)
    else:
        assert coded.header.threads == (0 if model.config.linear == "ternary" else
                                        torch.get_num_threads())  # fmt: skip


def test_the_integer_form_does_not_depend_on_the_batch():
    model = models.build(CONFIGS["ternary"], 2).eval()
    alone, all_three = (predictor_for(model, mode="blocks", lanes=n) for n in (1, 3))
    assert alone.fingerprint == all_three.fingerprint
    ids_ST = np.random.default_rng(0).integers(0, 256, (3, 32))
    ids_ST[:, 0] = START
    one, three = alone.start(1), all_three.start(3)
    for t in range(32):
        counts_1V, one = alone.step(ids_ST[2:, t], one)
        counts_3V, three = all_three.step(ids_ST[:, t], three)
        assert (counts_3V.sum(1) == 1 << 24).all() and (counts_3V[2] == counts_1V[0]).all()


def test_next_bytes_of_a_model_of_blocks_are_coded_as_those_of_any(tmp_path):
    """Its causal mode is at home in every mode that its layers allow."""
    source, packed, back = (tmp_path / name for name in ("source", "packed", "back"))
    source.write_bytes(TEXT)
    model = models.build(CONFIGS["ternary"], 2).eval()
    for mode in ("portable", "float"):
        compress_file(source, packed, model, mode=mode, allow_overwrite=True)
        decompress_file(packed, back, model, allow_overwrite=True)
        assert back.read_bytes() == TEXT


def test_other_models_have_no_such_mode():
    model = models.build(TransformerConfig(n_layer=1, d_model=32, d_ff=32, n_head=2, seq_len=32))
    assert "blocks" in MODES
    with pytest.raises(BitbyteError, match="trained with --block"):
        predictor_for(model, mode="blocks", lanes=1)
    whole = models.build(DiffusionConfig(n_layer=1, d_model=32, d_ff=32, n_head=2, seq_len=32))
    with pytest.raises(BitbyteError, match="trained with --block"):
        predictor_for(whole, mode="blocks", lanes=1)
