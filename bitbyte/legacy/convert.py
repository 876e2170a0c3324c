"""Convert a checkpoint of an earlier script to the current format: names, shapes, config.

The tensors get new names from two tables of regular expressions; separate q, k, v and gate, up
become one matrix each.  What does not fit is refused by name, and what the file does not say must
be given.
"""

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor

from bitbyte import checkpoint, models, runs
from bitbyte.config import PRIOR_FIELDS, config_to_dict, family_config
from bitbyte.files import BitbyteError, folder_lock, user_path
from bitbyte.legacy.reader import Legacy, guess, read, recomputed, shown
from bitbyte.process import say
from bitbyte.vocab import VOCAB_SIZE

_PRE = r"(?:(?:model|transformer|backbone|decoder|net)\.)*"
_NORM = r"\.(?:weight|scale|gamma|g)"
_ATT = r"(?:self_?attn|self_?attention|attention|attn|att|sa)\."
_MLP = r"(?:mlp|ffn?|feed_?forward)\."
OUTSIDE = {  # old name -> new one; the head is tied in the new models
    _PRE + r"(?:(?:tok|token|byte)_?)?emb(?:ed|eddings?)?(?:_tokens)?(?:\.weight)?": "embed",
    _PRE + r"wte\.weight": "embed",
    _PRE
    + r"(?:norm|(?:norm|ln)_?(?:f|final|out)|(?:final|out)_?(?:norm|ln))"
    + _NORM: "norm.weight",
    _PRE + r"(?:(?:lm_?)?head|output|unembed|to_logits)\.weight": "head",
}
INSIDE = {  # old name in a block -> new one, and which part of it
    r"(?:(?:attn|attention)_norm|(?:ln|norm)_?1|input_layernorm)" + _NORM: ("attn_norm.weight", 0),
    r"(?:(?:mlp|ffn?)_norm|(?:ln|norm)_?2|post_attention_layernorm)" + _NORM:
        ("mlp_norm.weight", 0),
    _ATT + r"(?:(?:to_|w)?qkv(?:_proj)?|c_attn|in_proj)\.weight": ("attn.qkv.weight", 0),
    _ATT + r"(?:(?:to_|w_?)?q|q_?proj|query)\.weight": ("attn.qkv.weight", 0),
    _ATT + r"(?:(?:to_|w_?)?k|k_?proj|key)\.weight": ("attn.qkv.weight", 1),
    _ATT + r"(?:(?:to_|w_?)?v|v_?proj|value)\.weight": ("attn.qkv.weight", 2),
    _ATT + r"(?:(?:to_)?out|w?o|(?:o|out|c)?_?proj)\.weight": ("attn.out.weight", 0),
    _MLP + r"(?:gate_up(?:_proj)?|w12)\.weight": ("mlp.gate_up.weight", 0),
    _MLP + r"(?:(?:w_?)?gate(?:_proj)?|w1)\.weight": ("mlp.gate_up.weight", 0),
    _MLP + r"(?:(?:w_?)?up(?:_proj)?|w3)\.weight": ("mlp.gate_up.weight", 1),
    _MLP + r"(?:(?:w_?)?down(?:_proj)?|w2)\.weight": ("mlp.down.weight", 0),
}  # fmt: skip
BLOCK = re.compile(r"(?:\w+\.)*?(?:blocks|layers|h)\.([0-9]{1,4})\.(.+)")
ALIASES = {
    "seq_len": ("block_size", "max_seq_len", "context_length"),
    "n_head": ("n_heads", "num_heads"),
    "rope_theta": ("rope_base",),
}


def _place(name: str, body: str) -> tuple[str, int]:
    """Where a tensor of an old name goes: (new name, which part of it)."""
    for pattern, new in OUTSIDE.items():
        if re.fullmatch(pattern, name):
            return new, 0
    block = BLOCK.fullmatch(name)
    if not block:
        return name, 0
    number, rest = block.groups()
    places = (place for pattern, place in INSIDE.items() if re.fullmatch(pattern, rest))
    new, part = next(places, (rest, 0))
    return f"{body}.blocks.{int(number)}.{new}", part


def settle(legacy: Legacy, variant: str | None, model_family: str | None) -> tuple[str, str]:
    """(variant, model_family): as the user says, else as the file says beyond doubt."""
    if variant and model_family:
        return variant, model_family
    found = guess(legacy)
    if found.certainty in ("tagged", "found"):
        return variant or found.variant, model_family or found.model_family
    why = f"{found.certainty} ({'; '.join(found.reasons)})"
    raise BitbyteError(
        f"{shown(legacy.path)} is {why}: give --variant and --model_family "
        "(and --linear, --seq_len and --n_head, unless the file states them)"
    )


