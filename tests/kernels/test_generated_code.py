"""The machine code of the kernels, compiled for GPUs that need not be there.

It shows the shape of the code: width of loads and stores, bytes per element, registers, spills. What it cannot show,
bandwidth and races, needs a GPU.
"""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter leaves nothing to compile", allow_module_level=True)

import triton
import triton.language as tl
from kernels.machine_code import TOOLS, build, disassemble, report

from lightslim.kernels import triton_fake_quant, triton_rows
from lightslim.kernels.launch import BLOCK

pytestmark = pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="this triton has no disassembler")

NVIDIA = [("cuda", 80, 32), ("cuda", 90, 32)]
AMD = ("hip", "gfx942", 64)
POINTERS = {"clipped": "*u8", "peak": "*i32", "grid": "*fp32", "amax": "*fp32", "amin": "*fp32", "table": "*i64"}
INTEGERS = dict.fromkeys(["channels", "inner", "count", "levels", "rows"], "i32")
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}

# Kernel, its constants, and how many times it moves a whole tensor and how many times one bit per element
STREAMS = {
    "quantize": ("quantize", {"BY": "tensor", "KEEP": False, "PEAK": False}, 2, 0),
    "quantize and keep": ("quantize", {"BY": "tensor", "KEEP": True, "PEAK": False}, 2, 1),
    "quantize and find the peak": ("quantize", {"BY": "tensor", "KEEP": False, "PEAK": True}, 2, 0),
    "quantize long rows": ("quantize", {"BY": "row", "KEEP": False, "PEAK": False}, 2, 0),
    "pass what is not marked": ("pass_marked", {}, 2, 1),
    "pass what is inside": ("pass_inside", {"BY": "tensor"}, 3, 0),
}


def kinds(dtype):
    return {**INTEGERS, **POINTERS, **dict.fromkeys(["x", "y", "grad", "out", "kind"], f"*{dtype}")}


def compiled(kernel, dtype, constants, target=("cuda", 90, 32), **options):
    return build(kernel, kinds(dtype), {"BLOCK": BLOCK, **constants}, target, **options)


@pytest.mark.slow
@pytest.mark.parametrize("target", NVIDIA, ids=lambda target: f"sm_{target[1]}")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stream", STREAMS)
def test_whole_blocks_move_no_byte_too_many_and_128_bits_at_a_time(stream, dtype, target):
    name, constants, tensors, bits = STREAMS[stream]
    # A row starts where the one before ends: only rows of 16 n elements stay aligned, and Triton is told when it is so
    even = ("inner",) if constants.get("BY") == "row" else ()
    kernel = getattr(triton_fake_quant, name)
    result = report(compiled(kernel, dtype, constants, target, multiples=even), BLOCK)
    assert result.faults(floor=tensors * SIZES[dtype] + bits / 8) == []


OTHERS = {
    "make_grid": (triton_fake_quant.make_grid, {"AFFINE": True, "BLOCK": 128}),
    "quantize short rows": (
        triton_fake_quant.quantize,
        {"BY": "element", "KEEP": False, "PEAK": False, "BLOCK": BLOCK // 4},
    ),
    "pass inside short rows": (triton_fake_quant.pass_inside, {"BY": "element", "BLOCK": BLOCK // 4}),
    "quantize_rows": (triton_rows.quantize_rows, {"BLOCK": 1024}),
    "quantize_rows to one level": (triton_rows.quantize_rows, {"BLOCK": 1024, "levels": 1}),
    "l1_rows": (triton_rows.l1_rows, {"BLOCK": 1024}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_kernels_fit_into_registers(name):
    kernel, constants = OTHERS[name]
    result = report(compiled(kernel, "fp32", constants), BLOCK)
    assert (result.stack, result.spills) == (0, 0)
    assert result.registers <= 64


@pytest.mark.slow
def test_aligned_rows_of_many_tensors_move_128_bits_at_a_time():
    code = disassemble(compiled(triton_rows.quantize_rows, "fp32", {"BLOCK": 1024}))
    assert "LDG.E.128" in code
    assert "STG.E.128" in code


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*STREAMS, *OTHERS])
def test_amd_compiles(name, dtype):
    kernel, constants, *_ = (STREAMS | OTHERS)[name]
    kernel = getattr(triton_fake_quant, kernel) if isinstance(kernel, str) else kernel
    assert compiled(kernel, dtype, constants, AMD).asm["hsaco"]


@triton.jit
def always_masked(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < count) * 2.0, mask=at < count)


@pytest.mark.slow
def test_bad_builds_are_rejected():
    plain = {"BY": "tensor", "KEEP": False, "PEAK": False}
    quantize = triton_fake_quant.quantize
    unaligned = report(compiled(quantize, "fp32", plain, aligned=False), BLOCK).faults(floor=8)
    assert any("narrow" in fault for fault in unaligned)
    too_big = report(compiled(quantize, "fp32", plain | {"BLOCK": 65536}), 65536).faults(floor=8)
    assert any("spills" in fault for fault in too_big)
    masked = report(compiled(always_masked, "fp32", {}), BLOCK).faults(floor=8)
    assert any("narrow" in fault for fault in masked)
    twice = report(compiled(triton_fake_quant.pass_inside, "fp32", {"BY": "tensor"}), BLOCK).faults(floor=8)
    assert twice == ["12.0 bytes per element, the floor is 8"]
