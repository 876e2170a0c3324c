"""How a model was trained: the block ``training`` of a result record.

It says what was in effect (optimizer, rates, batch, schedule, steps, seed, n-gram tables), gives
the command that repeats the training, and holds the run's whole configuration, which
``bitbyte train --like RECORD`` copies.  Records are given away, so they hold no path of the machine
they were made on: of each path only the last part is kept.
"""

import dataclasses
import shlex
from pathlib import Path

from bitbyte.checkpoint import without_folders
from bitbyte.config import TrainConfig, resumed
from bitbyte.files import BitbyteError

# Where a run is written, and how one call of it starts and stops: not part of the training.
OF_ONE_RUN = {"out": None, "resume": False, "allow_overwrite": False, "stop_after": None}
# Also left out of the command, as no weight depends on them.
WITHOUT_EFFECT = {
    "progress", "tracker", "log_every", "eval_every", "save_every", "save_minutes", "save_best",
    "keep_last",
}  # fmt: skip
NEEDED = {"family", "preset", "data", "optimizer", "batch_size", "seed"}  # of a run's configuration


def training_of(meta: dict) -> dict | None:
    """The block ``training`` for a checkpoint's meta data; None if that does not say enough.

    A converted or imported model has no training configuration, for example.
    """
    stored, extra = meta.get("train") or {}, meta.get("extra") or {}
    if not stored.keys() >= NEEDED:
        return None
    try:
        # What "auto" meant on that machine is part of the training.
        stored = stored | ({"dtype": extra["dtype"]} if "dtype" in extra else {})
        stored = without_folders({k: v for k, v in stored.items() if k not in OF_ONE_RUN})
        config = config_of(stored, "the checkpoint")
        shape, (lr, embed_lr) = config.model_config(), config.rates()
    except BitbyteError:  # of a newer version: a score is worth a record all the same
        return None
    decay = 2 / 3 if config.linear == "ternary" else 1.0
    origin, world = extra.get("init"), extra.get("world", 1)
    return {
        "optimizer": config.optimizer,
        "lr": lr,
        "embed_lr": embed_lr,
        "weight_decay": config.weight_decay,
        "decay_until": decay if config.decay_until is None else config.decay_until,
        "schedule": config.schedule,
        "warmup": config.warmup,
        "clip": config.clip,
        "batch_size": config.batch_size,
        "grad_accum": config.grad_accum,
        "processes": world,
        "seq_len": shape.seq_len,
        "steps": meta["step"],
        "seed": config.seed,
        "dtype": config.dtype,
        "prior": None if shape.prior == "none" else {
            "tables": shape.prior, "lr": config.table_rate,
            **{n: getattr(shape, f"prior_{n}") for n in ("orders", "rows", "rank", "bits")},
        },
        "init": origin and without_folders(
            {name: origin[name] for name in ("run", "checkpoint", "bytes_seen") if name in origin}
        ),
        "command": command(config, meta["step"] if extra.get("finished") else None, world),
        # Whole, as a later version may have other defaults.
        "config": stored,
    }  # fmt: skip


def config_of(stored: dict, name: str | Path) -> TrainConfig:
    """The configuration of a new run like the one whose configuration was ``stored``.

    ``name``: where it was, for errors.  Raises BitbyteError.
    """
    begun = stored | OF_ONE_RUN | {"resume": True, "out": str(name)}
    config = resumed(TrainConfig(), begun, Path(name))
    # An earlier version let a run name kernels that it did not use; a new run may not.
    idle = {name: getattr(TrainConfig, name) for name in config.idle_kernels()}
    return dataclasses.replace(config, **OF_ONE_RUN | idle)


def command(config: TrainConfig, steps: int | None = None, processes: int = 1) -> str:
    """The command line that trains as ``config`` does; options at their default are left out.

    ``steps`` replaces a budget in minutes, which is another training on another machine.
    """
    if config.minutes and steps:
        config = config.replace(minutes=None, steps=steps)
    words = ["bitbyte", "train", config.family]
    if processes > 1:
        words[:1] = ["torchrun", f"--nproc_per_node={processes}", "-m", "bitbyte"]
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        if field.name in {"family", *OF_ONE_RUN, *WITHOUT_EFFECT} or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no_'}{field.name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name}", *map(str, values)]
    return shlex.join(words)
