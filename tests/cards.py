"""Triton kernels without a card: interpreted on a processor, and compiled for cards that are not there.

The interpreter runs a kernel with numpy, in a process that was told so before it read Triton; the compiler says whether
a card would take it, with how many registers and how much shared memory. Neither says anything of speed.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

IS_HERE = find_spec("triton") is not None
IS_INTERPRETED = IS_HERE and os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="only a test that starts the interpreter runs it")
starts_interpreter = pytest.mark.skipif(not IS_HERE or IS_INTERPRETED, reason="no Triton here, or it is interpreted")
needs_compiler = pytest.mark.skipif(not IS_HERE or IS_INTERPRETED, reason="no Triton here, or only its interpreter")
PLACES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
CAPABILITIES = (80, 90)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def assert_interpreted(path):
    """Run the tests of a file that have a place, interpreted: they pass, and none is left out."""
    program = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-k", "cpu", path]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(program, env=environment, cwd=root, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "skipped" not in done.stdout, said


class Recorder:
    """Takes the place of a kernel, launches nothing, and keeps what it was to be launched with. It changes."""

    def __init__(self):
        self.given = None

    def __getitem__(self, grid):
        def launch(*tensors, **settings):
            self.given = (tensors, settings)

        return launch


def compiled(kernel, given, capability):
    """The kernel as a card of this compute capability would be given it. Raises where its compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments, settings = given
    options = {name: settings[name] for name in ("num_warps", "num_stages")}
    constants = {name: value for name, value in settings.items() if name not in options}
    signature = dict.fromkeys(constants, "constexpr")
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        kinds = {int: "i32", float: "fp32"}
        signature[name] = "*" + TYPES[value.dtype] if isinstance(value, torch.Tensor) else kinds[type(value)]
    ordered = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, ordered, constants)  # an argument that changed its name between versions
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _teach_bfloat16():
    """Let the interpreter compute with bfloat16, which numpy has not.

    It takes integers for its bits, cuts bits off where it should round, and multiplies bits as integers.
    """
    from triton.runtime import interpreter

    types, builder = interpreter.tl, type(interpreter.interpreter_builder)
    of_triton = interpreter._convert_float, builder.cast_impl, builder.create_dot

    def convert(numbers, before, after, mode):
        if (before, after) != (types.float32, types.bfloat16):
            return of_triton[0](numbers, before, after, mode)
        return torch.from_numpy(numbers.copy()).bfloat16().view(torch.uint16).numpy()

    def cast(self, side, after):
        if after.scalar == types.bfloat16 and side.dtype.scalar.is_int():
            side = of_triton[1](self, side, types.float32)
        return of_triton[1](self, side, after)

    def dot(self, left, right, *rest):
        sides = [
            of_triton[1](self, side, types.float32) if side.dtype.scalar == types.bfloat16 else side
            for side in (left, right)
        ]
        return of_triton[2](self, *sides, *rest)

    interpreter._convert_float, builder.cast_impl, builder.create_dot = convert, cast, dot


if IS_INTERPRETED:
    _teach_bfloat16()
