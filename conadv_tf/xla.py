"""What is for programs that XLA compiles alone, such as an order between computations that are independent."""

import contextlib
import contextvars
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

_compiling: contextvars.ContextVar[bool] = contextvars.ContextVar("compiling", default=False)


@contextlib.contextmanager
def compiling(compiled: bool) -> Iterator[None]:
    """Says whether XLA will compile what is traced inside: other programs know no barrier."""
    token = _compiling.set(compiled)
    try:
        yield
    finally:
        _compiling.reset(token)


def is_compiling() -> bool:
    """Whether what is traced now will be compiled by XLA."""
    return _compiling.get()


def after(earlier: list[tf.Tensor], values: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Both lists, `values` not to be used before `earlier` are computed.

    XLA would otherwise be free to interleave two passes, and to keep the activations of both.
    """
    if not is_compiling():
        return earlier, values
    both = gen_xla_ops.xla_optimization_barrier([*earlier, *values])
    return both[: len(earlier)], both[len(earlier) :]
