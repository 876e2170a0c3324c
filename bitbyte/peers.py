"""Models of other packages in our shape, freshly initialised: what `bench` compares with.

``sizes`` has n_layer, d_model, d_ff and seq_len.  Nothing is downloaded.
"""

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
