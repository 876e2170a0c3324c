"""Grids: many trainings, or many runs of one notebook, in a folder that any machines may share.

A grid file, in YAML or JSON, says what to do with the cross product of some parameters::

    command: train              # or  notebook: 05_evaluate_bpb
    fixed: {data: enwik8, steps: 200}
    grid: {family: [ar, mamba], seed: [0, 1]}
    eval: {limit: 200000}       # options of `bitbyte eval`; only with train

One combination is a *cell*, known by a hash of what it is: options that change the result, data,
evaluation, version of bitbyte (a notebook: its source and parameters).  Its folder is
FOLDER/cells/KEY: `claims` says how workers share it, `cells` does the work, and `engines` starts
workers.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from bitbyte import __version__, scoring
from bitbyte.config import ModelConfig, TrainConfig, fits
from bitbyte.data.readers import find_data
from bitbyte.device import DTYPES
from bitbyte.evaluate.records import check_record
from bitbyte.files import (
    BitbyteError,
    artifacts,
    output_folder,
    parse_json,
    read_input,
    read_json,
    shown,
    to_json,
    user_path,
    write_atomic,
    wrong_fields,
)
from bitbyte.shards import open_dataset
from bitbyte.workbench.notebooks import assign, find_notebooks, load_notebook, resolve
from bitbyte.workbench.recipes import identity

FORMAT = "grid 1"
CELL = "cell 1"  # format of the record.json of a notebook's cell
MOST_CELLS = 10_000
ITS_OWN = ("out", "resume", "allow_overwrite", "stop_after", "progress", "tracker")
EVAL = {  # options of `bitbyte eval` that a grid may set
    "data": (str,), "split": (str,), "window": (int,), "stride": (int,), "limit": (int,),
    "batch_size": (int,), "kind": (str,), "draws": (int,), "seed": (int,), "dtype": (str,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of a grid's parameters."""

    key: str  # hash of what it is
    label: str  # what distinguishes it, but for the seed: its model's name in tables
    parameters: dict  # its values of the grid's axes
    fields: dict  # options of `train` as given, or the notebook's parameters
    eval: dict  # options of the evaluation
    folder: Path  # its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid in its folder."""

    folder: Path
    name: str
    notebook: str | None  # path; None: its cells are trainings
    source: str  # SHA-256 of the notebook
    cells: list[Cell]

    @property
    def snapshot(self) -> Path:
        """The file in the folder that holds this grid; what its workers read."""
        keys = hashlib.sha256("".join(cell.key for cell in self.cells).encode()).hexdigest()
        return self.folder / f"grid-{keys[:10]}.json"


# --- the grid file


