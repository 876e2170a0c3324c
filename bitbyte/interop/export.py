"""Our models in other engines' formats: a folder for transformers, a GGUF file for llama.cpp.

"hf" and "gguf": transformers become a Llama, Mamba models a Mamba or Mamba2, diffusion models a
EuroBert (for transformers only).  Weights are float32 and dequantized; the int8 rounding of
activations is not exported, so the numbers of a ternary model change in the third or fourth digit.
Models with a prior have no counterpart there.

"hf-code": a folder that brings its own code, `modeling_bitbyte.py`, which transformers runs with
trust_remote_code only.  It holds any model but diffusion in blocks, computes what ours do, with
rounded activations, and keeps ternary weights packed.

Ids are bytes, and id 256 is the start symbol, which these engines put before a text as their bos,
or the mask of a diffusion model.  They also predict it, which our models never do.  Its row of the
head is fitted so that its probability is negligible; `special_probability` says how small it is.

Tokenizers of transformers match the name of that symbol anywhere in a text.  It therefore holds a
Unicode noncharacter, which no text is meant to hold: every other text becomes its bytes and back.

Shapes: V = 257 ids, D model width, N positions.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitbyte.bitlinear import BitLinear, pack_trits, quantize_ternary
from bitbyte.config import NORM_EPS, config_to_dict
from bitbyte.files import BitbyteError, output_folder, replacing, shown, write_atomic
from bitbyte.vocab import MASK, N_BYTES, START, VOCAB_SIZE

SAMPLES = 8192  # positions whose hidden states the start symbol's row is fitted to
BELOW = 40.0  # nats that its logit aims below the logarithm of all bytes' sum
# Tokenizers of transformers match the name of a special id in a text; none holds U+FDD0.
START_NAME, MASK_NAME = "<\ufdd0start>", "<\ufdd0mask>"
# In llama.cpp's trie over bytes any token is matched in a text; no UTF-8 text holds these bytes.
START_BYTES = "\\xff\\xfe\\xfd\\xfcstart"
FORMATS = ("hf", "hf-ternary", "hf-code", "gguf", "gguf-ternary")
BITNET = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
BLOCK = 256  # weights that llama.cpp packs at once
OURS = {  # kinds of diffusion
    "block": "a model of diffusion in blocks has no form in other engines",
    "around": "a model trained with --around has no form in other engines",
}
NEGLIGIBLE = 1e-3  # share of the probability that a start symbol may take unsaid
CODE = Path(__file__).with_name("modeling_bitbyte.py")


def _refuse_ours(config) -> None:
    for name, why in OURS.items():
        if getattr(config, name, 0):
            raise BitbyteError(why)


def exportable(model) -> None:
    """Raise BitbyteError for a model that other engines have no form for."""
    c = model.config
    _refuse_ours(c)
    if c.prior != "none":
        raise BitbyteError(
            "a model that reads tables of n-grams has no form in other engines; use --to hf-code, "
            "or train one with --prior none"
        )
    known = {"embed", "norm.weight"} | {name for name, _ in layer_names(model)}
    strange = sorted(model.state_dict().keys() - known)
    if strange:
        raise BitbyteError(f"this model has {strange[0]}, which other engines do not know")


def layer_names(model) -> Iterator[tuple[str, str]]:
    """(a tensor's name in a model of ours, its name in transformers; several joined by +)."""
    c = model.config
    if c.family != "mamba":
        parts = {
            "attn_norm.weight": "input_layernorm", "mlp_norm.weight": "post_attention_layernorm",
            "attn.qkv.weight": "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj",
            "attn.out.weight": "self_attn.o_proj",
            "mlp.gate_up.weight": "mlp.gate_proj+mlp.up_proj", "mlp.down.weight": "mlp.down_proj",
        }  # fmt: skip
        for i in range(c.n_layer):
            for ours, theirs in parts.items():
                names = "+".join(f"model.layers.{i}.{name}.weight" for name in theirs.split("+"))
                yield f"transformer.blocks.{i}.{ours}", names
        return
    parts = {
        "norm.weight": "norm.weight", "mixer.in_proj.weight": "mixer.in_proj.weight",
        "mixer.out_proj.weight": "mixer.out_proj.weight",
        "mixer.conv_weight": "mixer.conv1d.weight", "mixer.conv_bias": "mixer.conv1d.bias",
        "mixer.a_log": "mixer.A_log", "mixer.skip": "mixer.D",
    }  # fmt: skip
    if c.ssm == "mamba1":
        parts |= {
            "mixer.x_proj.weight": "mixer.x_proj.weight",
            "mixer.dt_weight": "mixer.dt_proj.weight", "mixer.dt_bias": "mixer.dt_proj.bias",
        }  # fmt: skip
    else:
        parts |= {
            "mixer.bcdt_proj.weight": "mixer.in_proj.weight", "mixer.dt_bias": "mixer.dt_bias",
            "mixer.norm.weight": "mixer.norm.weight",
        }  # fmt: skip
    for i in range(c.n_layer):
        for ours, theirs in parts.items():
            yield f"mamba.blocks.{i}.{ours}", f"backbone.layers.{i}.{theirs}"


def outer_names(model) -> tuple[str, str]:
    """The names in transformers of the embedding and the last norm."""
    if model.config.family == "mamba":
        return "backbone.embeddings.weight", "backbone.norm_f.weight"
    return "model.embed_tokens.weight", "model.norm.weight"


def check_ternary(model) -> None:
    """Raise BitbyteError for a model without a form in which ternary weights stay ternary."""
    c = model.config
    if c.linear != "ternary" or not c.act_quant or c.family == "mamba":
        raise BitbyteError(
            "only ternary transformers with rounded activations can be exported with ternary "
            "weights; drop -ternary"
        )


@torch.no_grad()
def tensors(model, scales: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The float32 tensors of a model of transformers, by name.  Raises BitbyteError.

    With ``scales``, which is filled in, ternary weights are -1, 0 and 1.
    """
    exportable(model)
    ternary = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, BitLinear)}
    found: dict[str, Tensor] = {}
    for ours, theirs in layer_names(model):
        value = model.state_dict()[ours].detach().cpu().float()
        if ours in ternary:
            q_GOI, scale_G11 = quantize_ternary(ternary[ours].matrices().detach().cpu().float())
            value = q_GOI if scales is not None else q_GOI * scale_G11
            value = value.reshape(-1, value.shape[-1])
            if scales is not None:
                names = theirs.split("+")
                scales |= dict(zip(names, scale_G11.flatten().split(1), strict=True))
        if ours.endswith("mixer.in_proj.weight") and model.config.ssm == "mamba1":
            value = torch.cat(value.chunk(2)[::-1])  # theirs has the gate last
        if ours.endswith("conv_weight"):
            value = value[:, None]
        names = theirs.split("+")
        for name, part in zip(names, value.chunk(len(names)), strict=True):
            joined = torch.cat((found[name], part)) if name in found else part
            found[name] = joined.contiguous().clone()
    for name, value in zip(outer_names(model), (model.embed, model.norm.weight), strict=True):
        found[name] = value.detach().cpu().float().clone()
    found["lm_head.weight"] = head(model)
    return found


@torch.no_grad()
def hidden_states(model, ids_BT: Tensor) -> Tensor:
    """What the head sees (N, D): of a diffusion model in places of which half are hidden."""
    if model.exact:
        ids_BT = F.pad(ids_BT[:, :-1], (1, 0), value=START)
    else:
        random = torch.Generator().manual_seed(1)
        share_B1 = torch.rand(len(ids_BT), 1, generator=random)
        hidden_BT = torch.rand(ids_BT.shape, generator=random) < share_B1
        ids_BT = ids_BT.masked_fill(hidden_BT, MASK)
    return model.norm(model.body(F.embedding(ids_BT, model.embed))).flatten(0, 1).float()


@torch.no_grad()
def some_windows(model) -> Tensor:
    """ids_BT to fit and to check with: what the model itself writes, and uniform bytes."""
    random = torch.Generator().manual_seed(0)
    T = model.config.seq_len
    rows = max(2, -(-SAMPLES // (2 * T)))
    written_BT = torch.full((rows, T), MASK)
    state = model.init_state(rows) if model.exact else None
    ids_B = torch.full((rows,), START)
    for t in range(T):
        if model.exact:
            logits_BV, state = model.step(ids_B, state)
        else:
            logits_BV = model.logits(written_BT)[:, t]
        ids_B = torch.multinomial(logits_BV.float().softmax(-1), 1, generator=random)[:, 0]
        written_BT[:, t] = ids_B
    return torch.cat((written_BT, torch.randint(N_BYTES, (rows, T), generator=random)))


@torch.no_grad()
def head(model) -> Tensor:
    """The head (V, D): the bytes' rows as they are, and one that keeps the start symbol away."""
    rows_VD = model.embed.detach().cpu().float()[:N_BYTES]
    h_ND = hidden_states(model, some_windows(model)).double()
    want_N = (h_ND @ rows_VD.double().mT).logsumexp(-1) - BELOW
    gram = h_ND.mT @ h_ND
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    start_D = torch.linalg.solve(gram, h_ND.mT @ want_N)
    return torch.cat((rows_VD, start_D.float()[None]))


@torch.no_grad()
def special_probability(model, head_VD: Tensor, ids_BT: Tensor) -> float:
    """Largest probability of the start symbol in these windows."""
    logits_NV = hidden_states(model, ids_BT) @ head_VD.mT
    return float(logits_NV.log_softmax(-1)[:, START].max().exp())


def config_of(model) -> dict:
    """config.json of transformers."""
    c = model.config
    common = {
        "vocab_size": VOCAB_SIZE, "hidden_size": c.d_model, "num_hidden_layers": c.n_layer,
        "tie_word_embeddings": False, "bos_token_id": START, "eos_token_id": None,
        "pad_token_id": None, "dtype": "float32", "max_position_embeddings": c.seq_len,
    }  # fmt: skip
    if c.family != "mamba":
        kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        if c.family == "diffusion":
            kind = {"model_type": "eurobert", "architectures": ["EuroBertForMaskedLM"],
                    "mask_token_id": MASK, "bos_token_id": None}  # fmt: skip
        return common | kind | {
            "hidden_act": "silu",
            "intermediate_size": c.d_ff, "num_attention_heads": c.n_head,
            "num_key_value_heads": c.n_head, "head_dim": c.d_model // c.n_head,
            "rope_theta": c.rope_theta, "rms_norm_eps": NORM_EPS, "attention_bias": False,
            "mlp_bias": False,
        }  # fmt: skip
    mamba = common | {
        "state_size": c.d_state, "expand": c.expand, "conv_kernel": c.d_conv,
        "layer_norm_epsilon": NORM_EPS, "use_bias": False, "use_conv_bias": True,
        "hidden_act": "silu", "residual_in_fp32": True,
    }  # fmt: skip
    if c.ssm == "mamba1":
        return mamba | {
            "model_type": "mamba", "architectures": ["MambaForCausalLM"],
            "time_step_rank": c.dt_rank,
        }  # fmt: skip
    return mamba | {
        "model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "num_heads": c.n_head,
        "head_dim": c.d_inner // c.n_head, "n_groups": 1, "chunk_size": 64,
        "norm_before_gate": False, "rms_norm": True,
    }  # fmt: skip


def tokenizer_json(special: str) -> dict:
    """tokenizer.json: a byte-level tokenizer without merges, so that ids are bytes.

    ``special`` in a text becomes id 256, so it should be a name that texts do not hold.
    """
    from bitbyte.interop.hf import byte_characters

    vocabulary = {character: byte for character, byte in byte_characters().items()}
    level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False
    }  # fmt: skip
    start = {
        "id": START, "content": special, "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [start],
        "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])), "merges": [],
        },
    }  # fmt: skip


