"""Subjects of our own: trained models, n-gram counts, the uniform distribution, Python functions.

Shapes: as in `evaluate.subject`.
"""

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from bitbyte import bounds, ngrams, scoring
from bitbyte.device import device_of
from bitbyte.evaluate.evaluation import seen_by
from bitbyte.evaluate.leaks import OTHER_SHAPE
from bitbyte.evaluate.subject import NotGivenBackError, Subject
from bitbyte.files import BitbyteError, shown
from bitbyte.models import packed_bytes, preceding
from bitbyte.ngrams import context_rows, count
from bitbyte.vocab import MASK, N_BYTES, START

LEFT_TO_RIGHT = scoring.CHAIN_RULE + "left_to_right"


class OfModel(Subject):
    """A trained model of ours.  A diffusion model is scored as its code from left to right."""

    source = "run"
    limits = OTHER_SHAPE[torch.float32]

    def __init__(self, model, name: str, meta: dict | None = None):
        super().__init__()
        self.model, self.name = model.eval(), name
        self.window = self.longest = model.config.seq_len
        self.parameters = sum(p.numel() for p in model.parameters())
        self.sizes = {"weights, packed:": packed_bytes(model)}
        self.seen = seen_by(meta) if meta else None
        self.facts = {"family": model.config.family}
        if variant := (meta or {}).get("variant"):
            self.facts["variant"] = variant
        if not model.exact:
            self.kind, self.sample, self.batch_size = LEFT_TO_RIGHT, 32, 32
            self.first = "the first byte of a window is predicted from hidden bytes"

    def _ids(self, ids_BT: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids_BT)).to(device_of(self.model))

    @torch.no_grad()
    def logprobs(self, ids_BT: np.ndarray) -> np.ndarray:
        ids = self._ids(ids_BT)
        if self.model.exact:
            return self.model.logits(preceding(ids)).float().log_softmax(-1).cpu().numpy()
        columns = []
        for t in range(ids.shape[1]):
            hidden_BT = ids.clone()
            hidden_BT[:, t:] = MASK
            columns.append(self.model.logits(hidden_BT)[:, t].float().log_softmax(-1).cpu())
        return torch.stack(columns, 1).numpy()

    @torch.no_grad()
    def nats(self, ids_BT: np.ndarray, n: int) -> np.ndarray:
        ids = self._ids(ids_BT)
        if self.model.exact:
            return self.model(ids)[:, -n:].cpu().double().numpy()
        return bounds.chain_rule(self.model, ids, n, order="left_to_right").cpu().double().numpy()

    @torch.no_grad()
    def steps(self, ids_T: np.ndarray) -> np.ndarray | None:
        if not hasattr(self.model, "step"):
            return None
        state, rows = self.model.init_state(1), []
        for i in [START, *ids_T[:-1].tolist()]:
            ids_1 = torch.tensor([i], device=device_of(self.model))
            logits_1V, state = self.model.step(ids_1, state)
            rows.append(logits_1V[0].float().log_softmax(-1).cpu())
        return torch.stack(rows).numpy()


class Uniform(Subject):
    """Every byte equally likely: 8 bits each."""

    name, source = "uniform", "uniform"

    def logprobs(self, ids_BT: np.ndarray) -> np.ndarray:
        return np.full((*ids_BT.shape, N_BYTES), -math.log(N_BYTES))


class NGram(Subject):
    """Counted contexts of up to ``order`` bytes and the word, interpolated as in `ngrams.Backoff`.

    Memory: 1 KiB for each of ``rows`` (a power of two) and each context.
    """

    source = "ngram"
    first = "the first byte of a window is uniform, and contexts grow from there"

    def __init__(self, data, order: int = 5, rows: int = 1 << 16):
        """``data`` has ``n_bytes``, ``read(start, stop)`` and ``sketch``."""
        super().__init__()
        if not 1 <= order < ngrams.REACH:
            raise BitbyteError(f"order is {order}; n-grams have orders 1 to {ngrams.REACH - 1}")
        self.name, self.order, self.rows = f"{order}-gram", order, rows
        self.counts_KRV = [
            count(data.read, data.n_bytes, k, rows, 1)[0] for k in [*range(1, order + 1), 0]
        ]
        self.totals_KR = [c.sum(1, dtype=np.int64) for c in self.counts_KRV]
        self.kinds_KR = [(c > 0).sum(1) for c in self.counts_KRV]
        self.sizes = {"tables of counts:": sum(c.nbytes for c in self.counts_KRV)}
        self.seen = {"train": "", "sketch": data.sketch}
        self.facts = {"counted bytes": f"{data.n_bytes:,}"}

    def _mixed(self, ids_BT: np.ndarray, take: Callable) -> np.ndarray:
        """Interpolated probabilities, of whatever ``take(counts, rows)`` picks of each row."""
        rows_BTK, known_BTK = (
            v.numpy() for v in context_rows(torch.from_numpy(ids_BT), self.order, self.rows)
        )
        p = None
        for k, counts_RV in enumerate(self.counts_KRV):
            rows, known = rows_BTK[:, :-1, k], known_BTK[:, :-1, k]
            seen = take(counts_RV, rows)
            if p is None:
                p = np.full(seen.shape, 1 / N_BYTES)
            shape = rows.shape + (1,) * (seen.ndim - rows.ndim)
            total, kinds = self.totals_KR[k][rows], self.kinds_KR[k][rows]
            mixed = (seen + kinds.reshape(shape) * p) / np.maximum(total + kinds, 1).reshape(shape)
            p = np.where((known & (total > 0)).reshape(shape), mixed, p)
        return p

    def logprobs(self, ids_BT: np.ndarray) -> np.ndarray:
        first = np.full((len(ids_BT), 1, N_BYTES), 1 / N_BYTES)
        p = self._mixed(ids_BT, lambda counts_RV, rows: counts_RV[rows])
        return np.log(np.concatenate((first, p), 1))

    def nats(self, ids_BT: np.ndarray, n: int) -> np.ndarray:
        after = ids_BT[:, 1:]
        p = self._mixed(ids_BT, lambda counts_RV, rows: counts_RV[rows, after])
        first = np.full((len(ids_BT), 1), 1 / N_BYTES)
        return -np.log(np.concatenate((first, p), 1))[:, -n:]


