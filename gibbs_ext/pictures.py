# SPDX-License-Identifier: Apache-2.0
"""Pictures of states on Chimera graphs. Needs matplotlib."""

import contextlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gibbs_ext.checks import check_tensors
from gibbs_ext.graphs import ChimeraGraph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAME = "draw_chimera"


def chimera_positions(graph: ChimeraGraph) -> NDArray[np.float64]:
    """The position of each unit, [N, 2]: cells are crosses, rows downwards, neighbours on an arm 1 apart.

    Units of side 0, which are coupled to the cells above and below, lie on the horizontal bar of their cell's cross,
    units of side 1 on the vertical one, and none in its middle (the layout of ``dwave_networkx.chimera_layout``).
    """
    row, column, side, index = np.asarray(graph.coordinates).T
    middle = graph.shore // 2
    along = index + (index >= middle)
    x = np.where(side == 0, along, middle)
    y = np.where(side == 0, middle, along)
    pitch = graph.shore + 3
    return np.stack([column * pitch + x, -(row * pitch + y)], 1).astype(np.float64)


def draw_chimera(
    graph: ChimeraGraph,
    values: Tensor,
    path: str | os.PathLike[str] | None = None,
    *,
    ax: "Axes | None" = None,
    coupling: Tensor | None = None,
    frustration: bool = False,
    cmap: str = "cividis",
    title: str = "",
    legend: bool = True,
    dpi: int = 120,
) -> "Axes":
    """Draws a state of a Chimera graph, or marginals, cells as crosses.

    Args:
        graph: Vacant units leave gaps.
        values: [N] in [0, 1], bits or probabilities of being 1, which the units' colours show.
        path: A .png file to write, in an existing folder. It is written whole or not at all.
        ax: Axes to draw on; by default those of a new figure of a fitting size.
        coupling: [E] strengths of the edges, in this package's convention ``energy = - sum coupling z z``. An edge is
            blue if its coupling is above 0 and favours equal units, red if it is below 0, and fainter if it is weaker.
        frustration: Whether edges are instead red if their units are not as ``coupling`` favours, wider if they are
            stronger, and grey if they are satisfied. A unit counts as 1 above 1/2; at 1/2 its edges are neither.
        cmap: Name of matplotlib's colormap for values.
        title: Title above the picture.
        legend: Whether a legend explains the colours.
        dpi: Dots per inch of the file.

    Returns:
        The axes; ``.figure`` is the figure.

    Raises:
        TypeError, ValueError: An argument does not fit; the message begins with ``draw_chimera:``.
        ImportError: matplotlib is missing.
        OSError: The file cannot be written.
    """
    if not isinstance(graph, ChimeraGraph):
        raise TypeError(f"{_NAME}: graph must be a ChimeraGraph, got {type(graph).__name__}")
    given = [("values", values, graph.num_nodes)]
    if coupling is not None:
        given.append(("coupling", coupling, graph.num_edges))
    for argument, tensor, n in given:
        check_tensors(_NAME, **{argument: tensor})
        if tensor.shape != (n,):
            raise ValueError(f"{_NAME}: {argument} must have shape [{n}], got {list(tensor.shape)}")
    bits = values.detach().cpu().double()
    odd = bits[~((bits >= 0) & (bits <= 1))]
    if len(odd):
        raise ValueError(f"{_NAME}: values must lie in [0, 1], got {odd[0].item():g}")
    if coupling is not None and not coupling.isfinite().all():
        raise ValueError(f"{_NAME}: coupling must be finite, got NaN or inf")
    if frustration and coupling is None:
        raise ValueError(f"{_NAME}: coupling must be given to show frustration, got None")
    if path is not None and Path(path).suffix.lower() != ".png":
        raise ValueError(f"{_NAME}: path must end in .png, got {os.fspath(path)!r}")
    try:
        from matplotlib.collections import EllipseCollection, LineCollection
        from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError(f"{_NAME}: needs matplotlib; pip install matplotlib") from error

    positions = chimera_positions(graph)
    pitch = graph.shore + 3
    width, height = graph.cols * pitch - 2, graph.rows * pitch - 2
    binary = bool(((bits == 0) | (bits == 1)).all())
    if ax is None:
        inch = min(0.16, 14 / max(width, height))  # per unit of length
        room = (0.0 if binary or not legend else 0.9, (0.3 if title else 0.0) + (0.4 if legend else 0.0))
        figsize = (max(4.0, inch * (width + 1)) + room[0], max(2.0, inch * (height + 1)) + room[1])
        ax = Figure(figsize=figsize, layout="constrained").subplots()
    figure = ax.get_figure()
    assert figure is not None

    colors, widths, marks = _edge_style(graph, bits, coupling, frustration)
    order = np.argsort(widths, kind="stable")  # wide edges above the others
    ends = positions[graph.edges.numpy()]
    ax.add_collection(LineCollection(list(ends[order]), colors=colors[order], linewidths=widths[order], zorder=1))
    size = np.full(len(bits), 0.8)
    units = EllipseCollection(
        size, size, 0 * size, units="xy", offsets=positions, offset_transform=ax.transData, array=bits.numpy(),
        cmap=cmap, clim=(0, 1), edgecolors="0.2", linewidths=0.4, zorder=2,
    )  # fmt: skip
    ax.add_collection(units)
    ax.set(xlim=(-1, width), ylim=(-height, 1), aspect="equal", title=title)
    ax.set_axis_off()
    if legend:
        if binary:
            dot: dict[str, Any] = {"marker": "o", "linestyle": "", "markeredgecolor": "0.2", "markersize": 7}
            ends_of_cmap = units.to_rgba(np.array([0.0, 1.0]))
            marks[:0] = [Line2D([], [], color=tuple(c), label=f"z = {z}", **dot) for z, c in enumerate(ends_of_cmap)]
        else:
            figure.colorbar(units, ax=ax, label="P(z = 1)", shrink=0.8, aspect=30, pad=0.02)
        if marks:
            spacing: dict[str, Any] = {
                "frameon": False,
                "fontsize": "small",
                "columnspacing": 1.2,
                "handletextpad": 0.4,
            }
            figure.legend(handles=marks, loc="outside lower center", ncols=4, **spacing)
    if path is not None:
        _save(figure, Path(path), dpi)
    return ax


