"""Fake arguments and export, for the test programs.

Each program is run as ``CUTE_DSL_ARCH=sm_90a python program.py FOLDER``.
"""

import sys
from pathlib import Path

import cuda.bindings.driver as cuda
from cutlass import cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.runtime import make_fake_tensor
from cutlass.cutlass_dsl import T, dsl_user_op


def matrix(dtype, contiguous: int = 1):
    """Two dynamic extents; mode ``contiguous`` has stride 1, the other a 64-bit stride."""
    n = 128 // dtype.width
    shape = [cute.sym_int32(), cute.sym_int32()]
    shape[contiguous] = cute.sym_int32(divisibility=n)
    stride = [cute.sym_int64(divisibility=n)] * 2
    stride[contiguous] = 1
    return make_fake_tensor(dtype, tuple(shape), tuple(stride), assumed_align=16)


def export(program, name: str, *arguments) -> None:
    """NAME.o and NAME.sm_90a.ptx in the folder of the command line."""
    folder = Path(sys.argv[1])
    for function in (type(program).__call__, type(program).kernel):
        function.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
    options = f"--keep-ptx --dump-dir {folder}"
    compiled = cute.compile(program, *arguments, cuda.CUstream(0), options=options)
    compiled.export_to_c(file_path=str(folder), file_name=name, function_prefix=name)


@dsl_user_op
def pin(fragment, *, loc=None, ip=None):
    """Accumulators may be used from here on: the compiler must not move uses above the wait."""
    n = cute.size(fragment)
    values = [fragment[i].ir_value(loc=loc, ip=ip) for i in range(n)]
    constraints = ",".join(["=f"] * n + [str(i) for i in range(n)])
    kind = llvm.StructType.get_literal([T.f32()] * n)
    result = llvm.inline_asm(kind, values, "", constraints, has_side_effects=True, loc=loc, ip=ip)
    for i in range(n):
        fragment[i] = type(fragment[i])(llvm.extractvalue(T.f32(), result, [i], loc=loc, ip=ip))
