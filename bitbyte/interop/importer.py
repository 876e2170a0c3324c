"""Models of other engines as models of ours: the reader of what `export` writes, and of its like.

A folder of transformers may hold a Llama, a EuroBert or a Mamba over bytes, plain or with ternary
weights (BitNet's packing), or a model of `modeling_bitbyte`, whose code is not run.  A GGUF file
may hold a llama, mamba or mamba2.  In models of ours a start symbol precedes every window, and the
head is the embedding, so:

- Of 257 ids the last is the start symbol (bos, or mask).  Its row of the head is dropped, as our
  models never predict it.
- With 256 ids, ``start`` is the byte that stands before every window instead.
- A head that is not the embedding is refused.

Shapes: V rows of the vocabulary, D model width, O outputs, I inputs.
"""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bitbyte import checkpoint, models, runs
from bitbyte.bitlinear import TRITS, BitLinear, unpack_trits
from bitbyte.config import (
    NORM_EPS,
    DiffusionConfig,
    MambaConfig,
    ModelConfig,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
)
from bitbyte.files import BitbyteError, folder_lock, output_folder, parse_json, shown
from bitbyte.interop import export, gguf, hf
from bitbyte.vocab import N_BYTES, START, VOCAB_SIZE

INFINITY = {"__float__": "Infinity"}  # as transformers writes it, and before the word alone
LONGEST = 1 << 20  # bytes of a window; more is a mistake, or a model that says "any"
MISSHAPEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def read_model(path: str | Path, *, start: int | None = None, seq_len: int | None = None):
    """(model of ours in eval mode, what changed, in words) of a folder or a .gguf file.

    ``start``: the byte before every window, for a model with 256 ids.  ``seq_len``: bytes per
    window, by default what the file says.  Raises BitbyteError.
    """
    path = Path(path)
    if start is not None and not 0 <= start < N_BYTES:
        raise BitbyteError(f"start is {start}; it must be a byte, 0 to {N_BYTES - 1}")
    if path.suffix == ".gguf":
        facts, tensors = _gguf(path)
    elif (path / "config.json").is_file():
        facts, tensors = _folder(path)
    else:
        raise BitbyteError(
            f"{shown(path)} is neither a folder of transformers (no config.json) nor a .gguf file"
        )
    with _misshapen(path):
        try:
            config = _config(facts, tensors)
            if seq_len is not None:
                config = dataclasses.replace(config, seq_len=seq_len)
            _check_size(config, tensors)
            model = models.build(config)
            if facts["model_type"] == "bitbyte":
                state, notes = _state_of_code(model, tensors), []
            else:
                state, notes = _state(model, tensors, start)
        except BitbyteError as error:
            raise BitbyteError(f"{shown(path)}: {error}") from None
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BitbyteError(f"{shown(path)}: NaN or infinity in {name}")
    model.load_state_dict(state)
    return model.eval(), "; ".join(notes)


@contextlib.contextmanager
def _misshapen(path: Path):
    """Make one line of what numbers and tensors of a wrong kind, size or number of axes raise."""
    try:
        yield
    except BitbyteError:
        raise
    except MISSHAPEN as error:
        if "allocate memory" in str(error):  # torch is out of memory
            raise
        raise BitbyteError(
            f"{shown(path)} is damaged: a tensor or a number in it is missing or misshapen"
        ) from None


