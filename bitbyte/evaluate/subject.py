"""A model of any kind as the passport sees it: a distribution over the next id.

An id is a byte or a token.  A subject turns bytes into ids and back, and gives the probability of
each id from those before it in its window.  `interop` has subjects of other engines.

Shapes: B windows of T ids, n scored ids, V ids that the model can predict.
"""

import numpy as np

from bitbyte.evaluate.leaks import Limits
from bitbyte.files import BitbyteError
from bitbyte.vocab import N_BYTES

EXACT_SUMS = Limits(1e-3, 1e-3, 1e-2)  # other shapes, float32, no rounding to integers within
WINDOW = 1024  # ids, for models without a limit of their own


class NotGivenBackError(BitbyteError):
    """Bytes that a tokenizer loses.  ``at``: the first of them, counted in the piece."""

    def __init__(self, at: int, text: str):
        super().__init__(text)
        self.at = at


class Subject:
    """The base: ids are bytes, and a distribution is all that must be added (`logprobs`)."""

    name = "model"
    source = "object"  # run, huggingface, gguf, ngram, object or uniform
    kind = "exact"  # see `scoring`
    n_ids = N_BYTES  # V
    window = WINDOW  # ids scored at once by default
    longest: int | None = None  # ids of the longest window; None: any number
    first = (
        "a start symbol precedes every window"  # what the first id of a window is predicted from
    )
    overlaps = False  # whether later windows need an id of context, having no start symbol
    full = True  # whether `logprobs` exists; else only the costs of given ids are known
    limits = EXACT_SUMS  # allowed differences between shapes of a batch
    sample = 256  # ids of the windows that are audited, at most
    batch_size = 8
    parameters: int | None = None
    seen: dict | None = None  # what it was trained on, as in a checkpoint; None: unknown
    draws: dict | None = None  # of a bound: number and seed

    def __init__(self):
        self.sizes: dict[str, int] = {}  # bytes of what a receiver needs, by what it is
        self.facts: dict[str, str] = {}  # for the card

    def encode(self, piece: bytes) -> np.ndarray:
        """ids (int64) of a piece of a file.  Raises NotGivenBackError."""
        return np.frombuffer(piece, np.uint8).astype(np.int64)

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes that these ids, and no others around them, stand for."""
        return ids.astype(np.uint8).tobytes()

    def logprobs(self, ids_BT: np.ndarray) -> np.ndarray:
        """ln p(v | ids before t) (B, T, V), float32 or more.

        A model without a start symbol gives the first id of a window 1 / V.
        """
        raise NotImplementedError

    def nats(self, ids_BT: np.ndarray, n: int) -> np.ndarray:
        """Costs (B, n) of the last n ids of each window: what is added up and reported."""
        chosen = np.take_along_axis(self.logprobs(ids_BT), ids_BT[..., None], -1)[..., 0]
        return -chosen[:, -n:].astype(np.float64)

    def steps(self, ids_T: np.ndarray) -> np.ndarray | None:
        """`logprobs` (T, V) of one window, fed id by id to a cache; None if it has none."""
        return None

    def claimed(self, read, n_bytes: int) -> tuple[float, int] | None:
        """(bits, bytes) that the model's own evaluation reports; None if it has no evaluation.

        ``read(start, stop)`` gives bytes of the file, which has ``n_bytes``.
        """
        return None
