# SPDX-License-Identifier: Apache-2.0
"""Progress bars of long calls, by tqdm."""

import math
from collections.abc import Iterable
from typing import TypeVar

_T = TypeVar("_T")


def shown_progress(name: str, steps: Iterable[_T], progress: bool, total: int | None = None) -> Iterable[_T]:
    """The steps, with a bar called ``name`` if ``progress`` is True."""
    if not progress:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(f"{name}: progress needs tqdm; pip install tqdm") from error
    return tqdm(steps, desc=name, total=total)  # type: ignore[no-any-return]


def parts(name: str, count: int, progress: bool) -> Iterable[int]:
    """The sizes of parts of ``count`` steps: a single one, or about a hundred with a progress bar."""
    size = max(1, math.ceil(count / 100)) if progress else max(1, count)
    sizes = [size] * (count // size) + [count % size] * (count % size > 0)
    return shown_progress(name, sizes or [0], progress)
