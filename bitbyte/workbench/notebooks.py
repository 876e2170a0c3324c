"""Notebooks as files: find them, read their declared parameters, write their reference outputs.

A whole run is executed by `runner`.  Reference outputs are those a notebook is committed with:
readers see results, and nbval compares them.  They contain nothing that changes from run to run,
so writing them twice gives the same bytes.  Executing a notebook means trusting it.
"""

import ast
import contextlib
import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bitbyte.files import BitbyteError, RunError, artifacts, parse_json, user_path, write_atomic
from bitbyte.vocab import printable

KERNELSPEC = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
# Without this every kernel warns that it uses local TCP, and an interrupted one, at length, that
# its sockets are closed.
KERNEL_ARGUMENTS = ["--log-level=CRITICAL"]
COPIED = ".copied.json"  # beside working copies: the hash of each as it was made
MESSAGE = 300  # characters of the first and of the last line of an error
STORED = {"text/plain", "text/html", "text/markdown", "text/latex", "image/png"}


@dataclass(frozen=True, kw_only=True)
class Notebook:
    """One source notebook and what its parameters cell declares."""

    path: Path  # absolute
    data: bytes  # the file
    node: object  # nbformat's NotebookNode, version 4
    parameters: dict  # name -> {inferred_type_name, default, help}, all text
    n_cells: int  # code cells


