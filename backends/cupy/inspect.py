"""What NVIDIA's compiler makes of a translation unit, on any machine that has CuPy installed: no GPU is needed."""

from __future__ import annotations

import functools
import importlib.util
import io
import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from xpnn.backends.cupy.emit import OPTIONS


@dataclass(frozen=True)
class Compiled:
    """Registers and spilled bytes of each kernel, and the machine code."""

    registers: dict[str, int]
    spills: dict[str, int]
    cubin: bytes

    def instructions(self) -> str:
        """The machine code as text.

        Raises
        ------
        FileNotFoundError
            Where cuobjdump is not installed.
        """
        tool = _tool("cuobjdump")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernel.cubin")
            file.write_bytes(self.cubin + b"\0")  # CuPy takes the last byte off
            done = subprocess.run([tool, "-sass", str(file)], capture_output=True, text=True, check=True)
        return done.stdout


@functools.cache
def available() -> bool:
    """Whether CuPy is installed, and finds the compiler."""
    if importlib.util.find_spec("cupy") is None:
        return False
    from cupy_backends.cuda.libs import nvrtc

    try:
        nvrtc.getVersion()
    except RuntimeError:  # the library is not there
        return False
    return True


def spilling(text: str, capability: int) -> set[str]:
    """The kernels that spill registers; none where there is no compiler to tell."""
    return {n for n, size in compile_for(text, capability).spills.items() if size} if available() else set()


@functools.lru_cache(maxsize=64)
def compile_for(text: str, capability: int) -> Compiled:
    """Compile with the options that CuPy uses, for a compute capability such as 90."""
    from cupy._core import core
    from cupy.cuda import compiler

    options = (
        *core.assemble_cupy_compiler_options(()),
        *OPTIONS,
        "-ftz=true",  # CuPy adds it to every module
        "--device-as-default-execution-space",
        f"-arch=sm_{capability}",
        "--ptxas-options=-v",
    )
    log = io.StringIO()
    cubin, _ = compiler._NVRTCProgram(text, "kernel.cu", method="cubin").compile(options, log)
    registers, spills = {}, {}
    entry = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    for name, stores, loads, used in re.findall(entry, log.getvalue(), re.DOTALL):
        registers[name], spills[name] = int(used), int(stores) + int(loads)
    return Compiled(registers, spills, cubin)


def _tool(name: str) -> str:
    found = shutil.which(name)
    for folder in Path(sysconfig.get_paths()["purelib"], "nvidia").glob("cu*/bin"):
        found = found or shutil.which(name, path=str(folder))
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; CUDA's toolkit has it, and pip install xpnn[cuda-check]")
    return found
