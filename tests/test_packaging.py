"""The wheel holds the package once and nothing else; importing attnopt stays cheap."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ("passes", "patterns", "codegen")
OPTIONAL = ("transformers", "tokenizers", "huggingface_hub", "matplotlib")
HEAVY = (*OPTIONAL, "triton", "rich", "sympy", "networkx", "scipy")


def package_files() -> set[str]:
    """What belongs into the wheel: every module, Python and C++, and every file below attnopt/assets."""
    package = ROOT / "attnopt"
    files = [*package.rglob("*.py"), *package.rglob("*.cpp"), *(p for p in package.glob("assets/**/*") if p.is_file())]
    return {p.relative_to(ROOT).as_posix() for p in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built offline, from a copy of the tree: a build folder that setuptools left behind may hold stale files."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("attnopt", "tests", "pyproject.toml", "README.md", "LICENSE", *LINKS):
        source = ROOT / name
        if source.is_symlink():
            (tree / name).symlink_to(os.readlink(source))
        elif source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, tree]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("attnopt-*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_wheel_holds_each_package_file_once(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert len(names) == len(set(names))
    inside = {n for n in names if ".dist-info/" not in n}
    assert inside == package_files()


def test_wheel_has_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    top = {n.split("/")[0] for n in wheel.namelist()}
    assert {n for n in top if not n.endswith(".dist-info")} == {"attnopt"}


def test_wheel_declares_the_entry_points(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(name).decode())
    assert dict(entries["console_scripts"]) == {"attnopt": "attnopt.cli:main"}
    assert dict(entries["torch_dynamo_backends"]) == {"attnopt": "attnopt.backend:attnopt"}


def test_wheel_carries_the_licence_and_the_version(wheel: zipfile.ZipFile) -> None:
    import attnopt

    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert f"\nVersion: {attnopt.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in wheel.namelist())


def run_python(code: str, tmp_path: Path) -> str:
    """Output of `code` in a fresh interpreter that sees this tree's attnopt and is not inside the tree."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_attnopt_imports_none_of_the_heavy_libraries(tmp_path: Path) -> None:
    code = f"import sys, attnopt; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    assert run_python(code, tmp_path) == ""


def test_the_backend_imports_without_the_optional_libraries(tmp_path: Path) -> None:
    """None in sys.modules makes an import fail as if the library were not installed."""
    absent = (*OPTIONAL, "triton", "rich")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import attnopt.backend; print('imported')"
    assert run_python(code, tmp_path) == "imported"


def test_constraints_pin_every_dependency() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {re.fullmatch(r"([\w.-]+)==[\w.]+", line)[1].lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(n for extra in project["optional-dependencies"].values() for n in extra)]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in needed} - {"attnopt"}
    assert names <= pinned


def check_requirements(**environment: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "tools/check_requirements.sh"), environment.pop("python", sys.executable)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_missing_requirements_are_named_with_the_line_that_installs_them() -> None:
    done = check_requirements(python="no-such-python", CXX="no-such-compiler")
    assert done.returncode == 1
    assert "sudo apt-get install -y python3 python3-venv python3-dev g++" in done.stderr


def test_a_missing_compiler_is_named_alone() -> None:
    done = check_requirements(CXX="no-such-compiler")
    assert done.returncode == 1
    assert "sudo apt-get install -y g++" in done.stderr and "python3" not in done.stderr
