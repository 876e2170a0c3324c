"""environment.yml, constraints.txt and pyproject.toml say one thing; the files users start from."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support import ROOT

EXTRAS = ("workbench", "test", "data", "fast", "app", "papers", "compress", "export", "eval")
IN_CI = ("slurm", "ray")  # .ci/run installs them too


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def wanted(*more: str) -> list[Requirement]:
    """Core requirements and those of the extras that `make` installs, and of ``more``."""
    project = pyproject()
    texts = project["dependencies"] + [
        text for extra in (*EXTRAS, *more) for text in project["optional-dependencies"][extra]
    ]
    return [Requirement(text) for text in texts]


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text("ascii").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def pins() -> dict[str, Version]:
    found = {}
    for requirement in constraints():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and not requirement.url and not requirement.extras
        found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


def test_conda_file_equals_pyproject():
    document = yaml.safe_load((ROOT / "environment.yml").read_text("ascii"))
    *conda, pip = document["dependencies"]
    assert conda == ["python=3.11", "pip"]
    options = [line for line in pip["pip"] if line.startswith("-")]
    assert options == ["-c constraints.txt", "-e ."]
    lines = [Requirement(line) for line in pip["pip"] if not line.startswith("-")]
    assert sorted(map(str, lines)) == sorted(set(map(str, wanted())))


def test_constraints_are_sorted_and_unique():
    names = [canonicalize_name(requirement.name) for requirement in constraints()]
    assert names == sorted(set(names))


def test_constraints_satisfy_the_ranges():
    fixed = pins()
    for requirement in wanted(*IN_CI):
        assert fixed[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert fixed["torch"] == Version("2.13.0")
    # Below these, opening a notebook can run its code (published advisories).
    assert fixed["jupyter-server"] >= Version("2.20")
    assert fixed["jupyterlab"] >= Version("4.6.2")


def test_constraints_name_everything_that_is_needed():
    """Direct and transitive, for the Python and the system that run this test."""
    fixed, missing, seen = pins(), set(), set()
    here = [extra for extra, package in zip(IN_CI, ("submitit", "ray"), strict=True)
            if importlib.util.find_spec(package)]  # fmt: skip
    todo = [(requirement, "") for requirement in wanted(*here)]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        if name not in fixed and not name.startswith(("nvidia-", "cuda-", "triton")):
            missing.add(name)
        for wanted_extra in ("", *requirement.extras):
            if (name, wanted_extra) in seen:
                continue
            seen.add((name, wanted_extra))
            more = importlib.metadata.requires(name) or []
            todo += [(Requirement(text), wanted_extra) for text in more]
    assert missing == set()


def test_platform_packages_have_markers():
    markers = {requirement.name: str(requirement.marker or "") for requirement in constraints()}
    for name, word in {"pexpect": "win32", "appnope": "darwin", "pywinpty": "win32"}.items():
        assert word in markers[name]


def test_metadata():
    project = pyproject()
    assert project["requires-python"] == ">=3.11"
    assert project["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text("ascii")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    core = {Requirement(text).name for text in project["dependencies"]}
    assert core == {"torch", "numpy", "safetensors", "tqdm", "tyro"}


def test_ci_script():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text("ascii")
    assert "set -eu" in text and "make check" in text and "make test" in text
    assert f"export MORE_EXTRAS=,{','.join(IN_CI)}\n" in text
    assert not re.search(r"https?://", text)
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", script], check=True)


def run_ci(folder, apt_get: str, uid: int = 0) -> tuple[subprocess.CompletedProcess, list[str]]:
    """What .ci/run says, and what it calls, where there are few programs and this apt-get."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("bash", "sh", "dirname"):
        (programs / name).symlink_to(shutil.which(name))
    stubs = {"apt-get": apt_get, "make": "", "chromium": "", "python3": "", "id": f"echo {uid}"}
    for name, body in stubs.items():
        call = f'#!/bin/sh\n[ {name} = id ] || echo {name} "$@" >>"$LOG"\n{body}\n'
        (programs / name).write_text(call)
        (programs / name).chmod(0o755)
    (folder / "log").touch()
    environment = {"PATH": str(programs), "LOG": str(folder / "log")}
    script = [programs / "bash", ROOT / ".ci" / "run"]
    done = subprocess.run(script, env=environment, check=False, capture_output=True, text=True)
    calls = (folder / "log").read_text().splitlines()
    return done, [call for call in calls if not call.startswith("python3")]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_ci_goes_on_without_what_it_cannot_install(tmp_path):
    for n, (apt_get, uid, said) in enumerate((
        ("exit 0", 0, ""),
        ('case "$*" in *slurm*) exit 100;; esac', 0, "could not install slurm-wlm munge: tests"),
        ("exit 100", 0, "could not install slurm-wlm munge: tests"),
        ("exit 0", 1000, "not here: slurm-wlm munge; tests that need them are skipped"),
    )):  # fmt: skip
        folder = tmp_path / str(n)
        folder.mkdir()
        done, calls = run_ci(folder, apt_get, uid)
        assert done.returncode == 0 and said in done.stderr, done.stderr
        assert calls[-2:] == ["make check", "make test"]
        assert bool(calls[:-2]) == (uid == 0)


