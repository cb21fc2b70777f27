"""Triton's interpreter, made honest about bfloat16: as it comes it keeps bf16 in uint16 and computes on the bits.

Products, elementwise arithmetic and casts are done in float32 and rounded to nearest even, as the hardware does. What
stays wrong: `tl.sum` and atomics of bf16 values. Kernels therefore cast to float32 before they reduce.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def as_float32(handle):
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def as_bf16(values):
    return TensorHandle(narrow(values), tl.bfloat16)


def repair(monkeypatch):
    """Patches the interpreter's builder for as long as the monkeypatch lasts."""
    original = {
        name: getattr(InterpreterBuilder, name)
        for name in ("create_dot", "binary_op", "unary_op", "cast_impl", "create_fp_to_fp")
    }

    def create_dot(self, a, b, d, *rest):
        return original["create_dot"](self, as_float32(a), as_float32(b), d, *rest)

    def binary_op(self, left, right, op):
        if not is_bf16(left):
            return original["binary_op"](self, left, right, op)
        result = op(widen(left.data), widen(right.data))
        return TensorHandle(result, tl.int1) if result.dtype == bool else as_bf16(result)

    def unary_op(self, value, op):
        if not is_bf16(value):
            return original["unary_op"](self, value, op)
        return as_bf16(op(widen(value.data)))

    def cast_impl(self, source, target, *rest):
        if is_bf16(source) and target.scalar != tl.bfloat16:
            wide = as_float32(source)
            return wide if target.scalar == tl.float32 else original["cast_impl"](self, wide, target, *rest)
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            return as_bf16(source.data.astype(np.float32))
        return original["cast_impl"](self, source, target, *rest)

    def create_fp_to_fp(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return original["create_fp_to_fp"](self, source, target, rounding)

    for function in (create_dot, binary_op, unary_op, cast_impl, create_fp_to_fp):
        monkeypatch.setattr(InterpreterBuilder, function.__name__, function)
    monkeypatch.setattr(InterpreterBuilder, "get_bf16", lambda self, value: as_bf16(np.array([value])), raising=False)
