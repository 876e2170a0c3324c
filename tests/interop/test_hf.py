"""Models of transformers: tiny ones, made here from a config, with tokenizers trained here."""

import json

import numpy as np
import pytest
import torch
from support import FOX, Bytes, words

from bitbyte.files import BitbyteError
from bitbyte.interop import hf
from bitbyte.passport import audits, tokenizations
from bitbyte.passport.issue import passport

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
TEXT = words(3000) + "  Stra\u00dfe, na\u00efve \u2603\n\n caf\u00e9 \U0001f600\tend\r\n".encode()
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "dtype": "float32"}
LLAMA = {"intermediate_size": 48, "max_position_embeddings": 64, **SIZES}


def byte_level(bos: bool = True):
    """A tokenizer of GPT-2's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"] if bos else [], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT.decode()], trainer)
    more = {"bos_token": "<s>"} if bos else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more)


def metaspace():
    """A tokenizer of Llama's kind: spaces as U+2581, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    special = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([words(3000).decode()], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>"
    )


def lower_case():
    """A tokenizer of BERT's kind, which loses capitals and white space."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[MASK]"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT.decode()], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", mask_token="[MASK]", unk_token="[UNK]"
    )


def save(folder, config, tokenizer, kind=None, by: float = 3.0):
    """A model with random weights, sharper than at initialization, and its tokenizer."""
    torch.manual_seed(0)
    kind = kind or transformers.AutoModelForCausalLM
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(by)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def llama(folder, tokenizer, **changes):
    size = 256 if tokenizer is None else len(tokenizer)
    config = transformers.LlamaConfig(vocab_size=size, **LLAMA | changes)
    return save(folder, config, tokenizer)


def gpt2(folder):
    tokenizer = byte_level(bos=False)
    return save(folder, transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=48,
    ), tokenizer)  # fmt: skip


def mamba(folder):
    tokenizer = byte_level()
    return save(folder, transformers.MambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4,
    ), tokenizer)  # fmt: skip


def byt5(folder):
    tokenizer = transformers.ByT5Tokenizer()
    config = transformers.GPTNeoXConfig(
        vocab_size=384, intermediate_size=48, max_position_embeddings=64, **SIZES
    )
    return save(folder, config, tokenizer)


def masked(folder):
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>"})
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), intermediate_size=48, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0,
        reference_compile=False, **SIZES,
    )  # fmt: skip
    return save(folder, config, tokenizer, transformers.AutoModelForMaskedLM)


HONEST = {
    "llama, byte-level BPE": lambda folder: llama(folder, byte_level()),
    "llama, metaspace with bytes": lambda folder: llama(folder, metaspace()),
    "llama, no tokenizer": lambda folder: llama(folder, None),
    "gpt2, no start token": gpt2,
    "mamba": mamba,
    "gpt-neox, ByT5": byt5,
    "masked": masked,
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(TEXT[-3000:])
    return path


def failed(record: dict) -> list[str]:
    return [a["name"] for a in record["audits"] if a["verdict"] == audits.FAIL]


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_pass(name, tmp_path, text):
    subject = hf.HuggingFace(HONEST[name](tmp_path / "model"))
    limit = {"limit": 300} if name == "masked" else {}
    record = passport(subject, text, **limit)
    assert failed(record) == [], record["audits"]
    assert record["verdict"] == "pass" and record["bpb"] > 1
    assert record["kind"] == ("chain_rule:left_to_right" if name == "masked" else "exact")


def by_hand(model, inputs: list[int], targets: list[int]) -> float:
    """Bits of targets; logits after all inputs, which end at each target's predecessor."""
    logits = model(input_ids=torch.tensor([inputs])).logits[0, -len(targets) :].double()
    nats = -logits.log_softmax(-1)[range(len(targets)), targets]
    return float(nats.sum() / np.log(2))


