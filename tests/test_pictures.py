# SPDX-License-Identifier: Apache-2.0
"""draw_chimera: where units and edges stand, which colours they have, and files that are whole or not there."""

import builtins

import numpy as np
import pytest
import torch
from dwave.graphs import chimera_graph, chimera_layout
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread

from gibbs_ext import ChimeraGraph, ColoredGraph
from gibbs_ext.pictures import chimera_positions, draw_chimera

PNG = b"\x89PNG\r\n\x1a\n"
RED, BLUE, GREY, FAINT = (to_rgba(c)[:3] for c in ("tab:red", "tab:blue", "0.6", "0.9"))


def parts(ax):
    """The collections of edges and of units."""
    edges, units = ax.collections
    ax.figure.draw_without_rendering()  # colours are computed when drawn
    return edges, units


@pytest.mark.parametrize("size", [(1, 1, 4), (3, 2, 4), (2, 5, 3), (2, 2, 1), (16, 16, 4)])
def test_units_stand_where_dwave_draws_them(size):
    """But for the scale, and with vacant nodes left out."""
    graph = ChimeraGraph(*size, missing_nodes=[1])
    whole = chimera_graph(*size)
    expected = chimera_layout(whole, scale=max(size[:2]) * (size[2] + 3) - 3)
    assert chimera_positions(graph) == pytest.approx(np.array([expected[label] for label in graph.labels]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_a_state_is_drawn(tmp_path, dtype):
    graph = ChimeraGraph(2, 3, missing_nodes=[0, 17], missing_edges=[(1, 4)])
    state = torch.randint(2, (graph.num_nodes,)).to(dtype)
    path = tmp_path / "state.png"
    ax = draw_chimera(graph, state, path, title="state")
    assert path.read_bytes().startswith(PNG)
    assert [p.name for p in tmp_path.iterdir()] == ["state.png"]
    picture = imread(path)
    assert min(picture.shape[:2]) > 200
    assert 0.05 < (picture[..., :3].min(-1) < 0.95).mean() < 0.5  # neither empty nor full
    edges, units = parts(ax)
    assert units.get_array().tolist() == state.tolist()
    assert len(units.get_offsets()) == graph.num_nodes
    assert len(edges.get_segments()) == len(graph.edges)
    drawn = {tuple(map(tuple, np.sort(segment, 0))) for segment in edges.get_segments()}
    expected = chimera_positions(graph)[graph.edges.numpy()]
    assert drawn == {tuple(map(tuple, np.sort(segment, 0))) for segment in expected}
    assert ax.get_title() == "state"
    assert [text.get_text() for text in ax.figure.legends[0].get_texts()] == ["z = 0", "z = 1"]


def test_marginals_have_a_colour_bar():
    graph = ChimeraGraph(2)
    ax = draw_chimera(graph, torch.linspace(0, 1, graph.num_nodes))
    _, units = parts(ax)
    assert units.get_clim() == (0, 1)
    assert len(np.unique(units.get_facecolor(), axis=0)) == graph.num_nodes
    assert [a.get_ylabel() for a in ax.figure.axes] == ["", "P(z = 1)"]


def edge_styles(ax, graph):
    """Colour and width of each edge, in the graph's order."""
    edges, _ = parts(ax)
    style = {
        tuple(segment.ravel()): (tuple(color), width)
        for segment, color, width in zip(edges.get_segments(), edges.get_colors(), edges.get_linewidths(), strict=True)
    }
    return [style[tuple(segment.ravel())] for segment in chimera_positions(graph)[graph.edges.numpy()]]


def test_couplings_colour_the_edges():
    graph = ChimeraGraph(1)
    coupling = torch.linspace(-1, 0.55, 16)
    styles = edge_styles(draw_chimera(graph, torch.zeros(8), coupling=coupling), graph)
    assert [color[:3] for color, _ in styles] == [BLUE if c > 0 else RED for c in coupling]
    order = coupling.abs().argsort().numpy()
    assert (np.diff(np.array([color[3] for color, _ in styles])[order]) > 0).all()
    assert (np.diff(np.array([width for _, width in styles])[order]) > 0).all()
    zero = edge_styles(draw_chimera(graph, torch.zeros(8), coupling=torch.zeros(16)), graph)
    assert {color[:3] for color, _ in zero} == {FAINT}


def test_frustrated_edges_are_red():
    graph = ChimeraGraph(2)
    values = torch.rand(graph.num_nodes)
    values[3] = 0.5
    coupling = torch.randn(len(graph.edges))
    coupling[5] = 0
    ax = draw_chimera(graph, values, coupling=coupling, frustration=True)
    spins = (2 * values - 1).sign()
    u, v = graph.edges.T
    satisfied = (coupling * spins[u] * spins[v]).sign().int().tolist()
    assert satisfied.count(0) == 1 + graph.degrees[3]
    expected = [{-1: RED, 0: FAINT, 1: GREY}[s] for s in satisfied]
    assert [color[:3] for color, _ in edge_styles(ax, graph)] == expected
    labels = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert labels == ["frustrated", "satisfied"]
    bits = draw_chimera(graph, values > 0.5, coupling=coupling, frustration=True)
    assert len(bits.figure.legends[0].get_texts()) == 4
    assert not draw_chimera(graph, values > 0.5, legend=False).figure.legends


def test_it_draws_on_axes_that_it_is_given(tmp_path):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    graph = ChimeraGraph(1)
    assert draw_chimera(graph, torch.zeros(8), ax=left) is left
    assert draw_chimera(graph, torch.ones(8), tmp_path / "two.png", ax=right, legend=False) is right
    assert len(left.collections) == len(right.collections) == 2
    assert (tmp_path / "two.png").read_bytes().startswith(PNG)


def test_nothing_is_changed():
    graph, values, coupling = ChimeraGraph(1), torch.rand(8), torch.randn(16, requires_grad=True)
    before = values.clone(), coupling.detach().clone()
    draw_chimera(graph, values, coupling=coupling)
    assert values.equal(before[0])
    assert coupling.equal(before[1])


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    graph, path = ChimeraGraph(1), tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space"):
            draw_chimera(graph, torch.zeros(8), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(OSError, match="nowhere"):
        draw_chimera(graph, torch.zeros(8), tmp_path / "nowhere" / "a.png")
    draw_chimera(graph, torch.zeros(8), str(path))
    assert path.read_bytes().startswith(PNG)


GRAPH = ChimeraGraph(1)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((ColoredGraph(2, [(0, 1)]), torch.zeros(2)), {}, TypeError, "graph must be a ChimeraGraph, got ColoredGraph"),
        ((GRAPH, None), {}, TypeError, "values must be a tensor, got NoneType"),
        ((GRAPH, [0] * 8), {}, TypeError, "values must be a tensor, got list"),
        ((GRAPH, torch.zeros(7)), {}, ValueError, r"values must have shape \[8\], got \[7\]"),
        ((GRAPH, torch.zeros(1, 8)), {}, ValueError, r"values must have shape \[8\], got \[1, 8\]"),
        ((GRAPH, torch.full((8,), 1.5)), {}, ValueError, r"values must lie in \[0, 1\], got 1.5"),
        ((GRAPH, torch.full((8,), -1)), {}, ValueError, r"values must lie in \[0, 1\], got -1"),
        ((GRAPH, torch.full((8,), torch.nan)), {}, ValueError, r"values must lie in \[0, 1\], got nan"),
        (
            (GRAPH, torch.zeros(8)),
            {"coupling": torch.zeros(15)},
            ValueError,
            r"coupling must have shape \[16\], got \[15\]",
        ),
        (
            (GRAPH, torch.zeros(8)),
            {"coupling": torch.zeros(2, 16)},
            ValueError,
            r"coupling must have shape \[16\], got \[2, 16\]",
        ),
        ((GRAPH, torch.zeros(8)), {"coupling": torch.full((16,), torch.inf)}, ValueError, "coupling must be finite"),
        ((GRAPH, torch.zeros(8)), {"frustration": True}, ValueError, "coupling must be given .*, got None"),
    ],
)
def test_bad_input(tmp_path, arguments, options, kind, message):
    with pytest.raises(kind, match=f"^draw_chimera: {message}"):
        draw_chimera(*arguments, tmp_path / "a.png", **options)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_so(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"^draw_chimera: needs matplotlib"):
        draw_chimera(GRAPH, torch.zeros(8))


def test_errors_name_the_path_given(tmp_path):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for path in (tmp_path / "nowhere" / "a.png", folder):
        with pytest.raises(OSError, match=r"\.png") as caught:
            draw_chimera(GRAPH, torch.zeros(8), path)
        assert caught.value.filename == str(path)
        assert ".tmp" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]
    with pytest.raises(ValueError, match=r"^draw_chimera: path must end in \.png, got '.*a\.pdf'$"):
        draw_chimera(GRAPH, torch.zeros(8), tmp_path / "a.pdf")
