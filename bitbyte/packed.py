"""Packed models: a checkpoint in one small file, FILE.bbm, which every command takes like a run.

It is a safetensors file.  Ternary matrices are stored five weights to a byte (uint8) with a float32
scale each, tables of n-grams as they are, everything else in bfloat16.  The checkpoint's meta data
is in the file's own, compressed, with the SHA-256 of all tensors in place of that of
model.safetensors.  There is no optimizer state: a packed model cannot be trained on.

Shapes: G matrices of a stacked weight, O outputs, I inputs.
"""

import base64
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bitbyte.bitlinear import TRITS, BitLinear, pack_trits, unpack_trits
from bitbyte.files import BitbyteError, parse_json
from bitbyte.kernels.fixed import ternary_weight

SCALE = ":scale"  # a ternary weight's tensors are NAME, its trits, and NAME:scale
MOST_META = 1 << 22  # bytes of the header, and of the meta data
KEY = "bitbyte"  # of the meta data


def pack(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a packed model."""
    layers, tensors = _ternary(model), {}
    for name, tensor in model.state_dict().items():
        plain = tensor.detach().cpu()
        if name in layers:
            q_OI, scale_O = ternary_weight(layers[name].matrices().detach().cpu())
            tensors[name] = pack_trits(q_OI)
            tensors[name + SCALE] = scale_O[:: len(scale_O) // layers[name].groups].clone()
        elif name in dict(model.named_parameters()):
            tensors[name] = plain.to(torch.bfloat16)
        else:
            tensors[name] = plain
    return tensors


def _ternary(model: nn.Module) -> dict[str, BitLinear]:
    return {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, BitLinear)}


def numbers(tensors: dict[str, Tensor]) -> int:
    """How many weights tensors hold, packed or not."""
    return sum(
        tensor.numel() * (TRITS if name + SCALE in tensors else 1)
        for name, tensor in tensors.items()
    )


def unpack(tensors: dict[str, Tensor], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The state of ``model`` (a fresh one, of the same config), for ``load_state_dict``.

    A nonzero weight becomes its scale divided by the share of nonzero ones, so that the mean
    absolute value, which quantization makes the scale again, is what it was.  Raises BitbyteError.
    """
    layers, state = _ternary(model), dict(tensors)  # what is unknown is for `checkpoint` to find
    for name, want in model.state_dict().items():
        if name not in tensors:
            continue
        have, scale_G = tensors[name], state.pop(name + SCALE, None)
        if scale_G is not None:
            groups = layers[name].groups if name in layers else -1
            kinds = (have.dtype, have.ndim, scale_G.dtype, scale_G.shape)
            if kinds != (torch.uint8, 1, torch.float32, (groups,)) or not (scale_G > 0).all():
                raise BitbyteError(f"{path}: {name} does not fit the config")
            q_GN = unpack_trits(have, want.numel()).view(len(scale_G), -1).float()
            share_G = q_GN.abs().mean(1).clamp(min=1 / q_GN.shape[1])
            have = (q_GN * (scale_G / share_G)[:, None]).view(want.shape)
        elif have.dtype == torch.bfloat16:
            have = have.to(want.dtype)
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            raise BitbyteError(f"{path}: {name} does not fit the config")
        state[name] = have
    return state


def content(tensors: dict[str, Tensor], seal: Callable[[int, str], bytes]) -> bytes:
    """The bytes of a file.  ``seal(size, sha256)``: the meta data, given those of the tensors."""
    plain = safetensors.torch.save(tensors)
    body = plain[8 + int.from_bytes(plain[:8], "little") :]
    meta = seal(len(body), hashlib.sha256(body).hexdigest())
    return safetensors.torch.save(
        tensors, {KEY: base64.b85encode(zlib.compress(meta, 9)).decode("ascii")}
    )


def read_meta(path: Path) -> bytes:
    """The meta data of a file, as it was sealed.  Raises BitbyteError."""
    with open(path, "rb") as file:
        return _meta(file.read(8 + MOST_META), path)[0]


def read(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file, which must have this hash.  Raises BitbyteError."""
    data = path.read_bytes()
    _, start = _meta(data, path)
    if hashlib.sha256(data[start:]).hexdigest() != sha256:
        raise BitbyteError(f"{path} is damaged: get it again")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError) as error:
        raise BitbyteError(f"{path}: not a valid safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BitbyteError(f"{path}: NaN or infinity in {name!r}")
    return tensors


def _meta(data: bytes, path: Path) -> tuple[bytes, int]:
    """(meta data, where the tensors begin) of a file that begins with ``data``."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(MOST_META, len(data) - 8):
        raise BitbyteError(f"{path} is not a packed model, or cut off")
    header = parse_json(data[8 : 8 + length], str(path))
    meta = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(meta, dict) or not isinstance(meta.get(KEY), str):
        raise BitbyteError(f"{path} is not a packed model: it has no meta data of one")
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(base64.b85decode(meta[KEY]), MOST_META)
    except (ValueError, zlib.error):
        raise BitbyteError(f"{path} is damaged: get it again") from None
    return text, 8 + length