@torch.no_grad()
def code_tensors(model) -> dict[str, Tensor]:
    """The tensors of `modeling_bitbyte`, by name.  Raises BitbyteError."""
    _refuse_ours(model.config)
    ternary = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, BitLinear)}
    found = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu()
        if name in ternary:
            q_GOI, scale_G11 = quantize_ternary(ternary[name].matrices().detach().cpu().float())
            place = name.removesuffix("weight")
            found[place + "trits"] = pack_trits(q_GOI.to(torch.int8))
            found[place + "scale"] = scale_G11.flatten().clone()
        else:
            found["embed.weight" if name == "embed" else name] = value.contiguous().clone()
    return found


def code_config(model) -> dict:
    """config.json of `modeling_bitbyte`."""
    c = model.config
    kind = "CausalLM" if model.exact else "MaskedLM"
    return {
        "model_type": "bitbyte", "architectures": [f"BitbyteFor{kind}"],
        "auto_map": {"AutoConfig": "modeling_bitbyte.BitbyteConfig",
                     f"AutoModelFor{kind}": f"modeling_bitbyte.BitbyteFor{kind}"},
        "shape": config_to_dict(c), "vocab_size": VOCAB_SIZE, "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layer, "max_position_embeddings": c.seq_len,
        "tie_word_embeddings": False, "bos_token_id": START if model.exact else None,
        "eos_token_id": None, "pad_token_id": None, "dtype": "float32", "use_cache": False,
    } | ({} if model.exact else {"mask_token_id": MASK})  # fmt: skip