def convert(
    path: str | Path, out: str | Path, *, model_family: str | None = None,
    variant: str | None = None, linear: str | None = None, n_head: int | None = None,
    seq_len: int | None = None, allow_overwrite: bool = False,
) -> Path:  # fmt: skip
    """Convert a file to one saved step of the run folder ``out``, without optimizer state.

    What is neither in the tensors nor in the file's config must be given.  An untied head, biases,
    and shapes that the new models do not have are refused.  A fused qkv is taken as q, k, v stacked
    in this order, rotary embeddings as half-split.  Raises BitbyteError.
    """
    run = user_path(out)
    if not_folder := next((p for p in (run, *run.parents) if p.exists() and not p.is_dir()), None):
        raise BitbyteError(f"{shown(not_folder)} is a file: name a new folder for the run")
    legacy = read(path, verify=True)
    variant, model_family = settle(legacy, variant, model_family)
    family = "diffusion" if "diffusion" in (variant, model_family) else model_family
    family = "ar" if family == "bitbyte" else family
    body = "mamba" if family == "mamba" else "transformer"
    state, dropped = _renamed(legacy, body)
    given = {"linear": linear, "n_head": n_head, "seq_len": seq_len}
    config, assumed = _config_for(legacy, family, body, state, given)
    with torch.device("meta"):
        expected = models.build(config).state_dict()
    _check_fit(expected, state, path)
    tensors = {name: state[name].to(want.dtype) for name, want in expected.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BitbyteError(f"{shown(legacy.path)}: NaN or infinity in {name}")
    for note in legacy.notes:
        say(f"{shown(legacy.path)}: {note}")
    if dropped:
        say(f"{shown(legacy.path)}: left out {', '.join(dropped[:3])}: computed, not learned")
    if assumed:
        say(f"{shown(legacy.path)} does not say {assumed}: evaluate the model before you use it")
    meta = {
        "model_family": family,
        "variant": config.linear,
        "config": config_to_dict(config),
        "train": {},
        "bytes_seen": 0,
        "rng": {},
        "data": {},
        "extra": {"converted_from": legacy.path.name.encode(errors="replace").decode()},
    }
    run.mkdir(parents=True, exist_ok=True)
    with folder_lock(run):
        if runs.complete_steps(run) and not allow_overwrite:
            raise BitbyteError(f"{run} holds checkpoints; --allow_overwrite replaces them")
        runs.remove_run(run)  # refuses a folder where the user's file has a name of ours
        return checkpoint.save_step(run, legacy.step or 0, tensors, {}, meta)


def _renamed(legacy: Legacy, body: str) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by new name, with the parts of each matrix joined; names that were left out)."""
    parts: dict[str, dict[int, Tensor]] = {}
    dropped = [name for name, tensor in legacy.state.items() if recomputed(name, tensor)]
    for name, tensor in legacy.state.items():
        if name in dropped:
            continue
        new, part = _place(name, body)
        if part in parts.setdefault(new, {}):
            raise BitbyteError(f"{shown(legacy.path)}: two tensors are {new}, one is {name!r:.60}")
        parts[new][part] = tensor
    where = shown(legacy.path)
    if "embed" not in parts:
        raise BitbyteError(f"{where}: no tensor is named like an embedding; one is {name!r:.60}")
    embed, head = parts["embed"][0], parts.pop("head", {0: None})[0]
    if embed.ndim != 2 or embed.shape[0] != VOCAB_SIZE:
        raise BitbyteError(
            f"{where}: the embedding is {tuple(embed.shape)}; the models have {VOCAB_SIZE} rows "
            "(256 bytes and START), and a row made up now would not have been trained"
        )
    if head is not None and not torch.equal(head, embed[: len(head)]):
        raise BitbyteError(f"{where}: the head differs from the embedding; the models tie the two")
    joined = {}
    for new, pieces in parts.items():
        try:
            joined[new] = torch.cat([pieces[i] for i in sorted(pieces)])
        except RuntimeError:
            raise BitbyteError(f"{where}: the parts of {new} do not fit together") from None
    return joined, dropped


def _config_for(legacy: Legacy, family: str, body: str, state: dict, given: dict):
    """(config, assumed fields): sizes from the tensors, the rest from the user or the file."""
    kind = family_config(family)
    fields = {}
    for field in dataclasses.fields(kind):
        for name in (field.name, *ALIASES.get(field.name, ())):
            value = legacy.config.get(name)
            kinds = (int, float) if field.type is float else (field.type,)
            if type(value) in kinds and (isinstance(value, str) or abs(value) < 2**40):
                fields.setdefault(field.name, field.type(value))
    if isinstance(legacy.config.get("no_act_quant"), bool):
        fields["act_quant"] = not legacy.config["no_act_quant"]
    fields |= {name: value for name, value in given.items() if value is not None}
    blocks = [int(m[1]) for m in map(BLOCK.fullmatch, state) if m]
    fields |= {"n_layer": 1 + max(blocks, default=0), "d_model": state["embed"].shape[1]}
    if body == "transformer":
        down = state.get("transformer.blocks.0.mlp.down.weight", state["embed"])
        fields["d_ff"] = down.shape[-1]
        for name, rates in legacy.state.items():
            if name.endswith("inv_freq") and rates.ndim == 1 and len(rates) > 1:
                base = float(rates[1].double() ** -len(rates))
                fields |= {"rope_theta": float(f"{base:.4g}")} if 1 < base < 1e12 else {}
    if fields["n_layer"] > len(state):
        raise BitbyteError(f"{shown(legacy.path)}: {fields['n_layer']} layers, but too few tensors")
    needed = ("linear", "seq_len", *(("n_head",) if body == "transformer" else ()))
    missing = [f"--{name}" for name in needed if name not in fields]
    if missing:
        raise BitbyteError(f"{shown(legacy.path)} does not say enough: give {', '.join(missing)}")
    config = kind(**fields)
    # Earlier scripts had no prior, so a file that does not mention one says enough.
    assumed = [name for name in vars(config) if name not in fields.keys() | PRIOR_FIELDS]
    return config, ", ".join(f"{name} (taken as {getattr(config, name)})" for name in assumed)


def _check_fit(expected: dict[str, Tensor], state: dict[str, Tensor], path: Path) -> None:
    bad = [f"{name} has no place" for name in state if name not in expected]
    for name, want in expected.items():
        if name not in state:
            bad.append(f"{name} is missing")
        elif state[name].shape != want.shape or not state[name].is_floating_point():
            have = f"{tuple(state[name].shape)} {state[name].dtype}"
            bad.append(f"{name} is {have} instead of {tuple(want.shape)}")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise BitbyteError(f"{shown(path)} does not fit: {'; '.join(bad[:3])}{more}")
