"""Compile both kernels for an H100 and print each variant's resources: ``K``, then ``bf16`` or ``fp32``.

Needs no GPU. Pointers and sizes are divisible by 16, as they are in training.
"""

import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from polyglu.model.kernels import triton_kernels

FP32 = ("neuron_ptr", "token_ptr", "d_neuron_ptr", "d_token_ptr")
UNALIGNED = ("T", "token_stride")


def compiled(kernel: triton.JITFunction, dtype: str, constants: dict[str, object]) -> CompiledKernel:
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[index,] = "constexpr", constants[name]
            continue
        signature[name] = "i32"
        if name.endswith("_ptr"):
            signature[name] = "*fp32" if name in FP32 else f"*{dtype}"
        if name not in UNALIGNED:
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(kernel: CompiledKernel) -> str:
    """Registers, and the stack that spills would take."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:\d+ STACK:\d+", usage)
    assert found, usage
    return found[0]


def main(k: int, dtype: str) -> None:
    sizes = {"K": k, "BLOCK_T": 4, "BLOCK_F": 256 if dtype == "bf16" else 128, "SPAN": 128}
    for per_token in (False, True):
        built = compiled(triton_kernels.forward_kernel, dtype, {**sizes, "PER_TOKEN": per_token})
        print(f"forward {per_token=}", resources(built))
    for per_token, with_hidden in product((False, True), repeat=2):
        constants = {**sizes, "PER_TOKEN": per_token, "WITH_HIDDEN": with_hidden}
        built = compiled(triton_kernels.backward_kernel, dtype, constants)
        print(f"backward {per_token=} {with_hidden=}", resources(built))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