def need_workbench(*modules: str) -> None:
    """Raise BitbyteError, naming the extra, if one of these modules is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise BitbyteError(f'{module} is missing: pip install "bitbyte[workbench]"')


def notebook_folders() -> list[Path]:
    """The folders called ``notebooks``, here and in the parents, nearest first."""
    here = Path.cwd()
    folders = (folder / "notebooks" for folder in (here, *here.parents))
    return [folder for folder in folders if folder.is_dir()]


def originals() -> Path:
    """The nearest folder ``notebooks`` that is not of working copies, or that beside the artifacts.

    Raises BitbyteError if there is none.
    """
    places = [*notebook_folders(), artifacts().absolute().parent / "notebooks"]
    copies = artifacts("notebooks").resolve()
    for folder in places:
        if folder.is_dir() and folder.resolve() != copies:
            return folder
    raise BitbyteError(
        "there is no folder notebooks, here or in a parent; run this in a checkout of bitbyte"
    )


def find_notebooks(chosen: str | Path | Iterable[str | Path] | None = None) -> list[Path]:
    """Absolute paths in running order: of the given files, folders and numbers ("02"), else all.

    Numbers, and "all", refer to the nearest folder ``notebooks``, here or in a parent.  In a
    folder only names that start with two digits count.  Raises BitbyteError.
    """
    home = next(iter(notebook_folders()), Path.cwd() / "notebooks")
    paths = []
    chosen = home if chosen is None else chosen
    for item in [chosen] if isinstance(chosen, str | Path) else chosen:
        path = user_path(item).absolute()
        found = sorted(path.glob("[0-9][0-9]_*.ipynb")) if path.is_dir() else [path]
        if re.fullmatch("[0-9][0-9]", str(item)):
            found = sorted(home.glob(f"{item}_*.ipynb"))
        if not found or not found[0].is_file():
            raise BitbyteError(f"{item}: no notebook found; name a .ipynb file or a folder of them")
        paths += found
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise BitbyteError("two notebooks have the same name; a run keeps only one copy of each")
    return sorted(paths, key=lambda path: path.name)


def working_copies(source: Path, target: Path) -> list[str]:
    """Copy the notebooks of one folder into another, for playing; returns names that were kept.

    A copy that was edited is kept, also if its original has changed since; others are renewed.
    Links to files outside the folder still lead there.
    """
    target.mkdir(parents=True, exist_ok=True)
    noted = target / COPIED
    hashes = parse_json(noted.read_bytes(), str(noted)) if noted.is_file() else {}
    try:
        up = os.path.relpath(source.parent, target).replace(os.sep, "/")
    except ValueError:  # on another drive of Windows
        up = source.parent.absolute().as_uri()
    kept = []
    for path in sorted(source.glob("*.ipynb")):
        text = path.read_text("utf-8").replace("](../", f"]({up}/").encode()
        copy, digest = target / path.name, hashlib.sha256(text).hexdigest()
        if copy.exists() and hashlib.sha256(copy.read_bytes()).hexdigest() != hashes.get(path.name):
            if hashes.get(path.name) != digest:
                kept.append(path.name)
            continue
        write_atomic(copy, text)
        hashes[path.name] = digest
    write_atomic(noted, json.dumps(hashes, indent=1).encode())
    return kept


def load_notebook(path: Path) -> Notebook:
    """Read a notebook and its declared parameters.  Raises BitbyteError, OSError."""
    need_workbench("papermill")
    import nbformat
    import papermill

    data = path.read_bytes()
    try:
        node = nbformat.reads(data.decode(), 4)
        code = [cell for cell in node.cells if cell.cell_type == "code"]
        tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
        language = _language(node.metadata)
    except Exception as error:
        raise BitbyteError(f"{path}: not a notebook ({_last_line(error)})") from None
    if len(tagged) > 1:
        raise BitbyteError(f"{path}: {len(tagged)} cells are tagged `parameters`; tag only one")
    if "py" not in language.lower():
        raise BitbyteError(f"{path} is a notebook for {language}; only Python can be run here")
    node.metadata.kernelspec = KERNELSPEC
    parameters = papermill.inspect_notebook(node) if tagged else {}
    # papermill reads line by line with a regex: a parameter that it misses could never be set.
    missed = _assigned(tagged[0].source, path) - set(parameters) if tagged else set()
    if missed:
        raise BitbyteError(
            f"{path}: papermill cannot read the parameter {', '.join(sorted(missed))}; write "
            "`name: type = value  # comment`, with no further = in the line"
        )
    return Notebook(path=path, data=data, node=node, parameters=parameters, n_cells=len(code))


def with_parameters(path: Path, **values) -> bytes:
    """The file of a notebook whose parameters are set to these values, as papermill does it."""
    need_workbench("nbformat", "papermill")
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    node = parameterize_notebook(load_notebook_node(str(path)), values)
    return nbformat.writes(node).encode()


def _language(metadata: dict) -> str:
    """The language a notebook says it is in, else its kernel; Python if it says nothing."""
    kernel, about = metadata.get("kernelspec") or {}, metadata.get("language_info") or {}
    return str(kernel.get("language") or about.get("name") or kernel.get("name") or "python")


def _assigned(source: str, path: Path) -> set[str]:
    """Names that the parameters cell binds at its top level."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise BitbyteError(f"{path}: its parameters cell is not Python ({error})") from None
    targets = []
    for node in tree.body:
        targets += node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _boolean(text: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
        text.lower()
    ]


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def typed(name: str, text: str, declared: dict, where: str):
    """``text`` as a value of a parameter, which ``declared`` (of papermill's inspector) describes.

    The annotation decides the type, or else the default; ``none`` is None where the default is
    None.  Raises BitbyteError.
    """
    kind, default = declared["inferred_type_name"], declared["default"]
    if default == "None" and text.lower() == "none":
        return None
    if kind == "None":  # papermill's word for "no annotation"
        with contextlib.suppress(ValueError, SyntaxError):
            kind = type(ast.literal_eval(default)).__name__
    convert = {"int": int, "float": _real, "bool": _boolean, "str": str, "NoneType": str}.get(kind)
    if convert is None:
        raise BitbyteError(f"--set {name}: {where} declares a {kind}, which text cannot set")
    try:
        return convert(text)
    except (ValueError, KeyError):
        raise BitbyteError(
            f"--set {name}={printable(text.encode())}: not a {kind}, as {where} declares it "
            f"(default {default})"
        ) from None


def assign(books: list[Notebook], settings: dict[str, str]) -> list[dict]:
    """The values each notebook gets: those of ``settings`` that its parameters cell declares.

    A setting that no notebook declares raises BitbyteError, which suggests similar names.
    """
    known = sorted({name for book in books for name in book.parameters})
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            hint = hint if known else "tag a code cell `parameters` in one"
            raise BitbyteError(f"--set {name}: no notebook has this parameter; {hint}")
    return [
        {
            name: typed(name, text, book.parameters[name], book.path.name)
            for name, text in settings.items()
            if name in book.parameters
        }
        for book in books
    ]


def names_path(books: list[Notebook], name: str) -> bool:
    """Whether a parameter is a path: in one of the notebooks its comment says so."""
    return any("path" in book.parameters.get(name, {"help": ""})["help"].lower() for book in books)


