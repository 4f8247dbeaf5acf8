"""Floating-point operations of a traced function: those of its products, as MFU counts them.

Counted before compilation, and so in the same way for every kind of device: libraries that a
compiler calls for products do not say how large they are.
"""

import math
from typing import Any

import jax


def flops(traced: jax.stages.Traced) -> int:
    """Of one call over all devices; a product counts a multiplication and an addition.

    What the backward pass computes again counts as well.  Loops of unknown length count once, of
    branches the longest.
    """
    return _of_jaxpr(traced.jaxpr.jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (summed, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[n] for n in summed)
    if name == "conv_general_dilated":
        kernel, layout = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        taps = math.prod(kernel[n] for n in layout[1:])  # without the dimension of its outputs
        places = math.prod(equation.outvars[0].aval.shape) // math.prod(params["lhs_dilation"])
        return 2 * places * taps
    inner = [_of_jaxpr(jaxpr) for jaxpr in jax.tree.leaves(_jaxprs(params))]
    if name == "cond":
        return max(inner)
    times = {"scan": params.get("length")}.get(name) or 1
    if name == "shard_map":  # written for one device
        times = params["mesh"].size
    return times * sum(inner)


def _jaxprs(params: Any) -> list[Any]:
    """The programs that an equation runs."""
    is_program = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")  # noqa: E731
    found = [x for x in jax.tree.leaves(list(params.values()), is_leaf=is_program) if is_program(x)]
    return [getattr(x, "jaxpr", x) for x in found]