def packed_tensors(model) -> dict[str, Tensor]:
    """`tensors` with ternary weights four to a byte, in BitNet's packing of transformers."""
    check_ternary(model)
    scales: dict[str, Tensor] = {}
    found = tensors(model, scales)
    for name, scale_1 in scales.items():
        digits = (found[name] + 1).to(torch.uint8).unflatten(0, (4, -1)).unbind(0)
        found[name] = sum(part << 2 * i for i, part in enumerate(digits))
        found[f"{name}_scale"] = scale_1.clone()
    return found


def write_hf(model, folder: str | Path, *, ternary: bool = False, code: bool = False) -> int:
    """Write a folder for ``AutoModelForCausalLM`` or MaskedLM, with a tokenizer; its bytes.

    The tokenizer takes `START_NAME` or `MASK_NAME` in a text for id 256, and all else for bytes.
    ``ternary``: with packed weights.  ``code``: with the code of the model.  Raises BitbyteError.
    """
    from safetensors.torch import save

    found = (code_tensors if code else packed_tensors if ternary else tensors)(model)
    config = code_config(model) if code else config_of(model)
    if ternary:
        config["quantization_config"] = BITNET | {"modules_to_not_convert": ["lm_head"]}
    folder = output_folder(folder)
    special, word = (START_NAME, "bos_token") if model.exact else (MASK_NAME, "mask_token")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", word: special,
        "clean_up_tokenization_spaces": False, "model_max_length": model.config.seq_len,
    }  # fmt: skip
    files = {
        "model.safetensors": save(found, {"format": "pt"}),
        "config.json": _json(config),
        "tokenizer.json": _json(tokenizer_json(special)),
        "tokenizer_config.json": _json(about),
    }
    if code:
        files[CODE.name] = CODE.read_bytes()
    if model.exact:
        files["generation_config.json"] = _json({"bos_token_id": START, "do_sample": True})
    for name, data in files.items():
        write_atomic(folder / name, data)
    return sum(map(len, files.values()))


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode()