def _check_size(config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """Raise BitbyteError before a model is allocated that the tensors cannot fill."""
    held = sum(tensor.numel() * (TRITS if tensor.dtype == torch.uint8 else 1)
               for tensor in tensors.values())  # fmt: skip
    tables = sum(tensor.nbytes for tensor in tensors.values())
    if config.n_parameters > held + config.d_model or config.table_bytes > tables:
        raise BitbyteError(
            f"it holds {held:,} numbers; its config needs {config.n_parameters:,}, and "
            f"{config.table_bytes:,} bytes of tables"
        )


def write_run(model, run: str | Path, source: str, *, overwrite: bool = False) -> Path:
    """One saved step of a new run folder, without what training needs.  Raises BitbyteError."""
    run = output_folder(run)
    meta = {
        "model_family": model.config.family, "variant": model.config.linear,
        "config": config_to_dict(model.config), "train": {}, "bytes_seen": 0, "rng": {},
        "data": {}, "extra": {"converted_from": source},
    }  # fmt: skip
    with folder_lock(run):
        if runs.complete_steps(run) and not overwrite:
            raise BitbyteError(f"{shown(run)} holds checkpoints; --allow_overwrite replaces them")
        runs.remove_run(run)  # refuses a folder where the user's file has a name of ours
        return checkpoint.save_step(run, 0, model.state_dict(), {}, meta)


# --- what the file says


def _folder(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(config.json, all tensors) of a folder, whose tokenizer must be of bytes."""
    file = path / "config.json"
    facts = parse_json(file.read_bytes(), str(file), lambda word: {"__float__": word})
    if not isinstance(facts, dict) or not isinstance(facts.get("model_type"), str):
        raise BitbyteError(f"{shown(file)} does not say what kind of model it is")
    _check_tokenizer(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise BitbyteError(f"{shown(path)} holds no weights (.safetensors)")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= safetensors.torch.load_file(file)
        except (SafetensorError, KeyError) as error:
            raise BitbyteError(f"{shown(file)} is not a valid safetensors file: {error}") from None
    return facts, tensors


def _check_tokenizer(path: Path) -> None:
    """Raise BitbyteError unless ids are bytes; without a tokenizer.json they must be."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return
    facts = parse_json(file.read_bytes(), str(file))
    want = hf.byte_characters()
    try:
        vocabulary = facts["model"]["vocab"]
        plain = {token: i for token, i in vocabulary.items() if i < N_BYTES}
        merges = facts["model"].get("merges")
    except (KeyError, TypeError, AttributeError):
        raise BitbyteError(f"{shown(file)} is not a tokenizer that bitbyte knows") from None
    if plain != want or merges or len(vocabulary) > VOCAB_SIZE:
        raise BitbyteError(
            f"{shown(path)} has a tokenizer whose ids are not bytes; models of bitbyte have no "
            "tokenizer"
        )


def _gguf(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """A GGUF file as (config, tensors) of transformers."""
    gguf.check_header(path)
    hf.need("gguf")
    try:
        reader = gguf.reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        kind = fields["general.architecture"]
    except Exception:  # whatever its arrays raise, in words that say nothing of the file
        raise BitbyteError(
            f"{shown(path)} is cut off or damaged, or of a kind that the package gguf cannot read"
        ) from None
    if kind not in ("llama", "mamba", "mamba2"):
        raise BitbyteError(
            f"{shown(path)} is a {shown(str(kind))}; llama, mamba, mamba2 can be read"
        )
    tokens = fields.get("tokenizer.ggml.tokens")
    plain = tokens[:N_BYTES] if isinstance(tokens, list) else None
    if plain != [f"\\x{byte:02x}" for byte in range(N_BYTES)]:
        raise BitbyteError(
            f"{shown(path)} has a vocabulary whose ids are not bytes; models of bitbyte have no "
            "tokenizer"
        )
    inside = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    with _misshapen(path):
        tensors, ternary = _tensors_of_gguf(reader, path)
        facts = _facts_of_gguf(kind, inside)
        facts |= {"ternary": ternary, "vocab_size": len(tensors.get("token_embd.weight", ()))}
        return facts, _renamed(facts, tensors)


def _tensors_of_gguf(reader, path: Path) -> tuple[dict[str, Tensor], bool]:
    """(tensors in float32 by name, whether any is ternary)."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    known = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.TQ2_0)
    tensors, ternary = {}, False
    for tensor in reader.tensors:
        if tensor.tensor_type not in known:
            kinds = ", ".join(kind.name for kind in known)
            raise BitbyteError(
                f"{shown(path)}: {shown(tensor.name)} is {tensor.tensor_type.name}, not {kinds}"
            )
        ternary |= tensor.tensor_type == GGMLQuantizationType.TQ2_0
        plain = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        tensors[tensor.name] = torch.from_numpy(plain.reshape(*reversed(tensor.shape.tolist())))
    return tensors, ternary


def _facts_of_gguf(kind: str, fields: dict) -> dict:
    facts = {
        "model_type": kind, "hidden_size": fields.get("embedding_length"),
        "num_hidden_layers": fields.get("block_count"), "hidden_act": "silu",
        "max_position_embeddings": fields.get("context_length"),
        "rms_norm_eps": round(fields.get("attention.layer_norm_rms_epsilon", 0), 9),
    }  # fmt: skip
    if kind == "llama":
        return facts | {
            "intermediate_size": fields.get("feed_forward_length"),
            "num_attention_heads": fields.get("attention.head_count"),
            "num_key_value_heads": fields.get("attention.head_count_kv"),
            "rope_theta": fields.get("rope.freq_base", 10000.0),
            "rope_width": fields.get("rope.dimension_count"),
            "rope_scaling": {"type": "scaled" if _scaled(fields) else "default"},
        }  # fmt: skip
    inner, rank = fields.get("ssm.inner_size") or 0, fields.get("ssm.time_step_rank") or 0
    return facts | {
        "layer_norm_epsilon": facts["rms_norm_eps"], "state_size": fields.get("ssm.state_size"),
        "conv_kernel": fields.get("ssm.conv_kernel"), "time_step_rank": rank, "num_heads": rank,
        "expand": inner // (facts["hidden_size"] or 1), "head_dim": inner // max(1, rank),
        "n_groups": fields.get("ssm.group_count", 1),
    }  # fmt: skip


def _scaled(fields: dict) -> bool:
    """Whether a GGUF file scales its rotary positions."""
    factor = fields.get("rope.scaling.factor", fields.get("rope.scale_linear", 1))
    return fields.get("rope.scaling.type", "none") != "none" or factor not in (0, 1)


def _renamed(facts: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a GGUF file under the names that transformers has, and in their layout."""
    outside, inside = export.GGUF_NAMES[facts["model_type"]]
    found = {}
    for theirs, name in outside.items():
        if name in tensors:
            found[theirs] = tensors.pop(name)
    heads = {"attn_q": facts.get("num_attention_heads"), "attn_k": facts.get("num_key_value_heads")}
    for i in range(facts["num_hidden_layers"]):
        for theirs, name in inside.items():
            value = tensors.pop(f"blk.{i}.{name}", None)
            if value is None:
                continue
            if (
                scale := tensors.pop(f"blk.{i}.{name.removesuffix('weight')}scale", None)
            ) is not None:
                value = value * scale
            if head := heads.get(name.removesuffix(".weight")):  # pairs become halves again
                value = value.unflatten(0, (head, -1, 2)).transpose(1, 2).reshape(value.shape)
            if name == "ssm_a":
                value = (-value).log()
            if name == "ssm_conv1d.weight":
                value = value[:, None]
            if name in ("ssm_a", "ssm_d") and facts["model_type"] == "mamba2":
                value = value[:, 0]
            if name == "ssm_norm.weight":
                value = value[0]
            place = f"model.layers.{i}.{theirs}.weight"
            found[place if facts["model_type"] == "llama" else f"backbone.layers.{i}.{theirs}"] = (
                value
            )
    return found | tensors  # what is left is unknown, and will be refused


# --- the config


def _config(facts: dict, tensors: dict[str, Tensor]) -> ModelConfig:
    """A config of ours.  Raises BitbyteError for what our models do not do."""
    kind = facts["model_type"]
    if kind == "bitbyte":
        return config_from_dict(facts.get("shape"))
    makers = {"llama": _transformer, "eurobert": _transformer, "mamba": _mamba, "mamba2": _mamba}
    if kind not in makers:
        raise BitbyteError(
            f"a model of type {shown(kind)}; {', '.join(makers)} and bitbyte can be read"
        )
    ternary = facts.get("ternary", False)
    if quantized := facts.get("quantization_config"):
        told = {name: quantized.get(name) for name in export.BITNET} if isinstance(
            quantized, dict) else {}  # fmt: skip
        if told != export.BITNET:
            raise BitbyteError("its weights are quantized in a way that cannot be read")
        ternary = True
    rope = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise BitbyteError(f"its rotary positions are {rope}; they must be fields and their values")
    fixed = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)}
    eps = "rms_norm_eps" if makers[kind] is _transformer else "layer_norm_epsilon"
    fixed[eps] = (NORM_EPS,)
    if makers[kind] is _mamba:
        fixed |= {"use_bias": (False,), "use_conv_bias": (True,), "n_groups": (1,),
                  "norm_before_gate": (False,), "rms_norm": (True,)}  # fmt: skip
    for name, allowed in fixed.items():
        if name in facts and facts[name] not in allowed:
            raise BitbyteError(f"its {name} is {facts[name]}; models of bitbyte have {allowed[0]}")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise BitbyteError("its rotary positions are scaled; those of bitbyte are not")
    vocabulary = _number(facts, "vocab_size")
    if vocabulary not in (N_BYTES, VOCAB_SIZE):
        raise BitbyteError(f"{vocabulary:,} ids; a vocabulary of bytes has 256 or 257")
    for name in ("bos_token_id", "mask_token_id"):
        if isinstance(facts.get(name), int) and vocabulary == VOCAB_SIZE and facts[name] != START:
            raise BitbyteError(f"its {name} is {facts[name]}; it must be {START}")
    longest = facts.get("max_position_embeddings")
    if not isinstance(longest, int) or not 1 <= longest <= LONGEST:
        if makers[kind] is _transformer:
            raise BitbyteError(f"its max_position_embeddings is {longest}; name --seq_len")
        longest = 1024
    common = {
        "n_layer": _number(facts, "num_hidden_layers"), "d_model": _number(facts, "hidden_size"),
        "seq_len": longest, "linear": "ternary" if ternary else "dense",
    }  # fmt: skip
    return makers[kind](facts, common, rope)


def _number(facts: dict, name: str) -> int:
    value = facts.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BitbyteError(f"its {name} is {value}; it must be a number above 0")
    return value


def _transformer(facts: dict, common: dict, rope: dict) -> ModelConfig:
    heads = _number(facts, "num_attention_heads")
    width = common["d_model"] // heads
    if facts.get("head_dim") not in (None, width):
        raise BitbyteError(f"its heads have width {facts['head_dim']}, not hidden_size / heads")
    if facts.get("rope_width") not in (None, width):
        raise BitbyteError(
            f"its rotary positions turn {facts['rope_width']} of the {width} numbers of a head; "
            "those of bitbyte turn all"
        )
    if facts.get("num_key_value_heads") not in (None, heads):
        raise BitbyteError("several of its heads share keys and values; those of bitbyte do not")
    theta = rope.get("rope_theta", facts.get("rope_theta", 10000.0))
    if not isinstance(theta, int | float):
        raise BitbyteError(f"its rope_theta is {theta}; it must be a number")
    kind = DiffusionConfig if facts["model_type"] == "eurobert" else TransformerConfig
    return kind(
        **common, d_ff=_number(facts, "intermediate_size"), n_head=heads, rope_theta=float(theta)
    )


def _mamba(facts: dict, common: dict, rope: dict) -> ModelConfig:
    first = facts["model_type"] == "mamba"
    shape = {
        "ssm": "mamba1" if first else "mamba2", "d_state": _number(facts, "state_size"),
        "expand": _number(facts, "expand"), "d_conv": _number(facts, "conv_kernel"),
    }  # fmt: skip
    if first:
        return MambaConfig(**common, **shape, dt_rank=_number(facts, "time_step_rank"))
    if (limit := facts.get("time_step_limit")) not in (None, [0, INFINITY]):
        raise BitbyteError(
            f"its time_step_limit is {shown(limit)}; models of bitbyte have no limit"
        )
    config = MambaConfig(**common, **shape, n_head=_number(facts, "num_heads"))
    if facts.get("head_dim") not in (None, config.d_inner // config.n_head):
        raise BitbyteError(f"its heads have width {facts['head_dim']}, not inner width / heads")
    return config


# --- the weights


def _state(model, tensors: dict[str, Tensor], start: int | None) -> tuple[dict, list[str]]:
    """(state of a model of ours, notes) from tensors named as in transformers."""
    tensors, notes, state = dict(tensors), [], {}
    outer = export.outer_names(model)
    embed_VD = _take(tensors, outer[0])
    head_VD = tensors.pop("lm_head.weight", embed_VD).float()
    if not torch.equal(head_VD[:N_BYTES], embed_VD[:N_BYTES]):
        raise BitbyteError("its head is not its embedding; models of bitbyte have one for both")
    if len(embed_VD) == N_BYTES:
        if start is None:
            raise BitbyteError(
                "it has 256 ids and no start symbol; name the byte that stands before every window "
                "with --start, as with --prefix of a passport"
            )
        embed_VD = torch.cat((embed_VD, embed_VD[start, None]))
        notes.append(f"byte {start} stands before every window")
    elif start is not None:
        raise BitbyteError("it has a start symbol, so --start means nothing")
    want = model.state_dict()
    state["embed"] = _fit("embed", embed_VD, want)
    state["norm.weight"] = _fit("norm.weight", _take(tensors, outer[1]), want)
    used: dict[str, int] = {}
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, BitLinear)}
    for ours, theirs in export.layer_names(model):
        names = theirs.split("+")
        rows = want[ours].shape[0] // len(names)
        parts = []
        for name in names:
            whole, first = _take(tensors, name), used.get(name, 0)
            part = whole[first : first + rows]
            used[name] = first + rows
            if (scale := tensors.get(f"{name}_scale")) is not None:
                if scale.numel() != 1:
                    raise BitbyteError(f"{name}_scale holds {scale.numel()} numbers, not one")
                part = part * scale.float().flatten()
            parts.append(part)
        value = torch.cat(parts)
        if ours.endswith("mixer.in_proj.weight") and getattr(model.config, "ssm", "") == "mamba1":
            value = torch.cat(value.chunk(2)[::-1])  # theirs has the gate last
        if ours.endswith("conv_weight") and value.ndim == 3:
            value = value[:, 0]
        if ours in layers:
            value = _latent(ours, value, layers[ours].groups)
        state[ours] = _fit(ours, value, want)
    read = used.keys() | {f"{name}_scale" for name in used}
    if strange := sorted(tensors.keys() - read - {outer[0], outer[1]}):
        raise BitbyteError(f"it has {shown(strange[0])}, which models of bitbyte do not have")
    for name, rows in used.items():
        if rows != len(_take(tensors, name)):
            raise BitbyteError(f"{name} has other rows than the {rows} that its config needs")
    return state, notes


