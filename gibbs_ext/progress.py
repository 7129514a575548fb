# SPDX-License-Identifier: Apache-2.0
"""Progress bars of long calls, by tqdm."""

import math
from collections.abc import Sequence


def parts(name: str, count: int, progress: bool) -> Sequence[int]:
    """The sizes of parts of ``count`` steps: a single one, or about a hundred with a progress bar."""
    if not progress or not count:
        return [count]
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(f"{name}: progress needs tqdm; pip install tqdm") from error
    size = math.ceil(count / 100)
    sizes = [size] * (count // size) + [count % size] * (count % size > 0)
    return tqdm(sizes, desc=name, unit="part")  # type: ignore[no-any-return]
