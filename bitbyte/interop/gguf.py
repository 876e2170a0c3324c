"""GGUF files as subjects of a passport, run by llama.cpp through llama-cpp-python.

Keys and values are kept in float32 and flash attention is off, so that a float32 file gives the
numbers of its model.  Quantized files round activations, too: their sums depend a little on the
shape of a batch.

Shapes: as in `evaluate.subject`.
"""

import ctypes
import functools
import importlib.util
import math
import os
from pathlib import Path

import numpy as np

from bitbyte.evaluate.leaks import Limits
from bitbyte.evaluate.subject import WINDOW, NotGivenBackError, Subject
from bitbyte.files import BitbyteError, shown

NONE, RWKV = 0, 5  # kinds of vocabulary: none; a trie over bytes, which takes any
ROUNDED = Limits(0.02, 0.1, 1.0)  # int8 activations, whose roundings flip with the last bit


class Gguf(Subject):
    """A causal model in a GGUF file.  Raises BitbyteError.

    ``prefix``: the id before each window; by default the vocabulary's bos, where it has one.
    """

    source = "gguf"
    batch_size = 1
    limits = ROUNDED

    def __init__(self, path: Path, *, prefix: int | None = None, threads: int | None = None):
        super().__init__()
        path = Path(path)
        check_header(path)
        if importlib.util.find_spec("llama_cpp") is None:
            raise BitbyteError("llama.cpp is missing: pip install llama-cpp-python (it compiles)")
        import llama_cpp as lib

        self.lib, self.name = lib, path.stem
        lib.llama_log_set(_quiet(), None)
        lib.llama_backend_init()
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(os.fsencode(path), options)
        if not self.model:
            raise BitbyteError(f"llama.cpp cannot load {shown(path)}: damaged, or too new for it")
        self.vocabulary = lib.llama_model_get_vocab(self.model)
        self.kind_of_vocabulary = lib.llama_vocab_type(self.vocabulary)
        self.n_ids = lib.llama_vocab_n_tokens(self.vocabulary)
        if self.kind_of_vocabulary == NONE:
            raise BitbyteError(
                f"{shown(path)} has no vocabulary that llama.cpp can turn bytes into"
            )
        masked = getattr(lib, "llama_model_is_diffusion", None)
        if lib.llama_model_has_encoder(self.model) or (masked and masked(self.model)):
            raise BitbyteError(f"{shown(path)} is not a causal model, as a GGUF file must be here")
        bos = lib.llama_vocab_bos(self.vocabulary)
        prefix = (bos if 0 <= bos < self.n_ids else None) if prefix is None else prefix
        if prefix is not None and not 0 <= prefix < self.n_ids:
            raise BitbyteError(f"prefix is {prefix}; {self.name} has ids 0 to {self.n_ids - 1}")
        self.prefix, self.overlaps = prefix, prefix is None
        self.first = "an id of context; the first of the file is uniform over all ids"
        if prefix is not None:
            self.first = f"token {prefix} precedes every window and is not scored"
        recurrent = bool(lib.llama_model_is_recurrent(self.model))
        self.longest = None if recurrent else lib.llama_model_n_ctx_train(self.model)
        self.window = min(WINDOW, self.longest or WINDOW)
        self.threads, self.context, self.room = threads or os.cpu_count() or 1, None, 0
        self.parameters = lib.llama_model_n_params(self.model)
        self.sizes = {"file:": path.stat().st_size}
        text = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self.model, text, len(text))
        self.facts = {"llama.cpp": text.value.decode("utf-8", "replace"), "ids": f"{self.n_ids:,}"}

    def close(self) -> None:
        """Free the model and its context."""
        if self.context:
            self.lib.llama_free(self.context)
        if self.model:
            self.lib.llama_model_free(self.model)
        self.context = self.model = None

    def _ready(self, n: int) -> None:
        """An empty context for ``n`` ids."""
        lib = self.lib
        if self.context is None or n > self.room:
            if self.context:
                lib.llama_free(self.context)
            options = lib.llama_context_default_params()
            options.n_ctx = options.n_batch = options.n_ubatch = self.room = max(n, self.window + 1)
            options.n_threads = options.n_threads_batch = self.threads
            options.type_k = options.type_v = lib.GGML_TYPE_F32
            options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            self.context = lib.llama_init_from_model(self.model, options)
            if not self.context:
                raise BitbyteError(f"llama.cpp cannot make a context of {n} ids for {self.name}")
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def encode(self, piece: bytes) -> np.ndarray:
        if self.kind_of_vocabulary != RWKV:  # others end the process on what is not UTF-8
            try:
                piece.decode()
            except UnicodeDecodeError as error:
                raise NotGivenBackError(
                    error.start, f"0x{piece[error.start]:02x} is not UTF-8 text, which it needs"
                ) from None
        room = len(piece) + 16
        ids = (self.lib.llama_token * room)()
        n = self.lib.llama_tokenize(self.vocabulary, piece, len(piece), ids, room, False, False)
        if n < 0:
            raise NotGivenBackError(0, "llama.cpp cannot turn these bytes into ids")
        return np.array(ids[:n], np.int64)

    def decode(self, ids: np.ndarray) -> bytes:
        tokens = (self.lib.llama_token * max(1, len(ids)))(*ids.tolist())
        room = 64 + 16 * len(ids)
        while True:
            text = ctypes.create_string_buffer(room)
            n = self.lib.llama_detokenize(
                self.vocabulary, tokens, len(ids), text, room, False, True
            )
            if n >= 0:
                return text.raw[:n]
            room = -n

    def _feed(self, ids: list[int], start: int) -> np.ndarray:
        """Logits (T, V) after each id."""
        lib = self.lib
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        status = lib.llama_decode(self.context, batch)
        lib.llama_batch_free(batch)
        if status:
            raise BitbyteError(f"llama.cpp could not run {self.name} (status {status})")
        rows = lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(rows, (len(ids), self.n_ids)).astype(np.float64)

    def _inputs(self, ids_T: np.ndarray) -> list[int]:
        ids = ids_T.tolist()
        return ids[:-1] if self.prefix is None else [self.prefix, *ids[:-1]]

    def _window(self, ids_T: np.ndarray, one_by_one: bool = False) -> np.ndarray:
        """ln p (T, V) of one window."""
        inputs = self._inputs(ids_T)
        rows = [np.full((1, self.n_ids), -math.log(self.n_ids))] * (self.prefix is None)
        if inputs:
            self._ready(len(inputs))
            parts = [[i] for i in inputs] if one_by_one else [inputs]
            for start, part in enumerate(parts):
                logits_TV = self._feed(part, start)
                top = logits_TV.max(-1, keepdims=True)
                rows.append(
                    logits_TV - top - np.log(np.exp(logits_TV - top).sum(-1, keepdims=True))
                )
        return np.concatenate(rows)

    def logprobs(self, ids_BT: np.ndarray) -> np.ndarray:
        return np.stack([self._window(ids_T) for ids_T in ids_BT])

    def steps(self, ids_T: np.ndarray) -> np.ndarray:
        return self._window(ids_T, one_by_one=True)


def check_header(path: Path) -> None:
    """Raise BitbyteError for what is not a GGUF file."""
    if not path.is_file():
        raise BitbyteError(f"there is no file {shown(path)}")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise BitbyteError(f"{shown(path)} is not a GGUF file")


def reader(path: Path):
    """A GGUFReader.  That of the package follows lengths past the end of the file, for ever."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            found = super()._get(offset, dtype, count, override_order)
            if len(found) < count:
                raise ValueError("cut off")
            return found

    return Reader(path)


@functools.cache  # llama.cpp keeps its address
def _quiet():
    """A receiver of llama.cpp's messages that drops them."""
    import llama_cpp as lib

    return lib.llama_log_callback(lambda level, text, data: None)