def read_grid(path: str | Path, out: str | Path | None = None) -> Grid:
    """The grid of a grid file, or the newest one of a grid folder.

    ``out`` is its folder, by default artifacts/grids/NAME.  Everything is checked: every cell's
    options, its data, names of parameters.  Raises BitbyteError.
    """
    path = user_path(path)
    if path.is_dir():
        found = sorted(path.glob("grid-*.json"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise BitbyteError(f"{shown(path)} is not the folder of a grid; name a grid file")
        if out is not None:
            raise BitbyteError("a grid's folder is where it is; drop --out, or name the grid file")
        return read_snapshot(found[-1])
    spec = _parse(path)
    name = path.stem
    folder = (artifacts("grids", name) if out is None else user_path(out)).absolute()
    fixed, axes = spec.get("fixed") or {}, spec.get("grid") or {}
    sizes = [len(values) for values in axes.values()]
    if (total := _product(sizes)) > MOST_CELLS:
        raise BitbyteError(f"{shown(path)}: {total:,} cells are more than {MOST_CELLS:,}")
    combinations = [
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    ]
    notebook, source, plans = None, "", []
    if "notebook" in spec:
        notebook, source, plans = _notebook_cells(spec["notebook"], fixed, combinations)
    else:
        known = cache(_data)  # hash every file once
        for chosen in combinations:
            with _naming(path, chosen):
                plans.append(_train_cell(fixed | chosen, spec.get("eval") or {}, known))
    cells = []
    for chosen, (key, fields, evaluation) in zip(combinations, plans, strict=True):
        label = _label(chosen, fields, notebook)
        cells.append(Cell(
            key=key, label=label, parameters=chosen, fields=fields, eval=evaluation,
            folder=folder / "cells" / key,
        ))  # fmt: skip
    for cell, other in _twins(cells):
        differ = [name for name in axes if cell.parameters[name] != other.parameters[name]]
        why = "look for repeated values"
        if differ:
            why = f"their result does not depend on {', '.join(differ)}"
        raise BitbyteError(f"{shown(path)}: two cells are the same; {why}")
    return Grid(folder=folder, name=name, notebook=notebook, source=source, cells=cells)


def _twins(cells: list[Cell]) -> Iterator[tuple[Cell, Cell]]:
    known: dict[str, Cell] = {}
    for cell in cells:
        if cell.key in known:
            yield known[cell.key], cell
        known[cell.key] = cell


def save_grid(grid: Grid) -> Path:
    """Write the grid into its folder, where workers find it; the path."""
    output_folder(grid.folder / "cells")
    cells = []
    for cell in grid.cells:
        plain = {f.name: getattr(cell, f.name) for f in dataclasses.fields(cell)}
        cells.append({name: value for name, value in plain.items() if name != "folder"})
    write_atomic(grid.snapshot, to_json({
        "format": FORMAT, "name": grid.name, "notebook": grid.notebook, "source": grid.source,
        "cells": cells,
    }))  # fmt: skip
    return grid.snapshot


def read_snapshot(path: Path) -> Grid:
    """The grid that `save_grid` wrote.  Raises BitbyteError."""
    value = read_json(path, plain=True)
    fields = {
        "format": (str,), "name": (str,), "notebook": (str, type(None)), "source": (str,),
        "cells": (list,),
    }  # fmt: skip
    wrong = wrong_fields(value, fields)
    if not wrong and value["format"] != FORMAT:
        wrong = f"format {value['format']!r}"
    of_cell = {"key": (str,), "label": (str,), "parameters": (dict,), "fields": (dict,),
               "eval": (dict,)}  # fmt: skip
    for cell in [] if wrong else value["cells"]:
        wrong = wrong or wrong_fields(cell, of_cell)
        if not wrong and not (cell["key"].isalnum() and cell["key"].isascii()):
            wrong = f"a cell called {cell['key']!r}"
    if wrong:
        raise BitbyteError(f"{shown(path)} was not written by bitbyte grid: {wrong}")
    folder = path.absolute().parent
    cells = [Cell(**cell, folder=folder / "cells" / cell["key"]) for cell in value["cells"]]
    return Grid(
        folder=folder, name=value["name"], notebook=value["notebook"], source=value["source"],
        cells=cells,
    )  # fmt: skip


def _parse(path: Path) -> dict:
    """The checked content of a grid file.  Raises BitbyteError."""
    data, name = read_input(path), shown(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError:
            raise BitbyteError(
                f"{name}: PyYAML is missing: pip install pyyaml, or write the grid as JSON"
            ) from None
        try:
            spec = yaml.safe_load(data)
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise BitbyteError(f"{name}: not valid YAML ({text})") from None
    else:
        spec = parse_json(data, name)
    fields = {"command": (str,), "notebook": (str,), "fixed": (dict, type(None)),
              "grid": (dict, type(None)), "eval": (dict, type(None))}  # fmt: skip
    wrong = wrong_fields(spec, fields, optional={*fields})
    if not wrong and ("command" in spec) == ("notebook" in spec):
        wrong = "it needs command: train, or notebook: NAME"
    if not wrong and spec.get("command", "train") != "train":
        wrong = f"no command {spec['command']!r}; it can be train"
    if not wrong and "notebook" in spec and "eval" in spec:
        wrong = "eval belongs to command: train"
    fixed, axes = (spec.get("fixed") or {}, spec.get("grid") or {}) if not wrong else ({}, {})
    for axis, values in axes.items():
        if not isinstance(values, list) or not values:
            wrong = wrong or f"{axis} in grid is not a list of values"
        if axis in fixed:
            wrong = wrong or f"{axis} is in fixed and in grid"
    if not all(isinstance(key, str) for key in [*fixed, *axes]):
        wrong = wrong or "a name that is not text"
    if wrong:
        raise BitbyteError(f"{name} is not a grid: {wrong}")
    return spec


@contextlib.contextmanager
def _naming(path: Path, chosen: dict) -> Iterator[None]:
    """Let errors name the grid file and the cell."""
    try:
        yield
    except BitbyteError as error:
        where = ", ".join(f"{name} {value}" for name, value in chosen.items())
        raise BitbyteError(f"{shown(path)}{where and f', cell {where}'}: {error}") from None


def train_config(fields: dict) -> TrainConfig:
    """A cell's config.  Raises BitbyteError on unknown, mistyped and inconsistent options."""
    known = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    given = {}
    for name, value in fields.items():
        if name in ITS_OWN:
            raise BitbyteError(f"{name} is for the grid to choose; drop it")
        if name not in known:
            raise BitbyteError(f"train has no option {name}; bitbyte train --help lists them")
        given[name] = tuple(value) if isinstance(value, list) else value
        if isinstance(value, str) and float in (known[name], *typing.get_args(known[name])):
            with contextlib.suppress(ValueError):
                given[name] = float(value)  # YAML takes 1e-3 for text
        if not fits(given[name], known[name]):
            raise BitbyteError(f"{name} is {value!r}, which is not of its type")
    return TrainConfig(**{"keep_last": 1} | given, progress=False)


def _train_cell(fields: dict, evaluation: dict, known: Callable) -> tuple[str, dict, dict]:
    """(key, options, evaluation) of a training, with absolute paths; ``known`` is `_data`."""
    wrong = wrong_fields(evaluation, EVAL, optional={*EVAL})
    if wrong:
        raise BitbyteError(f"eval: {wrong}; it takes {', '.join(EVAL)}")
    if not isinstance(fields.get("data"), str):
        raise BitbyteError("no training data: set data, under fixed")
    fields, evaluation = dict(fields), dict(evaluation)
    for options, name in ((fields, "data"), (fields, "val_data"), (evaluation, "data")):
        if isinstance(options.get(name), str):
            options[name] = str(find_data(options[name]).absolute())
    evaluation.setdefault("data", fields.get("val_data") or fields["data"])
    config = train_config(fields)
    _check_evaluation(evaluation, config.model_config())
    n_bytes, data = known(fields["data"], "train")
    what = identity(config.with_prior(n_bytes), data)
    scored = known(evaluation["data"], evaluation.get("split", "val"))[1]
    measured = {name: value for name, value in evaluation.items() if name != "data"}
    return _key(["train", what, scored, measured]), fields, evaluation


def _check_evaluation(given: dict, config: ModelConfig) -> None:
    """Refuse before a training what `evaluate` would refuse after it."""
    for name in ("limit", "batch_size", "draws"):
        if given.get(name, 1) < 1:
            raise BitbyteError(f"eval: {name} is {given[name]}; it must be at least 1")
    if not 0 <= given.get("seed", 0) < 2**63:
        raise BitbyteError(f"eval: seed is {given['seed']}; it must be from 0 to 2^63 - 1")
    if given.get("dtype", "fp32") not in DTYPES:
        raise BitbyteError(f"eval: no dtype {given['dtype']!r}; choose from {', '.join(DTYPES)}")
    exact, block = config.family != "diffusion", getattr(config, "block", 0)
    model = SimpleNamespace(config=config, exact=exact, block=block)  # as far as `scoring` looks
    scoring.kind_of(model, given.get("kind"))
    scoring.window_and_stride(model, given.get("window"), given.get("stride"))


def _data(path: str, split: str) -> tuple[int, str]:
    """(bytes, fingerprint) of data."""
    data = open_dataset(path, 1, split=split)
    return data.n_bytes, data.fingerprint


def _notebook_cells(
    name: str, fixed: dict, combinations: list[dict]
) -> tuple[str, str, list[tuple[str, dict, dict]]]:
    """(path, SHA-256, cells) of a notebook; its parameters get the types that it declares."""
    near = [found for found in find_notebooks() if found.stem == name] if "." not in name else []
    path = (near or find_notebooks([name]))[0]
    book = load_notebook(path)
    source, plans = hashlib.sha256(book.data).hexdigest(), []
    for chosen in combinations:
        text = {key: str(value) for key, value in (fixed | chosen).items()}
        (values,) = assign([book], resolve([book], text))
        plans.append((_key(["notebook", source, values]), values, {}))
    return str(book.path), source, plans


def _key(what: list) -> str:
    text = json.dumps([FORMAT, __version__, *what], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _label(chosen: dict, fields: dict, notebook: str | None) -> str:
    """The values of the axes but the seed's, as words; numbers with their names."""
    words = [
        str(value) if isinstance(value, str) else f"{name}={value}"
        for name, value in chosen.items()
        if name != "seed"
    ]
    if not words and notebook is None:
        defaults = TrainConfig()
        words = [fields.get(n) or getattr(defaults, n) for n in ("family", "preset", "linear")]
    return "-".join(words) or Path(notebook or "").stem


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def records_of(folder: str | Path) -> list[dict]:
    """The evaluations in a grid's folder: of its trainings, and those its notebooks wrote."""
    folder, found = user_path(folder), []
    for path in sorted(
        [*folder.glob("cells/*/record.json"), *folder.glob("cells/*/results/*.json")]
    ):
        value = read_json(path, plain=True)
        if check_record(value, str(path)) == "evaluation":
            found.append(value)
    return found


def is_grid(folder: Path) -> bool:
    """Whether a folder is that of a grid."""
    return folder.is_dir() and (folder / "cells").is_dir() and any(folder.glob("grid-*.json"))
