"""Sampling: filters against brute force, seeds, the sliding window, UTF-8 cut anywhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sampling

from bitbyte import generate as generation
from bitbyte.config import SamplingConfig, TransformerConfig
from bitbyte.files import BitbyteError
from bitbyte.generate import Generation, Utf8Stream, cut_by, filtered_probs, generate, stream
from bitbyte.models import build
from bitbyte.vocab import START

ALL_BYTES = bytes(range(256))


class Chain(torch.nn.Module):
    """The next byte depends on the last id and, weakly, on all ids of the window."""

    def __init__(self, context=1 << 20, device="cpu"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(257, 256, generator=generator) * 3)
        self.context = context
        self.calls = []

    def logits(self, ids_BT):
        self.calls.append(("logits", ids_BT.shape[1]))
        assert ids_BT.shape[1] <= self.context
        sums = (ids_BT * torch.arange(1, ids_BT.shape[1] + 1)).cumsum(1) % 257
        return self.table[ids_BT] + self.table[sums]

    def init_state(self, batch):
        return torch.empty(batch, 0, dtype=torch.long)

    def step(self, ids_B, state):
        assert not torch.is_grad_enabled()
        state = torch.cat([state, ids_B[:, None]], 1)
        return self.logits(state)[:, -1], state


def brute(logits, c, recent=b""):
    """The documented filters, in plain Python."""
    scores = [float(x) for x in logits]
    for b in set(recent[len(recent) - c.repetition_window :]):
        p = c.repetition_penalty
        scores[b] = scores[b] / p if scores[b] > 0 else scores[b] * p
    weights = {b: math.exp((s - max(scores)) / c.temperature) for b, s in enumerate(scores)}
    ranked = sorted(weights, key=lambda b: (-weights[b], b))
    if c.top_k:
        ranked = ranked[: c.top_k]
    total = sum(weights[b] for b in ranked)
    if c.top_p < 1:
        size = next(
            n for n in range(1, 257) if sum(weights[b] for b in ranked[:n]) >= c.top_p * total
        )
        ranked = ranked[:size]
    ranked = [b for b in ranked if weights[b] >= c.min_p * weights[ranked[0]]]
    total = sum(weights[b] for b in ranked)
    return [weights[b] / total if b in ranked else 0.0 for b in range(256)]


@given(
    st.integers(0, 1000), st.floats(0.05, 5), st.integers(0, 256), st.floats(0.01, 1),
    st.floats(0, 1), st.floats(0.5, 2), st.binary(max_size=80),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_filters_equal_brute_force(seed, temperature, top_k, top_p, min_p, penalty, recent):
    logits = torch.randn(256, generator=torch.Generator().manual_seed(seed)) * 4
    c = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    expected = torch.tensor(brute(logits, c, recent), dtype=torch.float64)
    got = filtered_probs(logits, c, recent)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.full((256,), -1e9)
    logits[[10, 20, 30]] = torch.tensor([0.5, 0.3, 0.2]).log()

    def kept(p):
        return filtered_probs(logits, sampling(top_p=p)).nonzero().flatten().tolist()

    assert kept(0.49) == [10]
    assert kept(0.51) == [10, 20]
    assert kept(0.79) == [10, 20]
    assert kept(0.81) == [10, 20, 30]
    assert filtered_probs(logits, sampling(top_p=0.7))[10].item() == pytest.approx(0.5 / 0.8)


def test_min_p_one_keeps_the_likeliest_and_its_equals():
    logits = torch.arange(256) * 0.1
    assert filtered_probs(logits, sampling(min_p=1.0)).nonzero().flatten().tolist() == [255]
    logits[7] = logits[255]
    assert filtered_probs(logits, sampling(min_p=1.0))[[7, 255]].tolist() == [0.5, 0.5]
    low = filtered_probs(logits, sampling(min_p=math.exp(-0.15))).nonzero().flatten().tolist()
    assert low == [7, 254, 255]  # e^-0.1 of the likeliest is enough, e^-0.2 is not


def test_repetition_penalty_by_hand():
    logits = torch.zeros(256)
    logits[65], logits[66], logits[67] = 4.0, -3.0, 4.0
    c = sampling(repetition_penalty=2.0, repetition_window=2)
    probs = filtered_probs(logits, c, b"CAB")  # C is out of the window
    total = math.exp(2) + math.exp(-6) + math.exp(4) + 253
    for byte, score in ((65, 2), (66, -6), (67, 4), (0, 0)):
        assert probs[byte].item() == pytest.approx(math.exp(score) / total, rel=1e-12)
    off = sampling(repetition_penalty=2.0, repetition_window=0)
    assert filtered_probs(logits, off, b"CAB")[65] == filtered_probs(logits, off, b"")[65]


def test_cut_by_names_the_first_rule_that_cut():
    logits = torch.arange(256).flip(0) * -1.0  # byte 255 likeliest, each next e times less
    rules = cut_by(logits, sampling(top_k=10, top_p=0.99, min_p=0.1))
    kept = filtered_probs(logits, sampling(top_k=10, top_p=0.99, min_p=0.1)) > 0
    assert [not rule for rule in rules] == kept.tolist()
    assert rules[253:] == ["", "", ""]
    assert rules[252] == rules[251] == "min-p"
    assert rules[250] == rules[246] == "top-p"
    assert set(rules[:246]) == {"top-k"}
    assert cut_by(logits, sampling(temperature=0.0)) == ["greedy"] * 255 + [""]


def test_temperature_zero_and_top_k_one_are_greedy():
    logits = torch.zeros(256)
    logits[[7, 9]] = 5.0  # a tie: the lower byte
    for c in (sampling(temperature=0.0), sampling(top_k=1), sampling(top_p=1e-300)):
        assert filtered_probs(logits, c).nonzero().tolist() == [[7]]
    assert filtered_probs(logits, sampling(temperature=5e-324))[[7, 9]].tolist() == [0.5, 0.5]
    model = Chain()
    history = [START]
    for _ in range(20):
        history.append(int(model.logits(torch.tensor([history]))[0, -1].argmax()))
    assert list(stream(model, b"", sampling(temperature=0.0))) == history[1:]
    assert list(stream(model, b"", sampling(top_k=1, temperature=3.0, seed=5))) == history[1:]


def test_samples_follow_the_filtered_law():
    class Fixed(Chain):
        def logits(self, ids_BT):
            return self.table[0].expand(*ids_BT.shape, 256)

        def step(self, ids_B, state):
            return self.table[:1], state

    model, n = Fixed(), 4000
    c = sampling(max_new_tokens=n, top_k=20, temperature=2.0)
    expected = filtered_probs(model.table[0], c) * n
    counts = torch.bincount(torch.tensor(list(stream(model, b"", c))), minlength=256)
    live = expected > 0
    assert counts[~live].sum() == 0
    chi2 = ((counts - expected)[live] ** 2 / expected[live]).sum().item()
    assert 3 < chi2 < 50  # 19 degrees of freedom: outside with chance 2e-4


@pytest.mark.parametrize("point", [0.0, 0.25, 0.75 - 2**-53, 0.75, 1 - 2**-53])
def test_a_byte_of_probability_zero_never_comes(monkeypatch, point):
    probs = torch.zeros(256, dtype=torch.float64)
    probs[[5, 9]] = torch.tensor([0.75, 0.25], dtype=torch.float64)
    monkeypatch.setattr("bitbyte.generate._points", lambda seed: iter([point]))
    monkeypatch.setattr("bitbyte.generate.filtered_probs", lambda *_: probs)
    assert next(stream(Chain(), b"", sampling())) == (5 if point < 0.75 else 9)


def test_random_points_are_those_drawn_one_by_one():
    generator = torch.Generator().manual_seed(7)
    for _, point in zip(range(200), generation._points(7), strict=False):
        assert point == torch.rand((), dtype=torch.float64, generator=generator).item()


def test_seeds():
    model = Chain()
    one, again, other = (bytes(stream(model, b"x", sampling(seed=s))) for s in (1, 1, 2))
    assert one == again != other
    torch.manual_seed(99)  # the global generator plays no part
    assert bytes(stream(model, b"x", sampling(seed=1))) == one


@pytest.mark.parametrize("prompt", [b"", b"a", ALL_BYTES, ALL_BYTES * 3])
def test_prompts_of_any_bytes(prompt):
    result = generate(Chain(), prompt, sampling(max_new_tokens=7))
    assert isinstance(result, Generation) and len(result.bytes) == 7
    assert result.metrics["prompt_bytes"] == len(prompt)


def full_reencoding(model, prompt, c, window):
    """Reference: every byte from one full forward pass over START + the last ``window`` bytes."""
    history, generator = bytearray(prompt), torch.Generator().manual_seed(c.seed)
    for _ in range(c.max_new_tokens):
        ids = torch.tensor([[START, *history[max(0, len(history) - window) :]]])
        with torch.no_grad():
            probs = filtered_probs(model.logits(ids)[0, -1], c, history)
        u = torch.rand((), dtype=torch.float64, generator=generator)
        history.append(int((probs.cumsum(0) / probs.sum() <= u).sum()))
    return bytes(history[len(prompt) :])


@pytest.mark.parametrize("context", [1, 2, 3, 8, 25, 40])
@pytest.mark.parametrize("prompt", [b"", b"seven b", ALL_BYTES])
def test_exact_slide_equals_full_reencoding(context, prompt):
    model, c = Chain(context), sampling(max_new_tokens=30, repetition_penalty=1.2)
    assert bytes(stream(model, prompt, c)) == full_reencoding(model, prompt, c, context - 1)


@pytest.mark.parametrize("context", [1, 2, 3, 8, 25])
def test_block_slide_sees_at_least_half_and_costs_little(context):
    model = Chain(context)
    out = []
    for byte in stream(model, b"abc", sampling(max_new_tokens=60), slide="block"):
        seen = model.calls[-1][1]  # ids of the window the byte was drawn from
        bytes_before = 3 + len(out)
        assert min(bytes_before, (context - 1) / 2) <= seen - 1 <= context - 1
        out.append(byte)
    if context >= 8:
        assert len(model.calls) <= 4 + 60 * 2.5
    short = list(stream(Chain(), b"abc", sampling(max_new_tokens=max(1, context - 4))))
    assert out[: context - 4] == short[: context - 4] or context < 5  # nothing slid yet


@pytest.mark.parametrize("slide", ["exact", "block"])
def test_transformer_uses_its_prefill(slide):
    shape = {"n_layer": 1, "d_model": 32, "d_ff": 32, "n_head": 2, "seq_len": 16}
    model = build(TransformerConfig(**shape, linear="dense"))
    torch.nn.init.normal_(model.embed, generator=torch.Generator().manual_seed(1))
    c = sampling(max_new_tokens=40 if slide == "exact" else 10)
    new = bytes(stream(model, b"hello", c, slide=slide))
    assert new == full_reencoding(model, b"hello", c, 15)
    model(torch.randint(0, 256, (1, 16))).mean().backward()  # sampling left training possible


def test_stats_are_of_the_unfiltered_law():
    model, seen = Chain(), []
    out = list(stream(model, b"ab", sampling(top_k=1), on_stats=seen.append))
    assert [s.byte for s in seen] == out
    history = [START, *b"ab"]
    for stats in seen:
        law = model.logits(torch.tensor([history]))[0, -1].double().softmax(0)
        assert stats.bits == pytest.approx(-math.log2(law[stats.byte].item()), rel=1e-9)
        history.append(stats.byte)
    result = generate(model, b"ab", sampling(top_k=1))
    expected = sum(s.bits for s in seen) / len(seen)
    assert result.metrics["bits_per_byte"] == pytest.approx(expected, rel=1e-12)


def test_metrics_and_callback():
    heard = []
    result = generate(Chain(), b"abc", sampling(), on_byte=heard.append)
    m = result.metrics
    assert bytes(heard) == result.bytes
    assert set(m) == {
        "prompt_bytes", "new_bytes", "seconds", "first_byte_seconds", "bytes_per_second",
        "peak_memory_bytes", "bits_per_byte",
    }  # fmt: skip
    assert (m["prompt_bytes"], m["new_bytes"]) == (3, 20)
    assert 0 < m["first_byte_seconds"] <= m["seconds"]
    assert m["bytes_per_second"] == pytest.approx(20 / m["seconds"])
    assert m["peak_memory_bytes"] is None or 2**24 < m["peak_memory_bytes"] < 2**40


def test_text_completes_the_last_character_of_the_prompt():
    class Euro(Chain):
        def logits(self, ids_BT):
            self.table.data[:] = -50.0
            for now, following in zip(b"\xe2\x82\xac", b"\x82\xac!", strict=True):
                self.table.data[now, following] = 50.0
            return self.table[ids_BT]

    result = generate(Euro(), b"1 \xe2", sampling(max_new_tokens=3))
    assert result.bytes == b"\x82\xac!" and result.text == "\u20ac!"


def test_grad_mode_of_the_caller_is_untouched_between_bytes():
    for _ in stream(Chain(), b"", sampling(max_new_tokens=3)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@given(st.text(), st.binary(max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_utf8_in_any_pieces(text, junk, data):
    for whole in (text.encode(), text.encode() + junk, junk + text.encode()):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
        decoder, shown = Utf8Stream(), ""
        for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
            shown += decoder.push(whole[start:stop])
            if whole == text.encode():
                assert text.startswith(shown)  # never a part of a character
        assert shown + decoder.flush() == whole.decode("utf-8", "replace")


def test_utf8_byte_by_byte():
    decoder = Utf8Stream()
    pieces = [decoder.push(bytes([b])) for b in "a\u20ac\U0001f600".encode()]
    assert pieces == ["a", "", "", "\u20ac", "", "", "", "\U0001f600"]
    assert decoder.push(b"\xf0\x9f") == "" and decoder.flush() == "\ufffd"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_are_refused(bad):
    logits = torch.zeros(256)
    logits[3] = bad
    with pytest.raises(BitbyteError, match="NaN or infinite"):
        filtered_probs(logits, sampling())
    model = Chain()
    model.table.data[:] = bad
    with pytest.raises(BitbyteError, match="NaN or infinite"):
        next(stream(model, b"", sampling(temperature=0.0)))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("temperature", -1, "from 0"), ("temperature", 10.1, "to 10"),
        ("temperature", math.nan, "from 0"), ("top_p", 0, "above 0"), ("top_p", 1.01, "at most 1"),
        ("top_k", -1, "from 0"), ("top_k", 257, "to 256"), ("top_k", 2.5, "whole number"),
        ("min_p", -0.1, "from 0"), ("min_p", 1.1, "to 1"), ("repetition_penalty", 0, "from 0.1"),
        ("repetition_penalty", math.inf, "to 10"), ("repetition_window", -1, "from 0"),
        ("max_new_tokens", 0, "at least 1"), ("seed", -1, "from 0"), ("seed", 2**63, "2^63"),
        ("temperature", "0.8", "a number"), ("top_k", True, "whole number"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(name, value, says):
    with pytest.raises(BitbyteError, match=name) as error:
        SamplingConfig(**{name: value})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_bad_arguments_are_refused():
    with pytest.raises(BitbyteError, match="exact, block"):
        next(stream(Chain(), b"", sampling(), slide="half"))
    with pytest.raises(BitbyteError, match=r"encode\(\)"):
        generate(Chain(), "text", sampling())
