"""Chooses how a model predicts without gradients: by the native engine or by PyTorch.

A model's attribute ``engine`` says what is wanted, see `choose`.  `kernels.native` is the engine
itself.
"""

import copy
import functools
import importlib.util
import threading
import weakref

import torch

from bitbyte.bitlinear import BitLinear
from bitbyte.device import device_of, dtype_name
from bitbyte.files import BitbyteError
from bitbyte.vocab import MASK, START

ENGINES = ("auto", "native", "torch")
PROBE = [START, *b"the old mill, the old mill, the old"]  # with repetitions, which a prior matches
LIMIT = 1e-4  # of that text's relative error, where nothing is rounded to int8
_engines: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> (made of, engine, why)
_building = threading.RLock()


def engine_for(model):
    """The native `Engine` of a model, or None: then PyTorch is to be used.

    That is so in training, under autocast, and where gradients are recorded.  The engine is built
    again after the weights have changed.
    """
    if model.engine == "torch" or model.training or torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    return _native(model)[0]


def forget(model) -> None:
    """Build the engine anew at its next use, whether or not the weights seem to have changed."""
    _engines.pop(model, None)


def _native(model) -> tuple:
    """(engine, None), or (None, why there is none), whatever the model's ``engine`` says."""
    problem = problem_of(model)
    if problem:
        return None, problem
    weights = [(t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers())]
    made_of = [model.threads, *weights]
    with _building:
        known = _engines.get(model)
        if known is None or known[0] != made_of:
            # A method that a user put on the model may come back here while it is compared.
            _engines[model] = (made_of, None, "its engine is being built")
            try:
                _engines[model] = known = (made_of, *_built(model))
            except BaseException:
                forget(model)
                raise
    return known[1:]


def _built(model) -> tuple:
    """(engine, None), or (None, why): what it computes is compared with PyTorch once.

    The classes of a model can be replaced from outside, and the kernels know only ours.
    """
    from bitbyte.kernels.native.engine import Engine

    try:
        twin = copy.deepcopy(model)  # another thread may be computing with the model itself
    except (RuntimeError, TypeError) as error:  # a layer of the user's keeps what has no copy
        return None, f"it cannot be copied ({type(error).__name__})"
    twin.engine = "torch"
    layers = [m for m in twin.modules() if isinstance(m, BitLinear) and m.act_quant]
    try:
        native = Engine(model, model.threads)
        # In ternary models a value on the border between two int8 steps may fall to the other side,
        # which moves the logits of deep ones by a hundredth.
        same = _error(twin, native) < (0.1 if layers else LIMIT)
        if same and layers and sum(m.weight.numel() for m in layers) <= 1 << 24:
            for layer in layers:
                layer.act_quant = False
            same = _error(twin, Engine(twin)) < LIMIT
    except AttributeError as error:  # a layer of another kind
        return None, f"its layers are not ours ({error})"
    except BitbyteError as error:
        return None, str(error)
    return (native, None) if same else (None, "its layers compute something else than ours")


def _error(model, native) -> float:
    """Mean difference of the logits of a short text, relative to their size."""
    ids_1T = torch.tensor([PROBE[: model.config.seq_len]])
    if not model.exact:
        ids_1T[0, 1::3] = MASK
    with torch.no_grad():
        want_1TV = model.logits(ids_1T)
    return float((native.logits(ids_1T) - want_1TV).abs().mean() / want_1TV.abs().mean())


def choose(model, engine: str, threads: int | None = None) -> None:
    """Set how a model predicts: "auto" (native where possible), "native" or "torch".

    ``threads``: how many the native engine may use for one step; None is one.  Raises BitbyteError
    for another word, fewer than one, and for "native" where that is not possible.
    """
    model.threads = 1 if threads is None else threads
    if model.threads < 1:
        raise BitbyteError(f"threads is {threads}; it must be at least 1")
    if engine not in ENGINES:
        raise BitbyteError(f"no engine {engine!r}; choose from {', '.join(ENGINES)}")
    problem = engine == "native" and _native(model)[1]
    if problem:
        raise BitbyteError(f"the native engine cannot run this model: {problem}")
    model.engine = engine


def described(model, dtype: torch.dtype = torch.float32) -> str:
    """For a record: "native", or "torch" and why.  ``dtype``: that of autocast."""
    problem = "chosen" if model.engine == "torch" else _native(model)[1]
    if dtype != torch.float32:
        problem = f"computed in {dtype_name(dtype)}"
    return f"torch ({problem})" if problem else "native"


def problem_of(model) -> str | None:
    """Why the native engine cannot run a model of this shape here; None if it can."""
    c = model.config
    if c.family not in ("ar", "mamba", "diffusion"):
        return f"the family {c.family} has no native kernels"
    if device_of(model).type != "cpu":
        return "the model is not on a CPU"
    if any(p.dtype != torch.float32 for p in model.parameters()):
        return "the weights are not float32"
    if c.d_model % 32 or (c.family != "mamba" and (c.d_ff % 32 or c.d_model // c.n_head % 32)):
        return "widths are not multiples of 32"
    if c.family == "mamba" and c.ssm == "mamba2" and (c.d_inner // c.n_head % 16 or c.d_state % 8):
        return "heads are not multiples of 16 wide, or d_state is not one of 8"
    if c.family == "mamba" and not c.n_layer:
        return "there are no layers"
    if getattr(c, "around", 0):
        return "it sees what is around a byte by a table, which has no native kernel"
    if c.prior != "none" and (c.prior_rank % 32 or c.prior_bits != 4):
        return "the n-gram tables are not of 4 bits and a rank that is a multiple of 32"
    return _problem_here()


@functools.cache
def _problem_here() -> str | None:
    """Why nothing can be compiled here, or the compiled code be trusted; None if all is well."""
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite is not installed: pip install 'bitbyte[fast]'"
    try:
        from bitbyte.kernels.native import engine

        engine.self_test()
    except Exception as error:  # an llvmlite that is too old or broken, an unknown processor, ...
        return f"llvmlite does not work here ({type(error).__name__}: {error})"
    return None
