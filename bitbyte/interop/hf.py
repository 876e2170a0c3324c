"""Models of Hugging Face's transformers, in a local folder, as subjects of a passport.

Causal models predict each token from those before it.  A masked model is scored as its code from
left to right: token t from the tokens before it and masks at all later places.  Nothing is fetched
and no code of a stranger's runs: only safetensors are read, and models that need
``trust_remote_code`` are refused.

Shapes: as in `evaluate.subject`.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import torch

from bitbyte.evaluate.subject import WINDOW, NotGivenBackError, Subject
from bitbyte.files import BitbyteError, shown
from bitbyte.scoring import CHAIN_RULE
from bitbyte.vocab import N_BYTES

PIECE = 64  # positions whose probabilities are computed at once
CACHES = ("cache", "past_key_values", "cache_params")  # names of a state, by version and model


def need(*modules: str, extra: str = "export") -> None:
    """Raise BitbyteError, naming the extra, if one of these modules is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise BitbyteError(f'{module} is missing: pip install "bitbyte[{extra}]"')


class HuggingFace(Subject):
    """A causal or masked language model with its tokenizer.

    ``prefix``: the token before each window; by default the tokenizer's bos (cls of a masked
    model).  With ``network`` the name may be one on the Hub, with ``trust`` the code of the folder
    is run.  Raises BitbyteError.
    """

    source = "huggingface"

    def __init__(
        self, folder, *, device=None, prefix: int | None = None, network: bool = False,
        trust: bool = False,
    ):  # fmt: skip
        super().__init__()
        need("transformers")
        with _quiet(network), torch.compiler.set_stance("force_eager"):
            config, self.model, self.tokenizer = _load(str(folder), network, trust)
        if getattr(config, "quantization_config", None):  # its layers would start a C++ compiler
            self.model.forward = torch.compiler.set_stance("force_eager")(self.model.forward)
        self.name = Path(str(folder)).name
        self.device = torch.device(device or "cpu")
        self.model = self.model.eval().to(self.device)
        self.masked = type(self.model).__name__.endswith("MaskedLM")
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.vocabulary = Vocabulary(self.tokenizer)
        head = self.model.get_output_embeddings()
        self.n_ids = head.weight.shape[0] if head is not None else config.vocab_size
        if prefix is None:
            words = ("cls_token_id", "bos_token_id") if self.masked else ("bos_token_id",)
            known = (getattr(self.tokenizer, word, None) for word in words)
            prefix = next((i for i in known if i is not None), None)
        rows = self.model.get_input_embeddings().weight.shape[0]
        if prefix is not None and not 0 <= prefix < rows:
            raise BitbyteError(f"prefix is {prefix}; {self.name} has ids 0 to {rows - 1}")
        self.prefix, self.overlaps = prefix, prefix is None and not self.masked
        if prefix is not None:
            token = self.tokenizer.convert_ids_to_tokens(prefix) if self.tokenizer else prefix
            self.first = f"token {prefix} ({shown(token)}) precedes every window and is not scored"
        elif not self.masked:
            self.first = "an id of context; the first of the file is uniform over all ids"
        self.longest = _positions(config)
        if self.longest is not None and self.masked:
            self.longest -= prefix is not None  # the last id is masked, and not left out
        self.window = min(WINDOW, self.longest or WINDOW)
        if self.masked:
            self._be_masked()
        self.batch_size = 8 if self.n_ids <= 1 << 12 else 1
        self.facts = {"architecture": type(self.model).__name__, "ids": f"{self.n_ids:,}",
                      "tokenizer": type(self.tokenizer).__name__}  # fmt: skip
        if Path(str(folder)).is_dir():
            self.sizes = {"folder:": _folder_bytes(Path(folder))}

    def _be_masked(self) -> None:
        self.kind, self.sample, self.window = CHAIN_RULE + "left_to_right", 16, min(self.window, 64)
        self.mask = getattr(self.tokenizer, "mask_token_id", None)
        if self.mask is None:
            self.mask = getattr(self.model.config, "mask_token_id", None)
        if self.mask is None:
            raise BitbyteError(f"{self.name} has no mask token, which a masked model needs")
        self.first += "; later tokens are masked" * (self.prefix is not None)
        if self.prefix is None:
            self.first = "a window of masks"

    def encode(self, piece: bytes) -> np.ndarray:
        return self.vocabulary.encode(piece)

    def decode(self, ids: np.ndarray) -> bytes:
        return self.vocabulary.decode(ids)

    def _inputs(self, ids_BT: np.ndarray) -> torch.Tensor:
        """ids whose logits predict ids_BT: without a prefix, all but the first."""
        ids = torch.from_numpy(np.ascontiguousarray(ids_BT)).to(self.device)
        if self.prefix is None:
            return ids[:, :-1]
        first = torch.full((len(ids), 1), self.prefix, device=self.device)
        return torch.cat((first, ids[:, :-1]), 1)

    def _logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids_BT, **({} if self.masked else {"use_cache": False})).logits

    def _with_first(self, logprobs_BTV: torch.Tensor) -> np.ndarray:
        """Without a prefix nothing predicts the first id of a window."""
        if self.prefix is None:
            first = torch.full((len(logprobs_BTV), 1, self.n_ids), -math.log(self.n_ids))
            logprobs_BTV = torch.cat((first, logprobs_BTV.cpu()), 1)
        return logprobs_BTV.cpu().numpy()

    @torch.no_grad()
    def logprobs(self, ids_BT: np.ndarray) -> np.ndarray:
        if self.masked:
            return self._masked(ids_BT, ids_BT.shape[1]).cpu().numpy()
        inputs = self._inputs(ids_BT)
        if not inputs.shape[1]:
            empty = torch.empty(len(ids_BT), 0, self.n_ids)
            return self._with_first(empty)
        return self._with_first(self._logits(inputs).float().log_softmax(-1))

    def _masked(self, ids_BT: np.ndarray, n: int) -> torch.Tensor:
        """ln p (B, n, V) of the last n ids, each with masks in its place and later."""
        ids = torch.from_numpy(np.ascontiguousarray(ids_BT)).to(self.device)
        T, extra, rows = ids.shape[1], int(self.prefix is not None), []
        for t in range(T - n, T):
            hidden_BT = ids.clone()
            hidden_BT[:, t:] = self.mask
            if extra:
                first = torch.full((len(ids), 1), self.prefix, device=self.device)
                hidden_BT = torch.cat((first, hidden_BT), 1)
            rows.append(self._logits(hidden_BT)[:, t + extra].float().log_softmax(-1))
        return torch.stack(rows, 1)

    @torch.no_grad()
    def nats(self, ids_BT: np.ndarray, n: int) -> np.ndarray:
        targets = torch.from_numpy(np.ascontiguousarray(ids_BT[:, -n:])).to(self.device)
        if self.masked:
            chosen = self._masked(ids_BT, n).gather(-1, targets[..., None])[..., 0]
            return -chosen.cpu().double().numpy()
        inputs, costs = self._inputs(ids_BT), []
        if self.prefix is None and n == ids_BT.shape[1]:
            costs.append(torch.full((len(ids_BT), 1), math.log(self.n_ids), device=self.device))
            targets = targets[:, 1:]
        if targets.shape[1]:
            logits_BTV = self._logits(inputs)[:, -targets.shape[1] :]
            # In pieces: in float32 a long window of a large vocabulary is a gigabyte.
            for part, ids in zip(logits_BTV.split(PIECE, 1), targets.split(PIECE, 1), strict=True):
                logits = part.float()
                chosen = logits.gather(-1, ids[..., None])[..., 0]
                costs.append(logits.logsumexp(-1) - chosen)
        return torch.cat(costs, 1).cpu().double().numpy()

    @torch.no_grad()
    def steps(self, ids_T: np.ndarray) -> np.ndarray | None:
        if self.masked:
            return None
        rows, state = [], {}
        for id_1 in self._inputs(ids_T[None]).unbind(1):
            out = self.model(input_ids=id_1[:, None], use_cache=True, **state)
            known = ((name, getattr(out, name, None)) for name in CACHES)
            state = dict([next(((n, v) for n, v in known if v is not None), ("", None))])
            if "" in state:
                return None
            rows.append(out.logits[:, -1].float().log_softmax(-1))
        empty = torch.empty(1, 0, self.n_ids)
        return self._with_first(torch.stack(rows, 1) if rows else empty)[0]


