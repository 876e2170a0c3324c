"""Models of other packages in our sizes, freshly initialized, for `bench` to compare with.

``sizes`` has n_layer, d_model, d_ff and seq_len.  Nothing is downloaded.
"""

import contextlib
import functools
import importlib.util
import inspect
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbyte.optim import Optimizers
from bitbyte.vocab import VOCAB_SIZE


def llama(sizes) -> nn.Module:
    """Hugging Face's Llama; ``forward(ids_BT, labels=...)``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, sizes.d_model // 64)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=sizes.d_model, intermediate_size=sizes.d_ff,
        num_hidden_layers=sizes.n_layer, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=sizes.seq_len, tie_word_embeddings=True, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def adamw(model: nn.Module, steps: int):
    """The optimizer of a Llama that most use; ``steps`` is not used."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def muon(model: nn.Module, steps: int):
    """PyTorch's Muon, of so many iterations, for all matrices but the embedding."""
    layers = [p for p in model.parameters() if p.dim() == 2 and p.shape[0] != VOCAB_SIZE]
    chosen = {id(p) for p in layers}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    matrices = torch.optim.Muon(layers, lr=1e-4, ns_steps=steps)
    return Optimizers({}, [matrices, torch.optim.AdamW(rest, lr=1e-4, fused=True)])


def llama_step(model: nn.Module, ids_1C: Tensor) -> Callable[[], None]:
    """A call of the result feeds one more id after ids_1C, whose keys and values are cached."""
    with torch.no_grad():
        cache = model(ids_1C, use_cache=True).past_key_values

    def step() -> None:
        with torch.no_grad():
            model(ids_1C[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def llama_prompt(model: nn.Module, ids_1C: Tensor) -> Callable[[], None]:
    """A call of the result reads ids_1C and keeps keys and values; logits of the last id only."""

    def prompt() -> None:
        with torch.no_grad():
            model(ids_1C, use_cache=True, logits_to_keep=1)

    return prompt


def mamba_step(config, ids_1C: Tensor) -> Callable[[], None]:
    """A call of the result feeds one more id to Hugging Face's Mamba of a Mamba-1's shape."""
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=config.d_model, num_hidden_layers=config.n_layer,
        state_size=config.d_state, expand=config.expand, conv_kernel=config.d_conv,
        tie_word_embeddings=True,
    )).eval()  # fmt: skip
    takes = inspect.signature(model.forward).parameters
    word = "cache" if "cache" in takes else "cache_params"  # the name before transformers 5.24
    with torch.no_grad():
        cache = getattr(model(ids_1C, use_cache=True), word)

    def step() -> None:
        with torch.no_grad():
            model(ids_1C[:, :1], **{word: cache}, use_cache=True)

    return step


def llama_cpp_problem() -> str | None:
    """Why llama.cpp cannot be measured; None if it can."""
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        return "the peer llama.cpp is missing: pip install llama-cpp-python gguf (it is compiled)"
    return None


class LlamaCpp(NamedTuple):
    """What llama.cpp can be asked to do."""

    step: Callable[[], None]  # one more id after the prompt, whose keys and values are cached
    prompt: Callable[[], None]  # the prompt from nothing; logits of its last id