# What llama.cpp calls the tensors of transformers: outside of layers, and in each.
GGUF_NAMES = {
    "llama": (
        {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight":
         "output_norm.weight", "lm_head.weight": "output.weight"},
        {
            "input_layernorm": "attn_norm.weight", "post_attention_layernorm": "ffn_norm.weight",
            "self_attn.q_proj": "attn_q.weight", "self_attn.k_proj": "attn_k.weight",
            "self_attn.v_proj": "attn_v.weight", "self_attn.o_proj": "attn_output.weight",
            "mlp.gate_proj": "ffn_gate.weight", "mlp.up_proj": "ffn_up.weight",
            "mlp.down_proj": "ffn_down.weight",
        },
    ),
    "mamba": (
        {"backbone.embeddings.weight": "token_embd.weight", "backbone.norm_f.weight":
         "output_norm.weight", "lm_head.weight": "output.weight"},
        {
            "norm.weight": "attn_norm.weight", "mixer.in_proj.weight": "ssm_in.weight",
            "mixer.out_proj.weight": "ssm_out.weight", "mixer.conv1d.weight": "ssm_conv1d.weight",
            "mixer.conv1d.bias": "ssm_conv1d.bias", "mixer.A_log": "ssm_a", "mixer.D": "ssm_d",
            "mixer.x_proj.weight": "ssm_x.weight", "mixer.dt_proj.weight": "ssm_dt.weight",
            "mixer.dt_proj.bias": "ssm_dt.bias",
        },
    ),
}  # fmt: skip
_MAMBA2 = {name: name_there for name, name_there in GGUF_NAMES["mamba"][1].items()
           if "x_proj" not in name and "dt_proj" not in name}  # fmt: skip
GGUF_NAMES["mamba2"] = (GGUF_NAMES["mamba"][0], _MAMBA2 | {
    "mixer.dt_bias": "ssm_dt.bias", "mixer.norm.weight": "ssm_norm.weight"})  # fmt: skip


