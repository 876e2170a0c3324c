"""Do the notebooks say the same wherever they run?  Compare their stored outputs round by round.

    python tests/tools/notebook_rounds.py [ROUND ...]

In each round one thing differs that no compared output may depend on: what else is installed, the
instructions of the CPU, the number of threads, the language, the time zone, the width of the
terminal.  Rounds that could change what is trained train anew (minutes); the others share one
artifacts folder.  `make test` compares once, in the round "elsewhere".  Exit code 0 if all agree.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HIDDEN = {"PYTHONPATH": str(ROOT / "tests" / "tools" / "elsewhere")}
# Not what the notebooks themselves need: the extras workbench, test and papers.
OPTIONAL = (
    "zpaq xelatex poppler pdftotext nvcc brotli constriction pyppmd zstandard numba datasets voila "
    "transformers mambapy bitsandbytes tensorboard wandb mamba_ssm triton llvmlite"
)
FAR = {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "LANGUAGE": "ne"}
ROUNDS = {  # name -> (environment, whether it trains its own models)
    "plain": ({}, False),
    "bare": (HIDDEN | {"BITBYTE_WITHOUT": OPTIONAL}, False),
    "full": ({}, False),  # and what `furnish` makes
    "ascii": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, False),
    "kathmandu": ({"TZ": "Asia/Kathmandu"}, False),
    "narrow": ({"COLUMNS": "40", "LINES": "5"}, False),
    "elsewhere": (FAR | HIDDEN | {"BITBYTE_WITHOUT": OPTIONAL}, False),
    "avx2": ({"ATEN_CPU_CAPABILITY": "avx2"}, True),
    "scalar": ({"ATEN_CPU_CAPABILITY": "default"}, True),
    "threads": ({"OMP_NUM_THREADS": "2"}, True),
}
ZPAQ = """#!/bin/sh
case $1 in add) cp "$3" "$2" ;; extract) cp data.zpaq data ;; esac
"""


def furnish(folder: Path) -> dict[str, str]:
    """Environment with stand-ins for programs and packages that somebody may have."""
    for name, text in (("zpaq", ZPAQ), ("xelatex", "#!/bin/sh\nexit 1\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name in ("transformers", "mambapy", "bitsandbytes", "wandb"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('__version__ = "99.0"\n')
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder)}


def compare(artifacts: Path, changes: dict[str, str], log: Path) -> int:
    """Exit code of nbval over all notebooks; what it says goes to ``log``."""
    if not artifacts.exists():  # nothing but what is committed
        for name in ("results", "plots"):
            shutil.copytree(ROOT / "artifacts" / name, artifacts / name)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | changes
    command = [
        sys.executable, "-m", "pytest", "-q", "notebooks", "--nbval", "--nbval-current-env",
        "--nbval-sanitize-with=tests/nbval_sanitize.cfg", "--nbval-cell-timeout=600",
    ]  # fmt: skip
    environment |= {"BITBYTE_ARTIFACTS": str(artifacts), "BITBYTE_PROGRESS": "0"}
    modules = (changes.get("PYTHONPATH"), str(ROOT), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, modules))
    with open(log, "wb") as file:
        return subprocess.call(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", nargs="*", metavar="ROUND", help=", ".join(ROUNDS))
    parser.add_argument("--work", type=Path, help="folder to keep artifacts and logs in")
    choices = parser.parse_args()
    names = choices.rounds or list(ROUNDS)
    if unknown := set(names) - ROUNDS.keys():
        parser.error(f"no round {', '.join(unknown)}; choose from {', '.join(ROUNDS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the comparison ends too
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        work = (choices.work or Path(folder)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        for name in names:
            changes, trains = ROUNDS[name]
            if name == "full":
                (Path(folder) / "full").mkdir()
                changes = furnish(Path(folder) / "full")
            begin, log = time.monotonic(), work / f"{name}.log"
            code = compare(work / (name if trains else "shared"), changes, log)
            said = log.read_text("utf-8", "replace").rstrip().splitlines()
            print(f"{name}: {said[-1] if said else code}  ({time.monotonic() - begin:.0f} s)")
            if code:
                failed.append(name)
                print("\n".join(said))
            sys.stdout.flush()
    print(f"{len(names) - len(failed)} of {len(names)} rounds agree with the stored outputs")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