@torch.no_grad()
def test_the_number_is_what_a_loop_over_windows_gives(tmp_path, text):
    subject = hf.HuggingFace(llama(tmp_path / "model", byte_level()))
    ids, bos = subject.encode(text.read_bytes()).tolist(), subject.tokenizer.bos_token_id
    last = len(ids) % 20 or 20  # the last window is full, too, but not all of it is scored
    starts = [*range(0, len(ids) - last, 20), len(ids) - 20]
    want = sum(
        by_hand(
            subject.model, [bos, *ids[i : i + 19]], ids[i : i + 20][-last * (i == starts[-1]) :]
        )
        for i in starts
    )
    record = passport(subject, text, window=20)
    assert record["bits"] == pytest.approx(want, rel=1e-6)
    assert record["ids"] == len(ids) and record["bytes"] == 3000
    assert "precedes every window" in record["context"]["start"]


@torch.no_grad()
def test_without_a_start_token_the_first_id_is_uniform_and_windows_overlap(tmp_path, text):
    subject = hf.HuggingFace(gpt2(tmp_path / "model"))
    ids = subject.encode(text.read_bytes()).tolist()
    want = np.log2(subject.n_ids) + by_hand(subject.model, ids[:19], ids[1:20])
    want += sum(
        by_hand(subject.model, ids[i - 1 : i + 18], ids[i : i + 19])
        for i in range(20, len(ids) - 18, 19)
    )
    rest = (len(ids) - 20) % 19
    if rest:
        want += by_hand(subject.model, ids[-20:-1], ids[-rest:])
    record = passport(subject, text, window=20)
    assert record["context"]["stride"] == 19
    assert record["bits"] == pytest.approx(want, rel=1e-6)
    with pytest.raises(BitbyteError, match="needs an id of context"):
        passport(subject, text, window=20, stride=20)


def test_any_bytes_with_a_byte_level_tokenizer(tmp_path):
    (tmp_path / "any").write_bytes(np.random.default_rng(0).bytes(1500) + b"text" + b"\xff\xc3")
    subject = hf.HuggingFace(llama(tmp_path / "model", byte_level()))
    record = passport(subject, tmp_path / "any")
    assert record["verdict"] == "pass", record["audits"]
    assert record["bpb"] > 8
    subject = hf.HuggingFace(llama(tmp_path / "meta", metaspace()))
    record = passport(subject, tmp_path / "any")
    (coverage,) = [a for a in record["audits"] if a["name"] == "coverage"]
    assert coverage["verdict"] == "fail" and "is not UTF-8 text" in coverage["text"]


def test_a_tokenizer_that_changes_the_text_is_found_at_its_place(tmp_path):
    (tmp_path / "text").write_bytes(b"the quick Brown fox " * 20)
    tokenizer = lower_case()
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **LLAMA)
    record = passport(hf.HuggingFace(save(tmp_path / "m", config, tokenizer)), tmp_path / "text")
    assert record["verdict"] == "fail" and record["bpb"] is None and "coverage" in failed(record)
    (coverage,) = [a for a in record["audits"] if a["name"] == "coverage"]
    assert "byte 10 of the file" in coverage["text"] and "Brown" in coverage["text"]


def every_way(subject, data: bytes) -> float:
    """Bits of the bytes, by all sequences of ids that spell them."""
    table = subject.vocabulary.table

    def ways(rest: bytes):
        if not rest:
            yield ()
        for i, text in enumerate(table[: subject.n_ids]):
            if text and rest.startswith(text):
                yield from ((i, *more) for more in ways(rest[len(text) :]))

    nats = [subject.nats(np.array([ids]), len(ids)).sum() for ids in ways(data)]
    return -np.log(np.exp(-np.array(nats)).sum()) / np.log(2)


def test_a_beam_sums_over_tokenizations(tmp_path):
    subject = hf.HuggingFace(llama(tmp_path / "model", byte_level()))
    word = next(t for t in subject.vocabulary.table if len(t) == 3 and t.isalpha()) * 2
    read = Bytes(word).read
    full = tokenizations.measure(subject, read, len(word), beam=1000)
    assert full.summed == pytest.approx(every_way(subject, word), abs=1e-4)
    narrow = tokenizations.measure(subject, read, len(word), beam=1)
    assert full.summed <= narrow.summed <= narrow.chosen == full.chosen
    assert full.summed < full.chosen - 1e-3
    (tmp_path / "text").write_bytes(TEXT[-3000:])
    record = passport(subject, tmp_path / "text", marginal=150)
    assert "first 150 bytes" in record["facts"]["tokenizations"]
    with pytest.raises(BitbyteError, match="no table of the bytes"):
        tokenizations.measure(hf.HuggingFace(llama(tmp_path / "m", metaspace())), read, 3)


