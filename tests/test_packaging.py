"""What a user meets first: import, version, build_info(), the command, the wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ep_comm

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


# ---- import ----


def test_import_loads_neither_torch_nor_the_core() -> None:
    code = "import sys, ep_comm; print(sys.modules.keys() & {'torch', 'numpy', 'ep_comm._core'})"
    assert run_python(code).stdout.strip() == "set()"


def test_core_imports_without_torch() -> None:
    code = "import sys; from ep_comm import _core; print('torch' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


def test_import_writes_no_environment_variable_and_prints_nothing() -> None:
    code = (
        "import os; before = dict(os.environ); import ep_comm, ep_comm._core; "
        "assert dict(os.environ) == before"
    )
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_is_there() -> None:
    assert set(ep_comm.__all__) <= set(dir(ep_comm))
    for name in ep_comm.__all__:
        assert getattr(ep_comm, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'dispach'"):
        ep_comm.dispach  # noqa: B018


def test_names_for_type_checkers_are_the_lazy_names() -> None:
    tree = ast.parse((ROOT / "ep_comm" / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: (node.module or "").removeprefix("ep_comm.")
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == ep_comm._HOME
    assert set(ep_comm.__all__) == {*ep_comm._HOME, "__version__"}


# ---- version and build ----


def test_version_is_the_one_of_pyproject() -> None:
    assert ep_comm.__version__ == PYPROJECT["project"]["version"]


def test_installed_version_is_the_one_of_pyproject() -> None:
    try:
        installed = importlib.metadata.version("ep-comm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ep-comm is not installed here, only on the path")
    assert installed == PYPROJECT["project"]["version"]


def test_build_info_gives_a_reason_for_all_that_is_missing() -> None:
    info = ep_comm.build_info()

    assert info["simd"][0] == "portable"
    assert info["compiler"]
    assert (info["cuda"] is None) == bool(info["cuda_missing"])
    assert info["cuda"] or not info["cuda_archs"]
    assert (info["nvshmem"] is None) == bool(info["nvshmem_missing"])


def test_build_info_without_core_says_how_to_build_it() -> None:
    code = (
        "import sys; sys.modules['ep_comm._core'] = None\n"
        "import ep_comm\n"
        "try: ep_comm.build_info()\n"
        "except ImportError as error: print(error)"
    )
    assert "pip install ." in run_python(code).stdout


# ---- the command ----


def test_command_without_its_extra_names_the_package_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom ep_comm.cli import main\nsys.exit(main())"
    done = run_python(code)

    assert done.returncode == 2
    assert "needs typer" in done.stderr
    assert "pip install 'ep-comm[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


# ---- the wheel ----


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_builds_offline_and_runs_from_elsewhere(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    wheels, target = tmp_path / "wheels", tmp_path / "site"
    subprocess.run([*pip, "wheel", *offline, "-w", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.glob("ep_comm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()

    assert wheel.stat().st_size < 50 << 20
    assert any(name.startswith("ep_comm/_core.") and name.endswith(".so") for name in names)
    assert {"ep_comm/py.typed", "ep_comm/_core.pyi", "ep_comm/reference/__init__.py"} <= {*names}
    assert not [n for n in names if n.startswith(("tests", "bench", "csrc", "build"))]

    install = [*pip, "install", *offline, "--target", str(target), str(wheel)]
    subprocess.run(install, check=True)
    done = subprocess.run(
        [sys.executable, "-c", "import ep_comm; print(ep_comm.__file__, ep_comm.build_info())"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert done.stdout.startswith(str(target))