def test_continuous_integration():
    """Its second job can only be run elsewhere: here, what it names exists and imports."""
    document = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("ascii"))
    everything, core = document["jobs"]["all"]["steps"], document["jobs"]["core"]
    assert {"run": ".ci/run"} in everything
    assert {"windows-latest", "macos-latest"} < set(core["strategy"]["matrix"]["os"])
    (script,) = [step["run"] for step in core["steps"] if step.get("shell") == "python"]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    (tests,) = [step["run"] for step in core["steps"] if "pytest -q" in step.get("run", "")]
    names = re.findall(r"tests/\S+", tests)
    assert names and all((ROOT / name).exists() for name in names)


def test_hooks_lint_with_the_pinned_ruff():
    text = (ROOT / ".pre-commit-config.yaml").read_text("ascii")
    repos = {repo["repo"]: repo for repo in yaml.safe_load(text)["repos"]}
    ruff = repos["https://github.com/astral-sh/ruff-pre-commit"]
    assert ruff["rev"] == f"v{pins()['ruff']}"


def test_types_are_shipped_and_what_is_imported_is_declared():
    document = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "py.typed" in document["tool"]["setuptools"]["package-data"]["bitbyte"]
    assert (ROOT / "bitbyte" / "py.typed").is_file()
    project = document["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    declared = {canonicalize_name(Requirement(t).name) for t in project["dependencies"] + extras}
    owners = importlib.metadata.packages_distributions()
    for path in (ROOT / "bitbyte").rglob("*.py"):
        for name in re.findall(r"^ +(?:import|from) (\w+)", path.read_text("utf-8"), re.M):
            by_hand = name in ("bitbyte", "llama_cpp")  # the latter is compiled
            if name not in sys.stdlib_module_names and name in owners and not by_hand:
                assert declared & set(map(canonicalize_name, owners[name])), (path.name, name)


# --- make, with a stand-in for the interpreter: nothing is installed

FAKE = r"""#!/bin/sh
line=$(for word in "$@"; do printf '<%s>' "$word"; done)
printf '%s\n' "$line" >> "$LOG"
case "$*" in
  *version_info*) exit {old} ;;
  *ensurepip*) exit {no_ensurepip} ;;
  *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"-m pip install"*) exit {pip} ;;
  *notebook_rounds.py*) exit {nbval} ;;
  *"-m pytest tests/browser"*) exit {browser} ;;
  *"-m pytest"*) exit {unit} ;;
  -V) echo Python 3.9.1 ;;
esac
exit 0
"""


@pytest.fixture
def project(tmp_path):
    """A folder with the real Makefile; calling it runs make on a recording fake interpreter."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    python = tmp_path / "fake python"
    log = tmp_path / "log"

    def make(*words, python_name=None, **codes):
        codes = dict.fromkeys(("old", "no_ensurepip", "pip", "nbval", "browser", "unit"), 0) | codes
        python.write_text(FAKE.format(**codes))
        python.chmod(0o755)
        if (folder / ".venv").exists():
            shutil.copy(python, folder / ".venv" / "bin" / "python")
        log.write_text("")
        done = subprocess.run(
            ["make", *words, f"PYTHON={python_name or python}"],
            check=False,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "LOG": str(log)},
            capture_output=True,
            text=True,
        )
        return done, log.read_text().splitlines()

    make.folder = folder
    return make


def test_make_installs_once(project):
    done, calls = project("install")
    assert done.returncode == 0, done.stderr
    assert sum("<venv>" in call for call in calls) == 1
    (install,) = [call for call in calls if "<install>" in call]
    assert install.endswith("<-c><constraints.txt><-e><.[workbench,fast,app,papers,compress]>")
    for name in ("install", "run", "lab", "papers"):
        assert not any("<install>" in call for call in project(name)[1])
    (install,) = [call for call in project("check")[1] if "<install>" in call]
    extras = "workbench,fast,app,papers,compress,data,export,eval,test"
    assert install.endswith(f"<-e><.[{extras}]>")
    for name in ("check", "quick", "test", "screens", "references", "run"):
        assert not any("<install>" in call for call in project(name)[1])
    later = (project.folder / ".venv" / ".ready").stat().st_mtime + 10
    os.utime(project.folder / "constraints.txt", (later, later))
    _, calls = project("check")
    assert sum("<install>" in call for call in calls) == 2
    assert not any("<venv>" in call for call in calls)


def test_make_takes_up_a_failed_install(project):
    assert project("install", pip=1)[0].returncode != 0
    done, calls = project("install")
    assert done.returncode == 0 and sum("<install>" in call for call in calls) == 1


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ({"old": 1}, ("3.11 or newer", "Python 3.9.1")),
        ({"no_ensurepip": 1}, ("apt install python3-venv",)),
        ({"python_name": "no-such-python"}, ("no-such-python", "3.11")),
    ],
)
def test_make_says_what_is_missing(project, codes, words):
    done, _ = project("check", **codes)
    assert done.returncode != 0
    assert all(word in done.stderr for word in words)
    assert not (project.folder / ".venv").exists()


def test_make_run_passes_settings_whatever_their_text(project):
    _, calls = project("run")
    assert calls[-1] == "<-m><bitbyte><run>"
    corpus = project.folder / "my 'odd' $(touch gone) text.txt"
    corpus.write_text("x")
    done, calls = project("run", f"CORPUS={corpus.name.replace('$', '$$')}", "MINUTES=2")
    assert done.returncode == 0, done.stderr
    assert calls[-1] == f"<-m><bitbyte><run><--set><corpus={corpus}><--set><minutes=2>"
    assert not (project.folder / "gone").exists()
    _, calls = project("run", "CORPUS=stdlib", "RESUME=latest")
    assert calls[-1] == "<-m><bitbyte><run><--set><corpus=stdlib><--resume><latest>"


def test_make_quick_knows_its_files(project):
    for path in (ROOT / "tests").rglob("test_*.py"):
        copy = project.folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    _, calls = project("quick")
    listed = re.search(r"^QUICK := (.*)", (ROOT / "Makefile").read_text("ascii"), re.M)[1].split()
    assert re.findall(r"<[^<>]*test_(\w+)\.py>", calls[-1]) == listed


@pytest.mark.parametrize("broken", [None, "unit", "nbval", "browser"])
def test_make_test_runs_all_parts_and_fails_if_one_fails(project, broken):
    done, calls = project("test", **({broken: 1} if broken else {}))
    assert (done.returncode == 0) == (broken is None)
    unit, *others = calls[-3:]
    browser, nbval = sorted(others)  # side by side
    assert "<-m><not browser>" in unit and "<tests/browser>" in browser
    assert nbval.startswith("<tests/tools/notebook_rounds.py><elsewhere><--work>")


@pytest.mark.parametrize(
    ("user", "spin"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_spin_shortly_unless_the_user_says_otherwise(user, spin):
    code = (
        "import bitbyte, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    rest = {name: value for name, value in os.environ.items() if name not in names}
    said = subprocess.check_output([sys.executable, "-c", code], env=rest | user, text=True)
    assert said.split() == [spin, "False"]  # set before torch is there to read it


def test_the_package_holds_its_data():
    """Everything in the package that is not code, but for what only a test reads."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = document["tool"]["setuptools"]["package-data"]["bitbyte"]
    paths = [p.relative_to(ROOT / "bitbyte") for p in (ROOT / "bitbyte").rglob("*") if p.is_file()]
    data = [p for p in paths if p.suffix not in (".py", ".pyc", ".nbi", ".nbc", ".sha256")]
    assert {p.suffix for p in data} >= {".bbm", ".gz", ".html", ".js"}
    assert [str(p) for p in data if not any(p.match(pattern) for pattern in patterns)] == []
