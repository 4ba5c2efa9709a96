"""Compile a Triton kernel for a GPU that isn't there, and read in its machine code what it will do."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
THREADS = 128
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def build(kernel, kinds, constants, target=("cuda", 90, 32), aligned=True, multiples=()):
    """The compiled kernel; ``kinds`` are the types of its arguments.

    Pointers are aligned to 16 bytes unless told, and the integers named in ``multiples`` are multiples of 16.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    known = {(names.index(name),): value for name, value in constants.items()}
    even = [i for i, name in enumerate(names) if name in multiples or (aligned and signature[name].startswith("*"))]
    hints = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(kernel, signature, known, hints)
    return triton.compile(source, target=GPUTarget(*target), options={"enable_fp_fusion": False})


@dataclass
class Report:
    """What the machine code shows of the path that all blocks but the last take."""

    registers: int
    stack: int
    spills: int
    narrow: list[str]
    moved: float

    def faults(self, floor):
        """Why this build is not good enough: it moves more than ``floor`` bytes per element, or moves them badly."""
        found = []
        if self.registers > 64:
            found.append(f"{self.registers} registers")
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of stack, {self.spills} spills")
        if self.narrow:
            found.append(f"narrow: {self.narrow}")
        if self.moved != floor:
            found.append(f"{self.moved} bytes per element, the floor is {floor}")
        return found


def report(compiled, block):
    """Read the code of a kernel whose programs serve ``block`` elements each."""
    code, usage = disassemble(compiled), _run("cuobjdump", "-res-usage", compiled)
    accesses = [_access(text) for text in _fast_path(code)]
    # Bits go by the byte, one for eight elements: too few to matter
    narrow = [name for name, width in accesses if 2 < width < 16]
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        narrow=narrow,
        moved=sum(width for _, width in accesses) * THREADS / block,
    )


def disassemble(compiled):
    """The machine code as text."""
    return _run("nvdisasm", "-c", compiled)


def _fast_path(code):
    """Global loads and stores of the basic block that stores the most."""
    blocks = re.split(r"^\.L_\w+:|\bBRA\b.*$", code, flags=re.MULTILINE)
    found = [re.findall(r"\b((?:LDG|STG)[.\w]*)", block) for block in blocks]
    wide = [block for block in found if any(name.startswith("STG") and ".128" in name for name in block)]
    return max(wide or found, key=len)


def _access(name):
    return name, next((width for part, width in WIDTHS.items() if part in name.split(".")), 4)


def _run(tool, option, compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
