"""What the user names, as a subject or a compressor."""

import re
from pathlib import Path

from bitbyte import checkpoint, runs
from bitbyte.evaluate.subject import Subject
from bitbyte.files import BitbyteError, shown, user_path
from bitbyte.passport import coders, subjects
from bitbyte.passport.coders import Coder
from bitbyte.shards import open_dataset


def open_subject(
    text: str, *, device=None, trained_on: str | Path | None = None, prefix: int | None = None,
    network: bool = False, trust: bool = False, threads: int | None = None,
) -> Subject | Coder:  # fmt: skip
    """The model or compressor called ``text``.  Raises BitbyteError.

    ``trained_on`` is data that n-grams are counted in; ``prefix`` the id before each window of a
    model of another engine; ``network`` lets transformers fetch a model by its name on the Hub,
    ``trust`` run the code of a folder.
    """
    path = user_path(text)
    if text in coders.NAMES and not path.exists():
        return coders.by_name(text)
    if text == "uniform":
        return subjects.Uniform()
    if found := re.fullmatch(r"ngram(?::(\d+))?", text):
        if trained_on is None:
            raise BitbyteError("n-grams are counted in training data: name it with --trained_on")
        data = open_dataset(trained_on, 1, split="train")
        return subjects.NGram(data, int(found[1] or 5))
    if path.suffix == ".gguf":
        from bitbyte.interop import gguf

        return gguf.Gguf(path, prefix=prefix, threads=threads)
    if (path / "config.json").is_file() or (network and not path.exists() and "/" in text):
        from bitbyte.interop import hf

        return hf.HuggingFace(text if network and not path.exists() else path, device=device,
                              prefix=prefix, network=network, trust=trust)  # fmt: skip
    if re.fullmatch(r".+:[A-Za-z_]\w*", text) and (
        text.rpartition(":")[0].endswith(".py") or not Path(text).exists()
    ):
        return subjects.Function(subjects.load_object(text), shown(text))
    step = _step(text)
    model, meta = checkpoint.load_model(step, **({} if device is None else {"device": device}))
    subject = subjects.OfModel(model, runs.model_name(step), meta)
    subject.sizes["on the disk:"] = _size(step)
    return subject


def _step(text: str) -> Path:
    try:
        return runs.resolve(text)
    except BitbyteError as error:
        if user_path(text).is_dir():
            raise BitbyteError(
                f"{shown(text)} is neither a run nor a folder of transformers (no config.json)"
            ) from None
        raise BitbyteError(
            f"{error}; or name a folder of transformers, a .gguf file, ngram, file.py:object, or "
            f"one of {', '.join(coders.NAMES)}"
        ) from None


def _size(path: Path) -> int:
    """Bytes of a packed model, or of a checkpoint's weights."""
    weights = path / "model.safetensors"
    return (weights if weights.is_file() else path).stat().st_size