def write_gguf(model, path: Path, *, ternary: bool = False, overwrite: bool = False) -> int:
    """Write a GGUF file in float32 for llama.cpp; its bytes.  Raises BitbyteError.

    ``ternary``: the layers' weights in TQ2_0, with scales beside them.
    """
    from bitbyte.interop.hf import need

    need("gguf")
    import gguf

    c = model.config
    if c.family == "diffusion":
        raise BitbyteError("a diffusion model cannot be exported to llama.cpp; use --to hf")
    scales: dict[str, Tensor] = {}
    if ternary:
        check_ternary(model)
        if c.d_model % BLOCK or c.d_ff % BLOCK:
            raise BitbyteError(
                f"llama.cpp packs {BLOCK} ternary weights at once: d_model and d_ff must be "
                f"multiples of it, not {c.d_model} and {c.d_ff}; drop -ternary"
            )
    found = tensors(model, scales if ternary else None)
    if c.family == "mamba" and c.expand != 2:
        raise BitbyteError("llama.cpp knows Mamba with expand 2 only")
    architecture = {"ar": "llama", "mamba": getattr(c, "ssm", "").replace("mamba1", "mamba")}
    kind = architecture[c.family]
    with replacing(path, overwrite=overwrite) as file:
        writer = gguf.GGUFWriter(file.name, kind)
        file_type = gguf.LlamaFileType.MOSTLY_TQ2_0 if ternary else gguf.LlamaFileType.ALL_F32
        writer.add_file_type(file_type)
        writer.add_context_length(c.seq_len)
        writer.add_embedding_length(c.d_model)
        writer.add_block_count(c.n_layer)
        writer.add_layer_norm_rms_eps(NORM_EPS)
        writer.add_vocab_size(VOCAB_SIZE)
        (_llama if c.family == "ar" else _mamba)(writer, c)
        for theirs, name in GGUF_NAMES[kind][0].items():
            writer.add_tensor(name, found[theirs].numpy())
        for i in range(c.n_layer):
            for theirs, name in GGUF_NAMES[kind][1].items():
                full = f"model.layers.{i}.{theirs}.weight"
                full = full if kind == "llama" else f"backbone.layers.{i}.{theirs}"
                value = np.ascontiguousarray(_in_gguf(found[full], name, c).numpy())
                if full in scales:
                    packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.TQ2_0)
                    writer.add_tensor(
                        f"blk.{i}.{name}", packed, raw_dtype=gguf.GGMLQuantizationType.TQ2_0
                    )
                    scale = f"blk.{i}.{name.removesuffix('weight')}scale"
                    writer.add_tensor(scale, scales[full].numpy())
                else:
                    writer.add_tensor(f"blk.{i}.{name}", value)
        # A trie over raw bytes: ids are bytes, with no merges and no special treatment of spaces.
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list([f"\\x{byte:02x}" for byte in range(N_BYTES)] + [START_BYTES])
        writer.add_token_types([gguf.TokenType.NORMAL] * N_BYTES + [gguf.TokenType.CONTROL])
        writer.add_bos_token_id(START)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path.stat().st_size


def _llama(writer, c) -> None:
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_head)
    writer.add_rope_dimension_count(c.d_model // c.n_head)
    writer.add_rope_freq_base(c.rope_theta)


def _mamba(writer, c) -> None:
    first = c.ssm == "mamba1"
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(c.d_conv)
    writer.add_ssm_inner_size(c.d_inner)
    writer.add_ssm_state_size(c.d_state)
    writer.add_ssm_time_step_rank(c.dt_rank if first else c.n_head)
    if first:
        writer.add_ssm_dt_b_c_rms(False)
    else:
        writer.add_ssm_group_count(1)


def _in_gguf(value: Tensor, name: str, c) -> Tensor:
    """A tensor of transformers in llama.cpp's layout; `importer._renamed` is the inverse."""
    if name in ("attn_q.weight", "attn_k.weight"):  # rotary pairs are neighbors, not halves
        return value.unflatten(0, (c.n_head, 2, -1)).transpose(1, 2).reshape(value.shape)
    if name == "ssm_conv1d.weight":
        return value[:, 0]
    if name == "ssm_norm.weight":
        return value[None]
    if name == "ssm_a":
        value = -value.exp()
    return value[:, None] if name in ("ssm_a", "ssm_d") and c.ssm == "mamba2" else value


def described(model, to: str) -> str:
    """How well the start symbol is kept away, how texts name it, and what is not exported."""
    name, written = ("start symbol", START_NAME) if model.exact else ("mask", MASK_NAME)
    written = f"{shown(written)} in a text is the {name}"
    if to == "hf-code":
        return f"transformers runs the code in it, so it asks for trust_remote_code=True; {written}"
    share = special_probability(model, head(model), some_windows(model))
    text = f"the {name}'s probability is at most {share:.1g}"
    if share > NEGLIGIBLE:
        text += ", so costs there are higher than here; --to hf-code has the same"
    if to == "gguf-ternary":
        text += "; activations are rounded in blocks there"
    elif to != "hf-ternary" and model.config.linear == "ternary" and model.config.act_quant:
        text += "; activations are not rounded to int8 there"
    if to.startswith("hf"):
        text += f"; {written}"
    return text
