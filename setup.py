"""Hands the build of ep_comm._core to CMake; everything else is in pyproject.toml.

CMAKE_ARGS adds options, for example CMAKE_ARGS="-DEP_CUDA=OFF" pip install .
The build folder stays, one for each Python, so that a second build only compiles what changed.
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str, folder_attribute: str) -> str | None:
    """The program from its wheel when that is installed, else the system's."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
    except (ImportError, AttributeError):
        return shutil.which(name)
    return str(Path(folder) / name)


def forget_foreign_cache(build: Path, generator: str) -> None:
    """CMake refuses a build folder made elsewhere or for another generator: start it anew."""
    cache = build / "CMakeCache.txt"
    if not cache.exists():
        return
    lines = cache.read_text().splitlines()
    made_for = dict(line.split("=", 1) for line in lines if ":INTERNAL=" in line)
    here = {"CMAKE_HOME_DIRECTORY:INTERNAL": str(ROOT), "CMAKE_GENERATOR:INTERNAL": generator}
    if any(made_for.get(key) != value for key, value in here.items()):
        shutil.rmtree(build)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise SystemExit("ep_comm needs cmake: pip install cmake")
        ninja = find_tool("ninja", "BIN_DIR")
        generator = "Ninja" if ninja else "Unix Makefiles"
        build = ROOT / "build" / str(sys.implementation.cache_tag)
        forget_foreign_cache(build, generator)

        # Every path is passed each time: pip's isolated environments come and go.
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            "-DEP_CUDA=AUTO",
        ]
        if ninja:
            options.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))

        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", generator, *options]
        compile_ = [cmake, "--build", str(build), "--target", "ep_python", "--parallel", jobs]
        install = [cmake, "--install", str(build), "--prefix", str(package)]
        for command in (configure, compile_, [*install, "--component", "python"]):
            if subprocess.run(command).returncode != 0:
                raise SystemExit(f"this command failed, its output is above: {shlex.join(command)}")

    def copy_extensions_to_source(self) -> None:
        """Also the plugin for NVSHMEM, which is no extension of setuptools'."""
        super().copy_extensions_to_source()
        for plugin in Path(self.build_lib, "ep_comm").glob("_nvshmem.*"):
            shutil.copy2(plugin, ROOT / "ep_comm" / plugin.name)


setup(
    ext_modules=[Extension("ep_comm._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
