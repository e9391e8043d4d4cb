"""Making Numba-CUDA intrinsics out of LLVM instructions and inline PTX.

Owns what every intrinsic of `assembly.py` is made by: `operation` for one on numbers, `access` for one on an element's
address, `statement` for one without either, and `inline_ptx` for the text within. What always holds: Numba-CUDA is
imported when the first is made, never with this module.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def numba_parts() -> tuple[Any, Any, Any, Any]:
    """Numba's intrinsic decorator, types, cgutils and llvmlite's IR."""
    from llvmlite import ir
    from numba.cuda import cgutils, types
    from numba.cuda.extending import intrinsic

    return intrinsic, types, cgutils, ir


def operation(arguments: str, result: str, build: Callable[..., Any]) -> Any:
    """An intrinsic on numbers: `build(ir, builder, *values)` gives the result; types are named `f32`, `f32*4`, ..."""
    intrinsic, types, _, ir = numba_parts()
    signature = _type_of(types, result)(*(_type_of(types, name) for name in arguments.split()))

    def codegen(context, builder, signature, values):
        return _made(context, builder, signature, build(ir, builder, *values))

    return with_arity(intrinsic, len(signature.args), lambda *_: (signature, codegen))


def _made(context, builder, signature, result):
    """A list of values as the tuple of the signature; anything else as it is."""
    if isinstance(result, list):
        return context.make_tuple(builder, signature.return_type, result)
    return result


def _type_of(types, name: str) -> Any:
    """`f32`, `u16`, `i64`, ...; `f32*4` is a tuple of four; `()` is nothing."""
    if name == "()":
        return types.void
    base, _, count = name.partition("*")
    found = {
        "f32": types.float32,
        "u16": types.uint16,
        "u32": types.uint32,
        "i32": types.int32,
        "i64": types.int64,
    }[base]
    return types.UniTuple(found, int(count)) if count else found


def with_arity(intrinsic, count: int, typed: Callable[..., Any]) -> Any:
    """The intrinsic of `count` arguments: Numba reads their number off the typing function's signature."""
    names = ", ".join(f"a{i}" for i in range(count))
    space: dict[str, Any] = {"typed": typed}
    exec(f"def operation(context, {names}):\n    return typed({names})", space)
    return intrinsic(space["operation"])


def inline_ptx(ir, builder, text: str, constraints: str, results: list[Any], values, side_effect: bool = False):
    """Put PTX among the instructions; gives a list of results of these types, or the only one."""
    single = results[0] if results else ir.VoidType()
    kind = ir.LiteralStructType(results) if len(results) > 1 else single
    function = ir.FunctionType(kind, [value.type for value in values])
    call = builder.call(ir.InlineAsm(function, text, constraints, side_effect=side_effect), list(values))
    return [builder.extract_value(call, i) for i in range(len(results))] if len(results) > 1 else call


def access(arguments: str, result: str, build: Callable[..., Any]) -> Any:
    """An intrinsic on (array, index, *numbers): `build(ir, builder, address, *values)`; types as for `operation`."""
    intrinsic, types, cgutils, _ = numba_parts()

    def typed(array, index, *rest):
        return _type_of(types, result)(array, types.int64, *(_type_of(types, name) for name in arguments.split())), code

    def code(context, builder, signature, values):
        from llvmlite import ir

        address = global_address(ir, cgutils, context, builder, signature.args[0], values[0], values[1])
        made = _made(context, builder, signature, build(ir, builder, address, *values[2:]))
        return context.get_dummy_value() if made is None else made

    return with_arity(intrinsic, 2 + len(arguments.split()), typed)


def global_address(ir, cgutils, context, builder, kind, array, index):
    """The address of an element, as a number: in global memory generic addresses are global ones."""
    data = context.make_array(kind)(context, builder, array).data
    size = ir.Constant(ir.IntType(64), kind.dtype.bitwidth // 8)
    return builder.add(builder.ptrtoint(data, ir.IntType(64)), builder.mul(index, size))


def statement(text: str) -> Any:
    """An intrinsic of no arguments and no result, which no access to memory is moved across."""
    intrinsic, types, _, ir = numba_parts()

    def code(context, builder, signature, values):
        inline_ptx(ir, builder, text, "~{memory}", [], [], side_effect=True)
        return context.get_dummy_value()

    return with_arity(intrinsic, 0, lambda: (types.void(), code))
