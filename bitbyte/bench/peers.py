"""Models of other packages in our sizes, freshly initialized, for `bench` to compare with.

``sizes`` has n_layer, d_model, d_ff and seq_len.  Nothing is downloaded.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def llama_step(model: nn.Module, ids_1C: Tensor) -> Callable[[], None]:
    """A call of the result feeds one more id after ids_1C, whose keys and values are cached."""
    with torch.no_grad():
        cache = model(ids_1C, use_cache=True).past_key_values

    def step() -> None:
        with torch.no_grad():
            model(ids_1C[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


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