def _load(folder: str, network: bool, trust: bool):
    """(config, model, tokenizer or None).  Raises BitbyteError in one line."""
    import transformers

    options = {"local_files_only": not network, "trust_remote_code": trust}
    name = shown(folder)
    if not trust and _brings_code(Path(folder)):
        raise BitbyteError(
            f"{name} brings its own code, which is run only with --trust_remote_code; read it first"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        made = list(getattr(config, "architectures", None) or [])
        masked = any(word.endswith("MaskedLM") for word in made)
        kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
        model, report = kind.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True,
            dtype=torch.float32, **options,
        )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # each reader of configs and weights raises its own
        raise BitbyteError(f"transformers cannot load {name}: {_line(error)}") from None
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise BitbyteError(
            f"{name} lacks {len(missing)} of its weights, such as {missing[0]}: they would be "
            "random"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise BitbyteError(f"{name} is an encoder with a decoder; a passport needs one of them")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        if model.get_input_embeddings().weight.shape[0] not in (N_BYTES, N_BYTES + 1):
            raise BitbyteError(f"{name} has no usable tokenizer: {_line(error)}") from None
        tokenizer = None  # ids are bytes
    return config, model, tokenizer


def _brings_code(folder: Path) -> bool:
    """Whether config.json names code of the folder as the model."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):  # for transformers to complain about
        return False
    return isinstance(config, dict) and "auto_map" in config


def _line(error: Exception) -> str:
    return shown(" ".join(str(error).split())[:200] or type(error).__name__)


def _positions(config) -> int | None:
    """Most ids that a model has positions for; None: any number."""
    for word in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        value = getattr(config, word, None)
        if isinstance(value, int) and value > 1:
            return value - (
                2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
            )
    return None


def _folder_bytes(folder: Path) -> int:
    """Bytes of weights and tokenizer."""
    files = (path for path in folder.iterdir() if path.is_file())
    return sum(f.stat().st_size for f in files if f.suffix in (".safetensors", ".json", ".model"))


@contextlib.contextmanager
def _quiet(network: bool):
    """No progress bars or advice of transformers, and no network unless it was asked for."""
    before = os.environ.get("HF_HUB_OFFLINE")
    if not network:
        os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    level, log = transformers.logging.get_verbosity(), logging.getLogger("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    level_of_log = log.level
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        log.setLevel(level_of_log)
        if before is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
        else:
            os.environ["HF_HUB_OFFLINE"] = before


class Vocabulary:
    """Bytes to ids and back, through a tokenizer of transformers; None: ids are bytes.

    Byte-level tokenizers (of GPT-2's kind, and ByT5's) have a table of the bytes of each id, so
    they take bytes that are not UTF-8, too.  Others are given text and asked to decode it.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.table = tokenizer, None
        self.single: dict[int, int] = {}
        if tokenizer is None:
            self.table = [bytes([i]) for i in range(N_BYTES)]
        elif "ByT5" in type(tokenizer).__name__:
            offset = tokenizer.convert_tokens_to_ids("a") - ord("a")
            self.table = [b""] * offset + [bytes([i]) for i in range(N_BYTES)]
        else:
            self.table = _byte_level(tokenizer)
        if self.table:
            self.single = {piece[0]: i for i, piece in enumerate(self.table) if len(piece) == 1}
            added = getattr(tokenizer, "added_tokens_decoder", {})
            for i, token in added.items():
                if i < len(self.table) or len(self.table) + len(added) > i:
                    self.table += [b""] * (i + 1 - len(self.table))
                    self.table[i] = str(token).encode()

    def encode(self, piece: bytes) -> np.ndarray:
        if self.tokenizer is None:
            return np.frombuffer(piece, np.uint8).astype(np.int64)
        ids, start = [], 0
        while start < len(piece):
            try:
                text, bad, stop = piece[start:].decode(), b"", len(piece)
            except UnicodeDecodeError as error:
                text, stop = piece[start : start + error.start].decode(), start + error.end
                bad = piece[start + error.start : stop]
            if bad and len(self.single) < N_BYTES:
                raise NotGivenBackError(
                    stop - len(bad), f"0x{bad[0]:02x} is not UTF-8 text, which the tokenizer needs"
                )
            if text:
                ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += [self.single[byte] for byte in bad]
            start = stop
        return np.array(ids, np.int64)

    def decode(self, ids: np.ndarray) -> bytes:
        if self.table is not None:
            size = len(self.table)
            return b"".join(self.table[i] if i < size else b"" for i in ids.tolist())
        text = self.tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text.encode("utf-8", "surrogatepass")


def _byte_level(tokenizer) -> list[bytes] | None:
    """The bytes of each id of a tokenizer of GPT-2's kind, else None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    facts = json.loads(backend.to_str())
    decoder = facts.get("decoder") or {}
    kinds = [decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", []))]
    vocabulary = facts["model"].get("vocab")
    if "ByteLevel" not in kinds or not isinstance(vocabulary, dict):
        return None
    byte_of = byte_characters()
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, i in vocabulary.items():
        if all(c in byte_of for c in token):
            table[i] = bytes(byte_of[c] for c in token)
        else:
            table[i] = token.encode()
    return table


def byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(N_BYTES) if byte not in plain]
    known = {chr(byte): byte for byte in plain}
    return known | {chr(N_BYTES + i): byte for i, byte in enumerate(others)}