@contextlib.contextmanager
def llama_cpp(config, kind: str, ids_1C: Tensor, threads: int) -> Iterator[LlamaCpp]:
    """llama.cpp's Llama of a transformer's shape with random weights, stored as ``kind``.

    The prompt is ids_1C.  kind: TQ2_0 (ternary) or Q8_0; the widths must be multiples of 256.
    """
    import llama_cpp as lib

    lib.llama_log_set(_quiet(), None)
    lib.llama_backend_init()
    with tempfile.TemporaryDirectory(prefix="bitbyte-bench-") as folder:
        path = Path(folder, "model.gguf")
        _write_gguf(path, config, kind)
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        model = lib.llama_model_load_from_file(os.fsencode(path), options)
        assert model, "llama.cpp could not load the model"
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = config.seq_len
    options.n_threads = options.n_threads_batch = threads
    context = lib.llama_init_from_model(model, options)
    C = ids_1C.shape[1]

    def feed(ids: list[int], position: int) -> None:
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(ids) - 1
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not decode")
        lib.llama_batch_free(batch)

    def step() -> None:
        feed(ids_1C[0, :1].tolist(), C)
        lib.llama_get_logits_ith(context, 0)
        lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, C, -1)

    ids = ids_1C[0].tolist()

    def prompt() -> None:
        lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, -1, -1)
        feed(ids, 0)
        lib.llama_get_logits_ith(context, len(ids) - 1)

    try:
        prompt()
        yield LlamaCpp(step, prompt)
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)


@functools.cache  # llama.cpp keeps its address
def _quiet():
    """A receiver of llama.cpp's messages that drops them."""
    import llama_cpp as lib

    return lib.llama_log_callback(lambda level, text, data: None)


def _write_gguf(path: Path, config, kind: str) -> None:
    """Random weights of a Llama without a tokenizer; embedding and head stay float32."""
    import gguf

    c, random = config, np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.seq_len)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(c.d_model // c.n_head)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("no_vocab")
    stored = gguf.GGMLQuantizationType[kind]

    def add(name: str, outputs: int, inputs: int, quantized: bool = True) -> None:
        weight = random.standard_normal((outputs, inputs), np.float32) / math.sqrt(inputs)
        if quantized:
            packed = gguf.quants.quantize(weight, stored)
            writer.add_tensor(name, packed, raw_dtype=stored)
        else:
            writer.add_tensor(name, weight)

    add("token_embd.weight", VOCAB_SIZE, c.d_model, quantized=False)
    ones = np.ones(c.d_model, np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(c.n_layer):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", ones)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", c.d_model, c.d_model)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{i}.{name}.weight", c.d_ff, c.d_model)
        add(f"blk.{i}.ffn_down.weight", c.d_model, c.d_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mambapy(sizes) -> nn.Module:
    """mambapy's Mamba-1 with an embedding, tied head and loss around it; ``forward(ids_BT)``."""
    from mambapy.mamba import Mamba, MambaConfig

    class Peer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB_SIZE, sizes.d_model)
            self.mamba = Mamba(MambaConfig(d_model=sizes.d_model, n_layers=sizes.n_layer))

        def forward(self, ids_BT: Tensor) -> Tensor:
            ids_BT = ids_BT.long()
            logits_BTV = F.linear(self.mamba(self.embed(ids_BT)), self.embed.weight)
            return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT.flatten())

    return Peer().train()


def mambapy_step(sizes, ids_BT: Tensor) -> Callable[[], None]:
    """A call of the result runs forward and backward of `mambapy` in float32."""
    model = mambapy(sizes)

    def step() -> None:
        model(ids_BT).backward()
        model.zero_grad()

    return step


@contextlib.contextmanager
def in_own_process(make: Callable[..., Callable[[], None]], *args) -> Iterator[Callable[[], None]]:
    """``make(*args)`` built and called in a child process with Python's default memory allocator.

    `device.prepare_process` tunes the allocator of this process, which a peer's users do not have.
    """
    context = multiprocessing.get_context("spawn")
    our_end, child_end = context.Pipe()
    child = context.Process(
        target=_serve, args=(child_end, torch.get_num_threads(), make, args), daemon=True
    )
    child.start()
    child_end.close()

    def call() -> None:
        our_end.send(None)
        our_end.recv()  # EOFError if the child died: its traceback is on stderr

    try:
        yield call
    finally:
        our_end.close()
        child.join()


def _serve(connection, threads: int, make: Callable[..., Callable[[], None]], args: tuple) -> None:
    torch.set_num_threads(threads)
    call = make(*args)
    with contextlib.suppress(EOFError):
        while True:
            connection.recv()
            call()
            connection.send(None)