def _edge_style(
    graph: ChimeraGraph, bits: Tensor, coupling: Tensor | None, frustration: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[Any]]:
    """Colours [E, 4] and line widths [E] of the edges, and the handles of their legend."""
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D

    colors = np.tile(to_rgba("0.7" if coupling is None else "0.9"), (len(graph.edges), 1))
    if coupling is None:
        return colors, np.full(len(colors), 0.6), []
    strength = coupling.detach().cpu().double().numpy()
    strength = strength / max(np.abs(strength).max(initial=0), np.finfo(float).tiny)
    if frustration:
        u, v = (2 * bits - 1).sign().numpy()[graph.edges.numpy().T]
        kinds = {"frustrated": (strength * u * v < 0, "tab:red"), "satisfied": (strength * u * v > 0, "0.6")}
        strength = np.minimum(strength * u * v, 0)
    else:
        kinds = {"coupling > 0": (strength > 0, "tab:blue"), "coupling < 0": (strength < 0, "tab:red")}
    for chosen, color in kinds.values():
        colors[chosen] = to_rgba(color)
        if not frustration:
            colors[chosen, 3] = 0.2 + 0.8 * np.abs(strength[chosen])
    marks = [Line2D([], [], color=color, linewidth=1.5, label=label) for label, (_, color) in kinds.items()]
    return colors, 0.6 + 1.4 * np.abs(strength), marks


def _save(figure: Any, path: Path, dpi: int) -> None:
    """Writes a PNG beside ``path``, then renames it: a reader sees the old file or the new one."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        # The message names the caller's file, not the temporary one. OSError chooses the subclass that fits the number.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