def resolve(books: list[Notebook], given: dict[str, str]) -> dict[str, str]:
    """Settings by their Python names, with absolute paths, as kernels run in another folder.

    Only those of `names_path` change; the default value, or a text that names no file here, stays
    as it is (a built-in corpus, say).  Raises BitbyteError.
    """
    settings = {name.replace("-", "_"): str(text) for name, text in given.items()}
    for name, text in settings.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BitbyteError(
                f"--set {name}: not UTF-8, which a notebook cannot hold; give a link to it"
            ) from None
        declared = [book.parameters[name] for book in books if name in book.parameters]
        is_default = any(entry["default"].strip("\"'") == text for entry in declared)
        if text and names_path(books, name) and not is_default and user_path(text).exists():
            settings[name] = str(user_path(text).absolute())
    return settings


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def failure(error: Exception, timeout: float) -> str:
    """One line on why a notebook failed: an error in a cell, a dead kernel, or a time-out."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    if isinstance(error, CellTimeoutError):
        return f"CellTimeoutError: not done after {timeout:g} seconds"
    if isinstance(error, DeadKernelError):
        return "DeadKernelError: the kernel died (out of memory, or killed)"
    if hasattr(error, "ename"):  # an error in a cell, as papermill and nbclient report it
        lines = re.sub(r"\x1b\[[0-9;]*m", "", error.evalue).splitlines()
        lines = [line.strip()[:MESSAGE] for line in lines if line.strip()]
        if not lines and error.ename == "CellExecutionError":  # papermill's, if none was sent
            lines = ["an error that the kernel could not send, as its text is not Unicode"]
        text = " ... ".join(lines if len(lines) < 3 else [lines[0], lines[-1]])
        return printable(": ".join(filter(None, [error.ename, text])).encode("utf-8", "replace"))
    return f"{type(error).__name__}: {_last_line(error)}"


@contextlib.contextmanager
def kernel_environment(**values: str | None):
    """Set environment variables for kernels started inside; None unsets one.

    MPLBACKEND is always unset, as a caller's ``Agg`` would hide every figure of the notebooks.
    """
    values["MPLBACKEND"] = None
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def write_references(notebooks=None, *, cell_timeout: int = 600) -> list[Path]:
    """Execute notebooks in place and store normalized outputs; returns the paths that changed.

    They run in order with one fresh artifacts folder, as under nbval.  If a notebook fails, its
    file is left unchanged and RunError is raised.
    """
    need_workbench("nbclient")
    import nbformat
    from nbclient import NotebookClient

    changed = []
    with (
        tempfile.TemporaryDirectory() as folder,
        kernel_environment(BITBYTE_ARTIFACTS=folder, BITBYTE_RUN=None),
    ):
        for path in find_notebooks(notebooks):
            book = load_notebook(path)
            started = []
            client = NotebookClient(
                book.node,
                timeout=cell_timeout,
                kernel_name="python3",
                resources={"metadata": {"path": str(path.parent)}},
                extra_arguments=KERNEL_ARGUMENTS,
                coalesce_streams=True,
                on_cell_execute=lambda cell, cell_index, seen=started: seen.append(cell_index),
            )
            try:
                client.execute()
            except Exception as error:
                where = f"{path.name}, code cell {len(started)} of {book.n_cells}"
                reason = failure(error, cell_timeout)
                raise RunError(f"{where}: {reason}; the file is left as it was") from error
            normalize(book.node)
            nbformat.validate(book.node)
            text = nbformat.writes(book.node).rstrip("\n") + "\n"
            data = text.encode("utf-8", "backslashreplace")  # as `files.to_json` does
            if data != book.data:
                write_atomic(path, data, follow=True)
                changed.append(path)
    return changed


def normalize(node) -> None:
    """Strip from an executed notebook, in place, whatever changes from run to run.

    Kept: source, ids, tags, counts 1..n, text, tables and PNG figures.  The source of a cell tagged
    ``checks``, which is for tests and not for readers, is folded in JupyterLab.  A cell tagged
    ``nbval-ignore-output`` keeps no output, unless it is tagged ``keep-output`` too: then readers
    see it but nbval does not compare it.  Nor would nbval compare a cell without a count.
    """
    node.metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    count = 0
    for cell in node.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        if "checks" in tags:
            cell.metadata["jupyter"] = {"source_hidden": True}
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        if "nbval-ignore-output" in tags and "keep-output" not in tags:
            cell.outputs = []
        for output in cell.outputs:
            if output.output_type == "error":
                output.traceback = []
            if output.output_type == "execute_result":
                output.execution_count = count
            if "data" in output:
                output.data = {kind: value for kind, value in output.data.items() if kind in STORED}
                output.metadata = {}
        cell.outputs = [output for output in cell.outputs if output.get("data", True)]


if __name__ == "__main__":
    try:
        for path in write_references():
            print(f"rewritten: {path}")
    except (BitbyteError, RunError) as error:
        sys.exit(f"error: {error}")
