"""What is installed, what is imported, and what `make` says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kfacrnn import cli

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
AT_RUN_TIME = {"sentencepiece", "six"}  # torchtext's own imports, which it does not declare
REFERENCE = "dnc"  # of another environment, see `make help`
LIBRARY = ("kfacrnn.kfac", "kfacrnn.nn", "kfacrnn.predictive", "kfacrnn.cache")
COMMANDS = [path for path in sorted((ROOT / "scripts").glob("*.py")) if "kfacrnn.cli" in path.read_text()]

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def python(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def output(*command: str | Path, cwd: Path | None = None) -> str:
    """What a command prints; the test fails with all it said if the command does."""
    result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, result.stdout
    return result.stdout


# ---- imports -----------------------------------------------------------------------------------------------------


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_library_imports_torch_and_itself_only() -> None:
    alone = [ROOT / "kfacrnn" / name for name in ("predictive.py", "cache.py")]
    files = [*alone, *(ROOT / "kfacrnn").glob("kfac/*.py"), *ROOT.glob("kfacrnn/nn/*.py")]
    assert len(files) > 5
    allowed = (*sys.stdlib_module_names, "torch", *LIBRARY)
    foreign = {
        f"{path.name}: {name}"
        for path in files
        for name in imports(path)
        if not any(name == module or name.startswith(f"{module}.") for module in allowed)
    }
    assert foreign == set()


def test_the_library_can_be_imported_where_only_torch_is_installed() -> None:
    needed = reachable(["torch"])
    blocked = {name for name, owners in metadata.packages_distributions().items() if not needed & normal(owners)}
    result = python(BLOCK.format(blocked=blocked - {"kfacrnn"}) + f"import {', '.join(LIBRARY)}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("extra", cli.EXTRAS)
def test_what_is_imported_is_declared_and_what_is_declared_is_imported(extra: str) -> None:
    owners = metadata.packages_distributions()
    declared = normal([Requirement(text).name for text in EXTRAS[extra]])
    assert declared - AT_RUN_TIME == {*normal([owners[module][0] for module in cli.EXTRAS[extra]])}
    imported = {name.split(".")[0] for path in (ROOT / "kfacrnn").rglob("*.py") for name in imports(path)}
    known = {"torch", "kfacrnn", *sys.stdlib_module_names, *set().union(*cli.EXTRAS.values()), REFERENCE}
    assert cli.EXTRAS[extra] <= imported <= known


def test_help_needs_neither_torch_nor_hydra() -> None:
    result = python(
        BLOCK.format(blocked={"torch", "hydra", "omegaconf", "pandas"})
        + "from kfacrnn.cli import main; main(['--help'])"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: kfacrnn")


def test_without_the_experiments_extra_the_command_line_names_it(tmp_path: Path) -> None:
    code = "from kfacrnn.cli import main; sys.exit(main(['train']))"
    result = python(BLOCK.format(blocked={"hydra", "omegaconf"}) + code, cwd=tmp_path)
    assert result.returncode == 2
    assert re.fullmatch(r"kfacrnn: .*pip install 'kfacrnn\[experiments\]'\n", result.stderr)


@pytest.mark.parametrize(
    ("optimizer", "package"),
    [("soap", "pytorch_optimizer"), ("shampoo", "pytorch_optimizer"), ("psgd_kron", "opt_einsum")],
)
def test_without_the_modern_extra_its_optimisers_name_it(optimizer: str, package: str, tmp_path: Path) -> None:
    code = f"from kfacrnn.cli import main; sys.exit(main(['train', 'optimizer={optimizer}']))"
    result = python(BLOCK.format(blocked={package}) + code, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == f"kfacrnn: this needs {package}: pip install 'kfacrnn[modern]'\n"


@pytest.mark.parametrize("script", COMMANDS, ids=[path.stem for path in COMMANDS])
def test_a_script_is_the_command_of_its_name(script: Path) -> None:
    assert output(sys.executable, script, "--help").startswith(f"usage: kfacrnn {script.stem} ")


# ---- pinned versions ---------------------------------------------------------------------------------------------


def normal(names: list[str]) -> set[str]:
    return {str(canonicalize_name(name)) for name in names}


def reachable(names: list[str], extras: tuple[str, ...] = ()) -> set[str]:
    """Installed distributions that `names` need, themselves included."""
    found: set[str] = set()
    todo = [Requirement(f"{name}[{','.join(extras)}]" if extras else name) for name in names]
    while todo:
        requirement = todo.pop()
        name = str(canonicalize_name(requirement.name))
        if name in found and not requirement.extras:
            continue
        found.add(name)
        environments = [{"extra": extra} for extra in (requirement.extras or {""})]
        needs = [Requirement(text) for text in metadata.requires(name) or []]
        todo += [r for r in needs if r.marker is None or any(r.marker.evaluate(e) for e in environments)]
    return found


def test_constraints_pin_every_package_that_the_extras_bring() -> None:
    pins = re.findall(r"^([^#\s=]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    try:
        needed = reachable(["kfacrnn"], ("experiments", "wandb", "torchtext", "modern", "dev")) - {"kfacrnn"}
    except metadata.PackageNotFoundError as missing:
        pytest.skip(f"what an extra brings is read from what is installed, and {missing.name} is not")
    of_cuda = {name for name in needed if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert needed - of_cuda == normal(pins)


def test_the_lock_file_has_a_sum_for_every_pin_and_names_no_server() -> None:
    text = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([^#\s=]+)==(\S+) .*\\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE))
    pins = re.findall(r"^([^#\s=]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    versions = {canonicalize_name(name): version for name, version in locked.items()}
    assert {name: version for name, version in pins if versions.get(canonicalize_name(name)) != version} == {}
    assert len(locked) == len(re.findall(r"^\S+==", text, re.MULTILINE))
    assert "://" not in text


def test_every_pin_has_its_licence_listed() -> None:
    page = (ROOT / "docs" / "licences.md").read_text()
    pins = re.findall(r"^([^#\s=]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert [f"| {name} | {version} |" for name, version in pins if f"| {name} | {version} | " not in page] == []


# ---- make --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('[ "$1" = --version ] && echo Python 3.9.2; exit 1', "needs Python 3.11 or newer; {} says: Python 3.9.2"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "{} cannot make virtual environments"),
    ],
    ids=["old Python", "no ensurepip"],
)
def test_make_install_says_in_one_line_what_is_missing(tmp_path: Path, body: str, message: str) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{body}\n")
    fake.chmod(0o755)
    command = ["make", "-C", str(ROOT), "install", f"PYTHON={fake}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1
    assert message.format(fake) in lines[0]


# ---- distributions -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which is built from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    output(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_its_configs_and_its_experiments(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {path for path in (ROOT / "kfacrnn").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    data = {path for folder in ("configs", "experiments") for path in (ROOT / folder).rglob("*.yaml")}
    expected = {path.relative_to(ROOT).as_posix() for path in package}
    expected |= {f"kfacrnn/{path.relative_to(ROOT).as_posix()}" for path in data}
    assert held == expected


@pytest.mark.slow
def test_an_installed_wheel_trains_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    programs = environment / "bin"
    output(programs / "pip", "install", "--quiet", "--no-deps", wheel)
    # Lends what is installed here, without this checkout: .pth files are not read in a folder that a .pth file adds.
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    where = output(programs / "python", "-c", "import kfacrnn; print(kfacrnn.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    assert "smoke" in output(programs / "kfacrnn", "list", "experiments", cwd=tmp_path)
    assert "done" in output(programs / "kfacrnn", "train", "budget.updates=2", "task.eval_sequences=4", cwd=tmp_path)
    assert list(tmp_path.glob("results/runs/repeat_copy/adam/*/model.pt"))
    output(programs / "kfacrnn", "sweep", "smoke", "--dry-run", cwd=tmp_path)