class Dropout(hf.HuggingFace):
    """A model left in training mode."""

    def nats(self, ids_BT, n):
        self.model.train()
        return super().nats(ids_BT, n)


class Padded(hf.HuggingFace):
    """Windows are padded on the left, and the padding is not masked."""

    def _inputs(self, ids_BT):
        ids = super()._inputs(ids_BT)
        room = max(0, self.window - ids.shape[1])
        return torch.cat((torch.zeros(len(ids), room, dtype=torch.int64), ids), 1)

    def logprobs(self, ids_BT):
        return super().logprobs(ids_BT)[:, -ids_BT.shape[1] :]


class Batched(hf.HuggingFace):
    """Normalised over the batch."""

    def _logits(self, ids_BT):
        logits = super()._logits(ids_BT)
        return logits - 0.05 * logits.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "audit", "place"),
    [(Dropout, "repeat", "random is left on"), (Padded, "batch", "when the window ends with id"),
     (Batched, "batch", "when other windows of the batch change")],
)  # fmt: skip
def test_planted_faults(kind, audit, place, tmp_path, text):
    folder = llama(tmp_path / "model", byte_level(), attention_dropout=0.2)
    record = passport(kind(folder), text, limit=1500)
    assert audit in failed(record) and record["bpb"] is None
    assert place in str(record["audits"])


def test_bad_folders_are_one_line(tmp_path):
    folder = llama(tmp_path / "model", byte_level())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(BitbyteError, match="has no usable tokenizer"):
        hf.HuggingFace(folder)
    config = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"num_hidden_layers": 3}, "lacks .* of its weights, such as model.layers.2"),
        ({"model_type": "unheard-of"}, "transformers cannot load"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": "own"}, "brings its own code"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(BitbyteError, match=said) as caught:
            hf.HuggingFace(folder)
        assert "\n" not in str(caught.value)
    weights = (folder / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    for name, content in (
        *(("config.json", json.dumps(config | changes).encode()) for changes in (
            {"hidden_size": "x"}, {"num_attention_heads": 0}, {"vocab_size": -1},
            {"hidden_act": "nope"},
        )),
        ("config.json", b"{"), ("config.json", b"[" * 100_000),
        ("model.safetensors", pointer), ("model.safetensors", weights[: len(weights) // 2]),
    ):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(weights)
        (folder / name).write_bytes(content)
        with pytest.raises(BitbyteError, match="cannot load") as caught:
            hf.HuggingFace(folder)
        assert "\n" not in str(caught.value)


def test_nan_weights_are_one_audit(tmp_path, text):
    subject = hf.HuggingFace(llama(tmp_path / "model", byte_level()))
    with torch.no_grad():
        subject.model.lm_head.weight.fill_(float("nan"))
    record = passport(subject, text)
    assert record["verdict"] == "fail" and "normalized" in failed(record)
    assert "not a number" in str(record["audits"])


def test_the_prefix_can_be_chosen(tmp_path, text):
    folder = llama(tmp_path / "model", byte_level())
    subject = hf.HuggingFace(folder, prefix=7)
    assert subject.first.startswith("token 7")
    with pytest.raises(BitbyteError, match="prefix is 4000"):
        hf.HuggingFace(folder, prefix=4000)
    assert passport(subject, text)["bpb"] != passport(hf.HuggingFace(folder), text)["bpb"]


def test_pieces_of_fox_come_back():
    for tokenizer in (byte_level(), metaspace(), transformers.ByT5Tokenizer(), None):
        vocabulary = hf.Vocabulary(tokenizer)
        for data in (FOX[:200], TEXT[-60:], b" a  b", b"\n"):
            assert vocabulary.decode(vocabulary.encode(data)) == data
