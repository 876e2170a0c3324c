"""Optimizers and schedules.

Matrices are trained by Muon or AdamW, embeddings and norms always by AdamW.  Muon's learning rate
is on AdamW's scale: the orthogonal update is multiplied by 0.2 sqrt(max(rows, columns)), so its
RMS is about 0.2 whatever the shape (arXiv:2502.16982); other codebases differ by a constant.
"""

import math

import torch
from torch import Tensor, nn

from bitbyte import face
from bitbyte.bitlinear import Linear
from bitbyte.config import OPTIMIZERS
from bitbyte.distributed import shard_like, whole
from bitbyte.files import BitbyteError

# Newton-Schulz coefficients that push singular values towards 1 (Keller Jordan, Muon, 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def newton_schulz(g_NOI: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Replace each matrix by approximately the nearest semi-orthogonal one, computed in ``dtype``.

    Singular values end up between 0.7 and 1.2, which is as good as 1 for an update.
    """
    a, b, c = NEWTON_SCHULZ
    x = g_NOI.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):  # baddbmm rounds once where the written formulas would three times
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (Jordan et al. 2024) for parameters that are stacks of matrices.

    ``groups[i]`` is the number of equal-sized matrices stacked in parameter i.  All matrices of
    one shape, from all layers, are orthogonalized in one batch, sharded ones after gathering.
    """

    def __init__(
        self, params: list[Tensor], groups: list[int], lr: float, weight_decay: float,
        dtype: torch.dtype = torch.bfloat16, steps: int = 5,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype, self.steps = dtype, steps
        self.stacks = dict(zip(params, groups, strict=True))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                rows = p.shape[0] // self.stacks[p]
                by_shape.setdefault((rows, p.shape[1]), []).append(p)
            for (rows, columns), params in by_shape.items():
                updates = [whole(self._momentum(p, group["momentum"])) for p in params]
                stacked = torch.cat([u.view(-1, rows, columns) for u in updates])
                stacked = newton_schulz(stacked, self.steps, self.dtype).float()
                scale = 0.2 * math.sqrt(max(rows, columns)) * group["lr"]
                sizes = [self.stacks[p] for p in params]
                for p, update in zip(params, stacked.split(sizes), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(shard_like(update.reshape(p.shape), p), alpha=scale)

    def _momentum(self, p: Tensor, beta: float) -> Tensor:
        if p.grad is None:
            raise AssertionError("a matrix has no gradient")
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(state["momentum"], beta)  # Nesterov


class RowAdagrad(torch.optim.Optimizer):
    """Adagrad with one number of state per row, for tables of which a step touches few rows.

    Gradients are sparse.  A row moves by lr g / sqrt(v), where v sums the mean squares of its g.
    """

    def __init__(self, tables: Tensor, lr: float):
        super().__init__([tables], {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["squares"] = torch.zeros(len(p), device=p.device)
                grad = p.grad.coalesce()
                rows_N, g_Nr = grad.indices()[0], grad.values()
                state["squares"].index_add_(0, rows_N, g_Nr.square().mean(1))
                size_N1 = state["squares"][rows_N, None].sqrt() + 1e-12
                p.index_add_(0, rows_N, g_Nr / size_N1, alpha=-group["lr"])


class Optimizers:
    """Several optimizers over disjoint parameters, driven and saved as one.

    ``state_tensors`` is flat, "parameter name/state name" -> tensor, so that it can be stored as
    safetensors and checked by name on load.
    """

    def __init__(self, names: dict[Tensor, str], parts: list[torch.optim.Optimizer]):
        self.names, self.parts = names, parts
        self.groups = [group for part in parts for group in part.param_groups]
        self.base = [(group["lr"], group["weight_decay"]) for group in self.groups]

    def add(self, name: str, part: torch.optim.Optimizer) -> None:
        """Take in an optimizer of one more tensor."""
        self.names = self.names | {_params(part)[0]: name}
        self.parts = [*self.parts, part]
        self.groups += part.param_groups
        self.base += [(group["lr"], group["weight_decay"]) for group in part.param_groups]

    def set_rates(self, factor: float, decay: bool = True) -> None:
        """Multiply every base learning rate by ``factor``; ``decay=False`` drops weight decay."""
        for group, (lr, weight_decay) in zip(self.groups, self.base, strict=True):
            group["lr"], group["weight_decay"] = lr * factor, weight_decay if decay else 0.0

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state by name; copies only tensors that parameters share (8-bit code books)."""
        tensors, seen = {}, set()
        for part in self.parts:
            for p, state in part.state.items():
                for key, value in state.items():
                    tensor = torch.as_tensor(value)
                    part_of = getattr(tensor, "to_local", lambda tensor=tensor: tensor)()
                    shared = part_of.data_ptr() in seen
                    seen.add(part_of.data_ptr())
                    tensors[f"{self.names[p]}/{key}"] = tensor.clone() if shared else tensor
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore `state_tensors`.  Raises BitbyteError on unknown or missing names."""
        owners = {self.names[p]: (part, p) for part in self.parts for p in _params(part)}
        missing = owners.keys() - {name.rpartition("/")[0] for name in tensors}
        if missing:
            raise BitbyteError(f"there is no saved optimizer state for {sorted(missing)[0]}")
        for name, tensor in tensors.items():
            owner, _, key = name.rpartition("/")
            if owner not in owners:
                raise BitbyteError(f"the saved optimizer state {name!r} belongs to no parameter")
            part, p = owners[owner]
            count = tensor.ndim == 0
            if count and not tensor.is_floating_point():
                part.state[p][key] = tensor.item()  # 8-bit AdamW counts steps in a Python int
            else:
                part.state[p][key] = shard_like(tensor.clone(), p)


def _params(part: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in part.param_groups for p in group["params"]]


def create_optimizer(
    model: nn.Module, name: str = "muon", *, lr: float, embed_lr: float, weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95), precise: bool = False, steps: int = 5,
) -> Optimizers:  # fmt: skip
    """Optimizer for a model.

    The matrices of its linear layers get ``lr`` and weight decay; everything else (embeddings,
    norms) gets ``embed_lr`` and no decay.  ``name``: muon, adamw (fused), or adamw8bit (CUDA with
    bitsandbytes, else BitbyteError).  ``precise`` runs Muon in float32: in bf16 the last bit of a
    gradient can change an update by a thousandth.  ``steps`` are Muon's Newton-Schulz iterations.
    """
    if name not in OPTIMIZERS:
        raise BitbyteError(f"no optimizer {name!r}; choose from {', '.join(OPTIMIZERS)}")
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    stacks = {m.weight: m.groups for m in model.modules() if isinstance(m, Linear)}
    rest = [p for p in names if p not in stacks]
    assert len(stacks) + len(rest) == len(names), "each parameter belongs to one group"
    groups = [
        {"params": list(stacks), "lr": lr, "weight_decay": weight_decay},
        {"params": rest, "lr": embed_lr, "weight_decay": 0.0},
    ]
    if name == "muon":
        slow = not rest[0].is_cuda and not torch.cpu._is_avx512_bf16_supported()
        dtype = torch.float32 if precise or slow else torch.bfloat16
        matrices = Muon(list(stacks), list(stacks.values()), lr, weight_decay, dtype, steps)
        return Optimizers(names, [matrices, _adamw(groups[1:], betas)])
    if name == "adamw":
        return Optimizers(names, [_adamw(groups, betas)])
    try:
        import bitsandbytes
    except ImportError:
        raise BitbyteError(
            "adamw8bit needs bitsandbytes: pip install bitsandbytes, or use --optimizer adamw"
        ) from None
    if not rest[0].is_cuda:
        raise BitbyteError("adamw8bit runs on CUDA only; use --optimizer adamw")
    return Optimizers(names, [bitsandbytes.optim.AdamW8bit(groups, betas=betas)])


def _adamw(groups: list[dict], betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def lr_for_step(progress: float, schedule: str = "linear", warmup: float = 0.04) -> float:
    """Learning-rate factor in [0, 1] at ``progress`` in [0, 1] of the run.

    Linear warm-up over the first ``warmup`` of the run, then "linear" or "cosine" decay to 0, or
    "wsd": constant, then linear to 0 over the last fifth.
    """
    if progress < warmup:
        return progress / warmup
    left = max(0.0, 1 - progress) / max(1e-12, 1 - warmup)
    if schedule == "linear":
        return left
    if schedule == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * left)
    return min(1.0, 5 * max(0.0, 1 - progress))


def seq_len_for_step(step: int, steps: int, stages: tuple[int, ...], cap: int | None = None) -> int:
    """Window length in bytes at ``step``: one stage after the other for equal parts of the run."""
    seq_len = stages[min(len(stages) - 1, step * len(stages) // max(1, steps))]
    return seq_len if cap is None else min(seq_len, cap)


__getattr__ = face(__name__, {}, renamed="orthogonalise:newton_schulz")