def _take(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A tensor in float32; BitNet's packed weights, four rows to one, as -1, 0 and 1."""
    if name not in tensors:
        raise BitbyteError(f"it has no {name}, which its config needs")
    value = tensors[name]
    if value.dtype == torch.uint8:
        shifted = torch.stack([value >> shift & 3 for shift in (0, 2, 4, 6)])
        return shifted.flatten(0, 1).float() - 1
    return value.float()


def _latent(name: str, value_OI: Tensor, groups: int) -> Tensor:
    """Weights that quantization makes ``value_OI``, which are ternary: 0 or one size a matrix.

    As in `packed.unpack`: sizes grow, so that the mean absolute value is what the size was.
    """
    parts = []
    for part in value_OI.chunk(groups):
        sizes = part.abs()[part != 0]
        size = sizes.max() if len(sizes) else part.new_ones(())
        if len(sizes) and (sizes - size).abs().max() > 1e-3 * size:
            raise BitbyteError(f"{name} is not ternary")
        share = max(1.0, float(len(sizes))) / part.numel()
        parts.append(part.sign() * (size / share))
    return torch.cat(parts)


def _fit(name: str, value: Tensor, want: dict[str, Tensor]) -> Tensor:
    if value.shape != want[name].shape:
        raise BitbyteError(
            f"{name} would be {tuple(value.shape)}; its config needs {tuple(want[name].shape)}"
        )
    return value.to(want[name].dtype).contiguous().clone()


def _state_of_code(model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model of `modeling_bitbyte`."""
    tensors, want = dict(tensors), model.state_dict()
    if "embed.weight" in tensors:
        tensors["embed"] = tensors.pop("embed.weight")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BitLinear)}
    for name, layer in layers.items():
        trits, scale_G = tensors.pop(f"{name}.trits", None), tensors.pop(f"{name}.scale", None)
        if trits is None or scale_G is None or len(scale_G) != layer.groups:
            raise BitbyteError(f"it has no {name}.trits and .scale, which its config needs")
        shape = layer.weight.shape
        q_GOI = unpack_trits(trits, layer.weight.numel()).view(layer.groups, -1).float()
        value = (q_GOI * scale_G.float()[:, None]).view(shape)
        tensors[f"{name}.weight"] = _latent(f"{name}.weight", value, layer.groups)
    for name in sorted(want.keys() ^ tensors.keys()):
        if name in want:
            raise BitbyteError(f"it has no {name}, which its config needs")
        raise BitbyteError(f"it has {shown(name)}, which its config does not need")
    return {name: _fit(name, tensors[name], want) for name in want}
