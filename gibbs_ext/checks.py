# SPDX-License-Identifier: Apache-2.0
"""Argument checks that are not made in C++, where the ops check shapes and dtypes.

An error text begins with the name of the function that was called, names the argument, and shows the given value.
"""

import contextlib
import numbers
import os
import re
import reprlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_INNER_FILES = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


def warn(message: str, category: type[Warning]) -> None:
    """Gives a warning that names the line which called this package, also if PyTorch's code stands in between."""
    level, frame = 1, sys._getframe()  # Only from Python 3.12 on can warnings.warn skip files by itself.
    while frame.f_back and frame.f_code.co_filename.startswith(_INNER_FILES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def shown(value: object) -> str:
    """A value as an error shows it: shortened to one line."""
    return " ".join(reprlib.repr(value).split())


def check_tensors(name: str, /, **tensors: object) -> None:
    for argument, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor, got {type(tensor).__name__}")


def check_flags(name: str, **flags: object) -> None:
    """Raises unless all are True or False, Python's or NumPy's."""
    for argument, flag in flags.items():
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{name}: {argument} must be a bool, got {shown(flag)}")


def check_integers(name: str, minimum: int = _INT64_MIN, maximum: int = _INT64_MAX, /, **values: object) -> None:
    for argument, value in values.items():
        if type(value) is int and minimum <= value <= maximum:  # the usual case, in half the time
            continue
        # A traced size is a torch.SymInt.
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
            raise TypeError(f"{name}: {argument} must be an integer, got {shown(value)}")
        number: Any = value  # Integral declares no comparison with int
        if number < minimum > _INT64_MIN:
            raise ValueError(f"{name}: {argument} must be at least {minimum}, got {shown(value)}")
        if not _INT64_MIN <= number <= maximum:
            raise ValueError(f"{name}: {argument} must fit in 64 bits, got {shown(value)}")


def check_units(name: str, argument: str, tensor: Tensor, *num_units: int) -> None:
    """Raises unless the size of the tensor's last dim is one of ``num_units``."""
    check_tensors(name, **{argument: tensor})
    if tensor.dim() < 1 or tensor.shape[-1] not in num_units:
        wanted = " or ".join(f"[..., {n}]" for n in num_units)
        raise ValueError(f"{name}: {argument} must have shape {wanted}, got {list(tensor.shape)}")


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a FakeTensorMode: it has a shape and a device, but no values."""
    return isinstance(tensor, FakeTensor)


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a running transform of torch.func, such as vmap or grad."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor stands for the rows of a running torch.vmap, where reading its values is an error."""
    while is_transformed(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor has values that can be read without waiting for a GPU."""
    is_real = not torch.compiler.is_compiling() and not is_fake(tensor) and not is_mapped(tensor)
    return tensor.device.type == "cpu" and is_real


def check_all(good: Tensor, message: str) -> None:
    """Raises unless every element of ``good`` is true. Inside torch.vmap the elements of all rows must be true.

    PyTorch's own assertion fails if the values cannot be read. On a GPU that ends all use of it in this process.
    """
    while is_transformed(good):
        good = torch._C._functorch.get_unwrapped(good)
    if not is_readable(good):
        torch._assert_async(good.all(), message)
    elif not good.all():
        raise ValueError(message)


def check_values(name: str, argument: str, expected: str, tensor: Tensor, good: Tensor) -> None:
    """As :func:`check_all`. ``good`` has tensor's shape, and the error shows a wrong value if values can be read."""
    message = f"{name}: {argument} must {expected}"
    if is_readable(good) and not good.all():
        raise ValueError(f"{message}, got {tensor[~good][0].item()}")
    check_all(good, message)


def check_bits(name: str, argument: str, tensor: Tensor) -> None:
    check_tensors(name, **{argument: tensor})
    check_values(name, argument, "hold 0 and 1 only", tensor, (tensor == 0) | (tensor == 1))


def expand_to(name: str, argument: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    check_tensors(name, **{argument: tensor})
    try:
        return tensor.expand(*shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: {argument} must broadcast to shape {list(shape)}, got {list(tensor.shape)}"
        ) from error


@contextlib.contextmanager
def reported_as(name: str, **arguments: str) -> Iterator[None]:
    """Re-raises errors of inner calls under the caller's name, with argument names translated by ``arguments``."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        found = re.fullmatch(r"[\w.]+: (.*)", str(error), re.DOTALL)
        if not found:
            raise
        text = re.sub(r"\w+", lambda word: arguments.get(word[0], word[0]), found[1])
        raise type(error)(f"{name}: {text}") from error
