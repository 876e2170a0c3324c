"""Infilling: exact joint laws, brute-force paths and searches, what stays, what is refused."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sampling

from bitbyte.config import DiffusionConfig, MambaConfig, TransformerConfig
from bitbyte.files import BitbyteError
from bitbyte.generate import filtered_probs
from bitbyte.infill import _probs, denoise, infill, parse_mask, random_masks, sample, show
from bitbyte.models import build
from bitbyte.vocab import MASK

LETTERS = b"abc"
CELLS = list(itertools.product(range(3), repeat=3))
M = MASK


def conditionals(joint, ids):
    """Law of each hidden position of three given the known ones, {position: [p of a, b, c]}."""
    laws = {}
    for position in (p for p in range(3) if ids[p] == MASK):
        law = [0.0] * 3
        for cell in CELLS:
            if all(b in (MASK, LETTERS[c]) for b, c in zip(ids, cell, strict=True)):
                law[cell[position]] += float(joint[cell])
        laws[position] = [p / sum(law) for p in law]
    return laws


class Joint(torch.nn.Module):
    """Bidirectional model of three letters whose laws are the conditionals of a joint law."""

    config = SimpleNamespace(family="diffusion")
    context = 3

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(3, 3, 3, dtype=torch.float64, generator=generator) * 1.5
        self.joint = scores.exp() / scores.exp().sum()
        self.answers = {}
        self.calls = 0

    def logits(self, ids_BT):
        assert not torch.is_grad_enabled()
        self.calls += 1
        ids = tuple(ids_BT[0].tolist())
        if ids not in self.answers:
            logits_TV = torch.full((3, 256), -1e9, dtype=torch.float64)
            for position, law in conditionals(self.joint, ids).items():
                logits_TV[position, list(LETTERS)] = torch.tensor(law).double().log()
            self.answers[ids] = logits_TV[None]
        return self.answers[ids]


class Field(torch.nn.Module):
    """Bidirectional model whose laws depend on all known bytes and on the position."""

    config = SimpleNamespace(family="diffusion")

    def __init__(self, context=64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(257, 256, generator=generator) * 2)
        self.context = context
        self.seen = []

    def logits(self, ids_BT):
        assert ids_BT.shape[1] <= self.context
        self.seen.append(ids_BT[0].tolist())
        places = torch.arange(1, ids_BT.shape[1] + 1)
        sums_BT = ((ids_BT * places).sum(1, keepdim=True) + 31 * places) % 257
        return self.table[sums_BT]


class Bigrams(torch.nn.Module):
    """Causal model: the next byte, one of four letters, depends on the last id alone."""

    config = SimpleNamespace(family="mamba")
    letters = b"abcd"

    def __init__(self, seed=0, context=64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.full((257, 256), -40.0)
        table[:, list(self.letters)] = torch.randn(257, 4, generator=generator)
        self.table = torch.nn.Parameter(table)
        self.context = context

    def init_state(self, batch):
        return None

    def step(self, ids_B, state):
        assert not torch.is_grad_enabled()
        return self.table[ids_B], state

    def forward(self, ids_BT):
        before_BT = torch.nn.functional.pad(ids_BT[:, :-1], (1, 0), value=256)
        return -self.table[before_BT].log_softmax(-1).gather(2, ids_BT[..., None])[..., 0]


class PrefillBigrams(Bigrams):
    def prefill(self, ids_BT, state):
        return self.table[ids_BT[:, -1]], state


def run_all(model, draws=4000, **options):
    """How often each cell came, from as many seeds."""
    counts = dict.fromkeys(CELLS, 0)
    for seed in range(draws):
        ids_T = denoise(model, torch.tensor([M, M, M]), sampling(seed=seed), **options)
        counts[tuple(LETTERS.index(byte) for byte in ids_T.tolist())] += 1
    return counts


def chi_square(counts, law):
    n = sum(counts.values())
    return sum((counts[c] - n * float(law[c])) ** 2 / (n * float(law[c])) for c in CELLS)


def law_of_steps(joint, steps):
    """Exact law when each position is revealed in one of the steps, any as likely as another."""
    patterns = Counter()  # who comes before and with whom is all that matters
    for times in itertools.product(range(steps), repeat=3):
        patterns[tuple(sorted(set(times)).index(t) for t in times)] += 1 / steps**3
    law = dict.fromkeys(CELLS, 0.0)
    for (ranks, share), cell in itertools.product(patterns.items(), CELLS):
        ids, p = [M] * 3, share
        for now in range(3):
            laws = conditionals(joint, ids)
            for t in (t for t in range(3) if ranks[t] == now):
                p *= laws[t][cell[t]]
                ids[t] = LETTERS[cell[t]]
        law[cell] += p
    return law


CHI_SQUARE_26 = 54.05  # 99.9 % of the law of chi-square with 27 - 1 degrees of freedom


@pytest.mark.parametrize(("order", "draws"), [("left_to_right", 4000), ("confidence", 700)])
def test_one_byte_a_pass_samples_the_joint_law(order, draws):
    model = Joint(seed=3)
    assert chi_square(run_all(model, draws, order=order), model.joint) < CHI_SQUARE_26
    assert model.calls == 3 * draws


def test_ancestral_samples_its_exact_law():
    model = Joint(seed=3)
    counts = run_all(model, 1200, order="ancestral")  # three steps: bytes often come together
    assert chi_square(counts, law_of_steps(model.joint, 3)) < CHI_SQUARE_26
    assert chi_square(counts, model.joint) > 5 * CHI_SQUARE_26  # the test tells them apart
    # a pass for each step that reveals something: 3 (1 - (2/3)^3) of three
    assert model.calls / 1200 == pytest.approx(3 * (1 - (2 / 3) ** 3), abs=0.04)


def test_ancestral_in_many_steps_nears_the_joint_law():
    model = Joint(seed=3)
    counts = run_all(model, 1000, order="ancestral", steps=20)
    assert chi_square(counts, law_of_steps(model.joint, 20)) < CHI_SQUARE_26
    assert chi_square(counts, model.joint) < CHI_SQUARE_26
    passes = 20 * (1 - (1 - 1 / 20) ** 3)  # 2.85 of 20 steps reveal something
    assert model.calls / 1000 == pytest.approx(passes, abs=0.03)


def test_all_bytes_in_one_pass_are_independent():
    model = Joint(seed=3)
    law = law_of_steps(model.joint, 1)
    for order in ("confidence", "ancestral", "left_to_right"):
        before = model.calls
        counts = run_all(model, 400, order=order, steps=1)
        assert model.calls - before == 400
        assert chi_square(counts, law) < CHI_SQUARE_26
        assert chi_square(counts, model.joint) > 10 * CHI_SQUARE_26


@pytest.mark.parametrize("given_ids", [(M, M, M), (M, LETTERS[1], M), (LETTERS[2], M, M)])
def test_greedy_confidence_takes_the_brute_force_path(given_ids):
    for seed in range(30):
        joint, ids, expected = Joint(seed).joint, list(given_ids), []
        while M in ids:
            laws = conditionals(joint, ids)
            ranked = {t: sorted(law) for t, law in laws.items()}
            best = max(laws, key=lambda t: (round(ranked[t][2] - ranked[t][1], 12), -t))
            letter = max(range(3), key=lambda i: laws[best][i])
            ids[best] = LETTERS[letter]
            expected.append((best, ids[best], -math.log2(laws[best][letter])))
        revealed = []
        result = denoise(
            Joint(seed), torch.tensor(given_ids), sampling(temperature=0.0),
            on_reveal=lambda *r, to=revealed: to.append(r),
        )  # fmt: skip
        assert result.tolist() == ids
        assert [r[:2] for r in revealed] == [e[:2] for e in expected]
        assert [r[2] for r in revealed] == pytest.approx([e[2] for e in expected], rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.3}, {"top_k": 2}, {"min_p": 0.3}])
def test_confidence_is_the_margin_under_the_filtered_law(changes):
    """Three positions a pass, the surest of the hidden ones by what would be drawn from."""
    c, model, batches = sampling(**changes), Field(), []
    denoise(model, torch.tensor([M] * 9), c, steps=3, on_reveal=lambda p, *_: batches.append(p))
    assert len(model.seen) == 3
    for number, ids in enumerate(list(model.seen)):
        with torch.no_grad():
            logits_TV = model.logits(torch.tensor([ids]))[0]
        margins = {}
        for t in (t for t in range(9) if ids[t] == M):
            first, second = sorted(filtered_probs(logits_TV[t], c).tolist())[:-3:-1]
            margins[t] = first - second
        surest = sorted(margins, key=lambda t: -margins[t])[:3]
        assert batches[3 * number :][:3] == sorted(surest)


def test_ties_go_to_the_first_position():
    model = Field()
    torch.nn.init.zeros_(model.table)
    order = []
    denoise(model, torch.tensor([M, 65, M, M]), sampling(), on_reveal=lambda *r: order.append(r))
    assert [(t, bits) for t, _, bits in order] == [(0, 8.0), (2, 8.0), (3, 8.0)]


@given(
    st.lists(st.one_of(st.just(M), st.integers(0, 256)), max_size=40),
    st.sampled_from(["confidence", "ancestral", "left_to_right"]),
    st.one_of(st.none(), st.integers(1, 60)), st.sampled_from([0.0, 0.7]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_known_bytes_stay_and_passes_are_counted(ids, order, steps, temperature, seed):
    model, c = Field(), sampling(temperature=temperature, seed=seed)
    before_T = torch.tensor(ids, dtype=torch.long)
    positions, revealed = [t for t, byte in enumerate(ids) if byte == M], []
    if not positions:
        assert denoise(model, before_T, c, order=order, steps=steps).tolist() == ids
        return
    result = infill(
        model, before_T, c, order=order, steps=steps, on_reveal=lambda *r: revealed.append(r)
    )
    assert before_T.tolist() == ids  # the caller's ids are his own
    assert M not in result.ids_T.tolist()
    assert [b for b, old in zip(result.ids_T.tolist(), ids, strict=True) if old != M] == [
        byte for byte in ids if byte != M
    ]
    assert result.data == bytes(result.ids_T.tolist())
    assert result.positions == positions == sorted(t for t, *_ in revealed)
    assert {t: byte for t, byte, _ in revealed} == {t: result.data[t] for t in positions}
    mean = math.fsum(bits for *_, bits in revealed) / len(revealed)
    assert result.bits_per_byte == pytest.approx(mean, rel=1e-12)
    assert result.passes == len(model.seen) <= min(len(positions), steps or len(positions))
    assert result.method == f"{order} denoising"
    again = denoise(Field(), before_T, c, order=order, steps=steps)
    assert again.tolist() == result.ids_T.tolist()


@pytest.mark.parametrize("order", ["confidence", "ancestral", "left_to_right"])
def test_seeds(order):
    ids_T = torch.tensor([M, 65, *[M] * 20])
    results = [
        denoise(Field(), ids_T, sampling(seed=seed), order=order).tolist() for seed in (1, 1, 2)
    ]
    assert results[0] == results[1] != results[2]
    greedy = {
        bytes(denoise(Field(), ids_T, sampling(temperature=0.0, seed=s), order=order).tolist())
        for s in range(5)
    }
    assert len(greedy) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"temperature": 0.3}, {"temperature": 0.0}, {"temperature": 5e-324}, {"top_k": 5},
        {"top_p": 0.8}, {"min_p": 0.2}, {"repetition_penalty": 2.0, "temperature": 0.0},
    ],
)  # fmt: skip
def test_laws_of_many_rows_are_the_filtered_laws(changes):
    c = sampling(**changes)
    logits_NV = torch.randn(7, 256, generator=torch.Generator().manual_seed(1)).double() * 4
    logits_NV[0, [9, 30]] = 99.0  # a tie
    left_T = torch.tensor([M, 9, M, 70])
    expected = torch.stack([filtered_probs(row, c, bytes([9, 70])) for row in logits_NV])
    torch.testing.assert_close(_probs(logits_NV, c, [left_T] * 7), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("point", [0.0, 1 - 2**-53])
def test_a_byte_of_probability_zero_never_comes(point, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *n, dtype, **_: torch.full(n, point, dtype=dtype))
    model = Joint(seed=0)  # NUL comes first and 255 last, both impossible
    letter = LETTERS[0 if point == 0 else 2]
    assert denoise(model, torch.tensor([M] * 3), sampling()).tolist() == [letter] * 3


@pytest.mark.parametrize("order", ["confidence", "left_to_right"])
def test_uneven_steps_reveal_more_at_first(order):
    model = Field()
    denoise(model, torch.tensor([M] * 10), sampling(), order=order, steps=4)
    assert [ids.count(M) for ids in model.seen] == [10, 7, 4, 2]


def test_repetition_penalty_counts_known_bytes_to_the_left():
    model, c = Field(), sampling(temperature=0.0, repetition_penalty=2.0)
    torch.nn.init.ones_(model.table)  # greedy takes the lowest byte that is not on the left
    ids_T = torch.tensor([0, M, 1, M, 2, M])
    assert denoise(model, ids_T, c, order="left_to_right").tolist() == [0, 1, 1, 2, 2, 3]


def test_broken_logits_are_refused():
    model = Field()
    torch.nn.init.constant_(model.table, math.nan)
    for c in (sampling(), sampling(temperature=0.0), sampling(top_k=3)):
        with pytest.raises(BitbyteError, match="NaN or infinite"):
            denoise(model, torch.tensor([M]), c)


def best_fill(model, ids, start, stop, until):
    """The likeliest letters for a span, by trying all of them, and the bits of each."""
    best = None
    for letters in itertools.product(model.letters, repeat=stop - start):
        text = [*ids[:start], *letters, *ids[stop:until]]
        with torch.no_grad():
            nats = model(torch.tensor([text]))[0, start:].double().tolist()
        best = min(best or (math.inf,), (sum(nats), letters, nats[: stop - start]))
    return best[1], [n / math.log(2) for n in best[2]]


@pytest.mark.parametrize("kind", [Bigrams, PrefillBigrams])
def test_search_finds_what_brute_force_finds(kind):
    a, b, d = b"abd"
    greedy_differs = 0
    for seed in range(8):
        model = kind(seed)
        ids = [M, a, b, M, M, d, a, M]
        expected, bits = list(ids), []
        for start, stop, until in ((0, 1, 3), (3, 5, 7), (7, 8, 8)):
            letters, costs = best_fill(model, expected, start, stop, until)
            expected[start:stop] = letters
            bits += costs
        # high temperature: 300 draws of 16 fills hold them all, but for a chance of 1e-7
        result = infill(model, torch.tensor(ids), sampling(temperature=4.0), candidates=300)
        assert result.ids_T.tolist() == expected
        assert result.bits_per_byte == pytest.approx(sum(bits) / 4, rel=1e-6)
        assert result.method == "suffix-scored search, 300 candidates"
        one = infill(model, torch.tensor(ids), sampling(temperature=4.0), candidates=1)
        zero = infill(model, torch.tensor(ids), sampling(temperature=0.0, seed=seed))
        assert zero.ids_T.tolist() == one.ids_T.tolist()  # candidate 0 is the greedy one
        assert zero.method == one.method == "suffix-scored search, 1 candidate"
        greedy_differs += one.ids_T.tolist() != expected
        # spans: START / 3 / 7 ids before them, then a step for each byte but the first, a score
        steps = {Bigrams: 1 + 4 + 8, PrefillBigrams: 3}[kind]
        assert result.passes == steps + 1 + 3
    assert greedy_differs >= 4  # else the suffix decides nothing here


def test_candidate_zero_is_greedy_byte_by_byte():
    model, text, last = Bigrams(seed=3), [], 256
    assert model.table[256].argmax() != model.table[0].argmax()
    for _ in range(12):
        last = int(model.table[last].argmax())
        text.append(last)
    assert infill(model, torch.tensor([M] * 12), sampling(), candidates=1).data == bytes(text)


SMALL = {"n_layer": 1, "d_model": 32, "seq_len": 16, "linear": "dense"}


@pytest.mark.parametrize("model_config", [TransformerConfig(**SMALL), MambaConfig(**SMALL)])
def test_fills_of_causal_models_cost_what_their_forward_says(model_config):
    model = build(model_config)
    torch.nn.init.normal_(model.embed, generator=torch.Generator().manual_seed(1))
    ids_T = parse_mask("\u25a1ab\u25a1\u25a1cdefghijk\u25a1\u25a1".encode())
    assert len(ids_T) == 16
    revealed = []
    result = infill(model, ids_T, sampling(seed=5), on_reveal=lambda *r: revealed.append(r))
    with torch.no_grad():
        bits_T = model(result.ids_T[None])[0].double() / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits_T[result.positions].mean().item(), rel=1e-5)
    assert [t for t, *_ in revealed] == result.positions == [0, 3, 4, 14, 15]
    assert [b for *_, b in revealed] == pytest.approx(bits_T[result.positions].tolist(), rel=1e-4)
    known = ids_T != M
    assert torch.equal(result.ids_T[known], ids_T[known])
    assert infill(model, ids_T, sampling(seed=5)).data == result.data
    assert len(infill(model, torch.full((16,), M), sampling()).data) == 16


def test_fills_of_a_diffusion_model_cost_what_its_laws_say():
    model = build(DiffusionConfig(**SMALL))
    torch.nn.init.normal_(model.embed, generator=torch.Generator().manual_seed(1))
    ids_T = parse_mask("\u25a1ab\u25a1\u25a1cdefghijk\u25a1\u25a1".encode())
    result = infill(model, ids_T, sampling(seed=5), order="left_to_right")
    bits, now_T = [], ids_T.clone()
    for t in result.positions:
        with torch.no_grad():
            laws_TV = model.logits(now_T[None])[0].double().log_softmax(1)
        bits.append(-laws_TV[t, result.ids_T[t]].item() / math.log(2))
        now_T[t] = result.ids_T[t]
    assert result.bits_per_byte == pytest.approx(sum(bits) / 5, rel=1e-9)
    assert result.passes == 5
    assert len(sample(model, b"ab", sampling(max_new_tokens=40))) == 40


@pytest.mark.parametrize("model", [Field(context=8), Bigrams(context=8)])
def test_what_cannot_be_filled_is_refused(model):
    for ids, words in (
        ([65, 66], "nothing is masked"),
        ([], "nothing is masked"),
        ([M] * 9, "has 9 bytes, this model takes at most 8"),
        ([M, 257], "257 is not an id"),
        ([M, -1], "-1 is not an id"),
    ):
        with pytest.raises(BitbyteError, match=words):
            infill(model, torch.tensor(ids, dtype=torch.long), sampling())
    for ids_T in (torch.tensor([[M]]), torch.tensor([256.0]), torch.tensor([7], dtype=torch.uint8)):
        with pytest.raises(BitbyteError, match="one row of dtype long"):
            infill(model, ids_T, sampling())
    with pytest.raises(BitbyteError, match="candidates is 0"):
        infill(model, torch.tensor([M]), sampling(), candidates=0)
    assert len(infill(model, torch.tensor([M] * 8), sampling()).data) == 8


def test_wrong_orders_and_steps_are_refused():
    with pytest.raises(BitbyteError, match="no order 'best'; choose from confidence"):
        denoise(Field(), torch.tensor([M]), sampling(), order="best")
    with pytest.raises(BitbyteError, match="steps is 0"):
        denoise(Field(), torch.tensor([M]), sampling(), steps=0)


def test_sample_goes_on_in_blocks():
    model = Field(context=8)
    reveals = []
    new = sample(
        model, b"abcde", sampling(max_new_tokens=10), order="left_to_right",
        on_reveal=lambda *r: reveals.append(r),
    )  # fmt: skip
    text = b"abcde" + new
    assert len(new) == 10
    assert [t for t, *_ in reveals] == list(range(5, 15))
    assert bytes(byte for _, byte, _ in reveals) == new
    # half of the context is new, the rest is what stands before it; the last block is two bytes
    firsts = [ids for ids in model.seen if ids == sorted(ids, key=lambda byte: byte == M)]
    starts = [(ids.index(M), len(ids)) for ids in firsts]
    assert starts[0] == (4, 8)
    assert model.seen[0] == [*text[1:5], M, M, M, M]
    assert model.seen[4] == [*text[5:9], M, M, M, M]
    assert model.seen[8] == [*text[7:13], M, M]
    assert len(model.seen) == 10
    # what fits is one window, also from nothing
    for prompt, n in ((b"", 8), (b"abc", 5)):
        model.seen.clear()
        assert len(sample(model, prompt, sampling(max_new_tokens=n), steps=1)) == n
        assert model.seen == [[*prompt, *[M] * n]]
    assert len(sample(Field(context=1), b"ab", sampling(max_new_tokens=3))) == 3


def test_blocks_do_not_repeat_their_draws():
    model = Field(context=8)
    torch.nn.init.zeros_(model.table)  # every byte is a draw of its own
    new = sample(model, b"", sampling(max_new_tokens=16), steps=1)
    assert len({new[i : i + 4] for i in range(0, 16, 4)}) == 4


def test_sample_refuses_causal_models_and_text():
    with pytest.raises(BitbyteError, match="family mamba"):
        sample(Bigrams(), b"", sampling())
    with pytest.raises(BitbyteError, match="must be bytes"):
        sample(Field(), "text", sampling())


def test_mask_signs():
    assert parse_mask("a\u25a1\u25a1\u00e9".encode()).tolist() == [97, M, M, 0xC3, 0xA9]
    assert parse_mask(b"\x00__\xff", b"_").tolist() == [0, M, M, 255]
    assert parse_mask(b"a???", b"??").tolist() == [97, M, 63]
    assert parse_mask(b"").tolist() == [] and parse_mask(b"").dtype == torch.long
    with pytest.raises(BitbyteError, match="sign is empty"):
        parse_mask(b"a", b"")


def test_show_escapes_what_is_not_text():
    ids_T = torch.tensor([*b"a\n\x1b[2J\t", M, 0xC3, M, 0xC3, 0xA9, 0xFF])
    assert show(ids_T) == "a\n\\x1b[2J\\t\u25a1\\xc3\u25a1\u00e9\\xff"
    assert show(ids_T, b"_") == "a\n\\x1b[2J\\t_\\xc3_\u00e9\\xff"
    assert show(torch.tensor([], dtype=torch.long)) == ""


@given(st.text(st.one_of(st.characters(exclude_categories=["C"]), st.sampled_from("\n\u25a1"))))
def test_show_undoes_parse_mask(text):
    ids_T = parse_mask(text.encode())
    assert show(ids_T) == text
    assert int((ids_T == M).sum()) == text.count("\u25a1")


def test_random_masks():
    ids_T = torch.arange(40)
    for share, n in ((1.0, 40), (0.5, 20), (0.26, 10), (0.27, 11), (0.001, 1)):
        hidden_T = random_masks(ids_T, share, seed=1)
        assert int((hidden_T == M).sum()) == n
        assert torch.equal(hidden_T[hidden_T != M], ids_T[hidden_T != M])
    assert ids_T.tolist() == list(range(40))
    assert torch.equal(random_masks(ids_T, 0.5, 1), random_masks(ids_T, 0.5, 1))
    assert not torch.equal(random_masks(ids_T, 0.5, 1), random_masks(ids_T, 0.5, 2))
    for share in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(BitbyteError, match="share is"):
            random_masks(ids_T, share, 0)
    with pytest.raises(BitbyteError, match="text is empty"):
        random_masks(ids_T[:0], 0.5, 0)