@contextlib.contextmanager
def _theirs(where: str) -> Iterator[None]:
    """Make one line of what the user's code raises."""
    try:
        yield
    except (BitbyteError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise BitbyteError(shown(f"{where}: {type(error).__name__}: {error}")) from error


class Function(Subject):
    """A Python object with ``logprobs(ids)``, where ids is an int64 array of T ids.

    It returns natural logarithms: (T, V), the distribution of each id from the ids before it, or
    (T,), only what each given id has.  It may also have: ``encode(bytes) -> ids`` and
    ``decode(ids) -> bytes``; ``window``; ``n_ids`` (V, by default 256); ``step(ids) -> (V,)``, the
    distribution after these ids, from its own cache; ``evaluate(bytes) -> (bits, bytes)``, its own
    evaluation of the whole file, which then must agree; ``name``; ``train``, a path to its
    training data.
    """

    source = "object"
    first = "as the object has it: logprobs(ids)[0] is from nothing"
    batch_size = 1

    def __init__(self, thing, name: str = ""):
        super().__init__()
        if not callable(getattr(thing, "logprobs", None)):
            raise BitbyteError(f"{name or thing!r} has no function logprobs(ids)")
        self.thing = thing
        with _theirs(name or type(thing).__name__):
            self.name = str(getattr(thing, "name", "") or name or type(thing).__name__)
            self.n_ids = int(getattr(thing, "n_ids", N_BYTES))
            self.window = int(getattr(thing, "window", 256))
            self.longest = self.window if hasattr(thing, "window") else None
            self.full = np.ndim(thing.logprobs(np.zeros(2, np.int64))) == 2
            parameters = getattr(thing, "parameters", None)
            if parameters is not None and not callable(parameters):  # a torch module has a function
                self.parameters = int(parameters)

    def encode(self, piece: bytes) -> np.ndarray:
        if not hasattr(self.thing, "encode"):
            return super().encode(piece)
        try:
            return np.asarray(self.thing.encode(piece))
        except UnicodeDecodeError as error:
            raise NotGivenBackError(error.start, f"it takes UTF-8 text only: {error}") from None

    def decode(self, ids: np.ndarray) -> bytes:
        if not hasattr(self.thing, "decode"):
            return super().decode(ids)
        return bytes(self.thing.decode(ids))

    def _rows(self, ids_BT: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(self.thing.logprobs(ids.copy())) for ids in ids_BT])

    def logprobs(self, ids_BT: np.ndarray) -> np.ndarray:
        return self._rows(ids_BT)

    def nats(self, ids_BT: np.ndarray, n: int) -> np.ndarray:
        rows = self._rows(ids_BT)
        if self.full:
            if rows.shape[:2] != ids_BT.shape:
                return -rows[..., 0]  # of another number of ids, which is found and named
            rows = np.take_along_axis(rows, ids_BT[..., None], -1)[..., 0]
        return -rows[:, -n:].astype(np.float64)

    def steps(self, ids_T: np.ndarray) -> np.ndarray | None:
        if not hasattr(self.thing, "step"):
            return None
        return np.stack([np.asarray(self.thing.step(ids_T[:t].copy())) for t in range(len(ids_T))])

    def claimed(self, read, n_bytes: int) -> tuple[float, int] | None:
        if not hasattr(self.thing, "evaluate"):
            return None
        bits, n = self.thing.evaluate(read(0, n_bytes).tobytes())
        return float(bits), int(n)


def load_object(text: str):
    """The object that ``file.py:name`` or ``package.module:name`` names.  Runs that code.

    A class, or a function without arguments, is called.
    """
    where, _, name = text.rpartition(":")
    with _theirs(text):
        if where.endswith(".py"):
            path = Path(where)
            if not path.is_file():
                raise BitbyteError(f"there is no file {shown(where)}")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(path.stem, module)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        if not hasattr(module, name):
            raise BitbyteError(f"{shown(where)} has nothing called {name}")
        thing = getattr(module, name)
        return thing if hasattr(thing, "logprobs") and not isinstance(thing, type) else thing()
