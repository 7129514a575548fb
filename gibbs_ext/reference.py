# SPDX-License-Identifier: Apache-2.0
"""The contract of csrc/README.md in plain Python: readable, slow, and the oracle of every test.

Binary sweeps are done in the contract's own integer and float32 arithmetic, so the compiled ops must agree with them
to the bit. Relaxed sweeps are float64 PyTorch code that autograd differentiates: the oracle of the hand-written
backward. Signatures are those of the public functions, so this is also the "pure-Python sampler" of the benchmarks.

A unit of a bipartite model is numbered left i -> i, right j -> n1 + j, that of a graph as its node. Its random word in
one sweep of one chain is ``(high byte << 24) | low 24 bits``, which two *planes* of Philox counters supply (see
:func:`random_words`).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint32]

_MASK32 = 0xFFFFFFFF


# Random words -----------------------------------------------------------------------------------------------------


def philox(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of Salmon et al. 2011, over broadcasting arrays of counters.

    Args:
        counter: Four integer arrays (or ints), each word in [0, 2^32).
        key: Two integer arrays (or ints), each word in [0, 2^32).

    Returns:
        Four uint32 arrays of the broadcast shape.
    """
    # twin: csrc/core/philox.h
    c0, c1, c2, c3, k0, k1 = (np.asarray(word, dtype=np.uint64) for word in (*counter, *key))
    mask, shift = np.uint64(_MASK32), np.uint64(32)
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (product1 >> shift) ^ c1 ^ k0, product1 & mask, (product0 >> shift) ^ c3 ^ k1, product0 & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    w0, w1, w2, w3 = (word.astype(np.uint32) for word in np.broadcast_arrays(c0, c1, c2, c3))
    return w0, w1, w2, w3


def _plane(seed: int, chain: NDArray[np.int64], sweep: int, plane: int, num_groups: int, stream: int) -> Words:
    """All four output words of the counters ``group = 0 .. num_groups - 1`` of one plane: [B, num_groups, 4]."""
    chains = chain.astype(np.uint64)[:, None]
    group = np.arange(num_groups, dtype=np.uint64)[None, :]
    counter = (
        np.uint64(plane << 30) | group,
        chains & np.uint64(_MASK32),
        sweep & _MASK32,
        np.uint64(stream << 28 | (sweep >> 32 & 0xFFF) << 16) | (chains >> np.uint64(32) & np.uint64(0xFFFF)),
    )
    return np.stack(philox(counter, (seed & _MASK32, seed >> 32 & _MASK32)), axis=-1)


def random_words(seed: int, chain: NDArray[np.int64], sweep: int, num_units: int, stream: int = 0) -> Words:
    """The 32-bit random words of units ``0 .. num_units - 1``.

    Args:
        seed: Any 64-bit integer (two's complement when negative).
        chain: [B] chain numbers in [0, 2^48).
        sweep: Sweep number in [0, 2^44).
        num_units: How many units.
        stream: 0 of sweeps, 1 of swaps, 2 of cluster moves; 3 to 15 are reserved.

    Returns:
        [B, num_units] uint32.
    """
    unit = np.arange(num_units)
    high_words = _plane(seed, chain, sweep, 0, 8 * math.ceil(num_units / 128), stream)
    high_word = high_words[:, (unit >> 7) * 8 + ((unit >> 2) & 7), (unit >> 5) & 3]
    high = high_word >> (8 * (unit & 3)).astype(np.uint32) & np.uint32(0xFF)
    low_words = _plane(seed, chain, sweep, 1, 8 * math.ceil(num_units / 32), stream)
    low = low_words[:, (unit >> 5) * 8 + (unit & 7), (unit >> 3) & 3] & np.uint32(0xFFFFFF)
    words: Words = high << np.uint32(24) | low
    return words


def random_word(seed: int, chain: int, sweep: int, unit: int) -> int:
    """The random word of one unit; see :func:`random_words`."""
    return int(random_words(seed, np.array([chain]), sweep, unit + 1)[0, unit])


def uniform(words: Words, dtype: torch.dtype) -> NDArray[np.float64]:
    """Uniforms strictly inside (0, 1), exactly those that relaxed sweeps of this dtype use.

    Args:
        words: uint32, any shape.
        dtype: ``torch.float32`` (23 bits of the word) or ``torch.float64`` (all 32).
    """
    if dtype == torch.float32:
        return ((words >> np.uint32(9)).astype(np.float64) + 0.5) * 2.0**-23
    return (words.astype(np.float64) + 0.5) * 2.0**-32


# Fixed point ------------------------------------------------------------------------------------------------------


def _round(
    couplings: NDArray[Any], degree: int, largest_sum: Callable[[NDArray[np.int64]], int]
) -> tuple[NDArray[np.int32], int]:
    """Rounds couplings of units with at most ``degree`` neighbours each; ``largest_sum`` is that over any unit's."""
    # twin: csrc/core/fixed_point.h
    exact = np.asarray(couplings, dtype=np.float64)
    largest = float(np.abs(exact).max(initial=0.0))
    if not largest < 2.0**127:
        raise ValueError("round_couplings: couplings must be finite and below 2^127 in magnitude")
    if largest == 0:
        return np.zeros(exact.shape, np.int32), 30
    exponent = math.frexp(largest)[1]
    bits = 30 - (degree - 1).bit_length()
    # A coupling that underflows here still counts as one: ceil of something positive.
    scaled = np.maximum(np.ceil(np.ldexp(np.abs(exact), bits - exponent)), exact != 0).astype(np.int64)
    headroom = (2**31 - 1 - (degree + 1) // 2) // largest_sum(scaled)
    k = min(30, headroom.bit_length() - 1 + bits - exponent)
    return np.rint(np.ldexp(exact, k)).astype(np.int32), k


def round_couplings(weight: NDArray[Any]) -> tuple[NDArray[np.int32], int]:
    """Rounds one model's couplings to integers ``round(weight * 2^k)`` with the largest safe k <= 30.

    Safe means that no unit's sum of |coupling| leaves 31 bits, by a bound that is itself exact integer arithmetic,
    so that every implementation finds the same k.

    Args:
        weight: [n1, n2] float32 or float64, finite, |weight| < 2^127.

    Returns:
        The couplings [n1, n2] int32 and k.
    """
    return _round(weight, max(np.shape(weight)), lambda q: int(max(q.sum(axis=0).max(), q.sum(axis=1).max())))


def round_graph_couplings(
    coupling: NDArray[Any], edges: NDArray[np.int64], num_nodes: int
) -> tuple[NDArray[np.int32], int]:
    """:func:`round_couplings` for a graph.

    Args:
        coupling: [E] float32 or float64, finite, |coupling| < 2^127.
        edges: [E, 2] node numbers.
        num_nodes: How many nodes.

    Returns:
        The couplings [E] int32 and k.
    """

    def at_nodes(per_edge: NDArray[np.int64]) -> int:
        sums = np.zeros(num_nodes, np.int64)
        np.add.at(sums, edges, per_edge[:, None])
        return int(sums.max(initial=0))

    return _round(coupling, at_nodes(np.ones(len(edges), np.int64)), at_nodes)


def threshold(logit: NDArray[np.float32]) -> Words:
    """``sigmoid(logit) * 2^32`` by the contract's float32 steps (csrc/README.md), each rounded once.

    The small tail is computed and mirrored in integers, so ``threshold(-x) + threshold(x) == 2^32`` (saturating at
    2^32 - 1).

    Args:
        logit: float32, any shape, not NaN.

    Returns:
        uint32 of the same shape.
    """
    # twin: csrc/core/threshold.h
    logit = np.asarray(logit, dtype=np.float32)
    e = _exp_of_negative(logit)
    s = e / (np.float32(1) + e)
    t = (s * np.float32(2.0**32)).astype(np.uint64)
    mirrored = np.where(t == 0, np.uint64(2**32 - 1), np.uint64(2**32) - t)
    return np.where(logit > 0, mirrored, t).astype(np.uint32)


def acceptance(logit: NDArray[np.float32]) -> Words:
    """``exp(logit) * 2^32`` for logits below 0 by the contract's float32 steps, each rounded once.

    Args:
        logit: float32, any shape, below 0.

    Returns:
        uint32 of the same shape; at most 2^32 - 1.
    """
    # twin: csrc/core/threshold.h
    e = _exp_of_negative(np.asarray(logit, dtype=np.float32))
    return np.minimum((e * np.float32(2.0**32)).astype(np.uint64), 2**32 - 1).astype(np.uint32)


def _exp_of_negative(logit: NDArray[np.float32]) -> NDArray[np.float32]:
    """``exp(-min(|logit|, 90))``."""
    f = np.float32
    a = np.minimum(np.abs(logit), f(90))
    n = np.trunc(a * f(1.44269504) + f(0.5))
    r = n * f(0.693359375) - a
    r = r - n * f(2.12194440e-4)
    p = np.full_like(r, f(1.9875691500e-4))
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + f(c)
    y = p * (r * r)
    y = y + r
    y = y + f(1)
    power = np.where(n >= 127, f(0), np.ldexp(f(1), -np.minimum(n, f(127)).astype(np.int32)))
    e: NDArray[np.float32] = y * power
    return e


# Broadcasting -----------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """A broadcast batch laid out as B rows, and where each row finds its model."""

    shape: torch.Size  # S
    chains: NDArray[np.int64]  # [B]
    model_of_row: NDArray[np.int64]  # [B]
    coupling: NDArray[np.float64]  # [models, n1, n2] or [models, E] integers, held in float64
    scale: NDArray[np.float32]  # [B, 1] 2^-k


def _prepare(
    coupling: Tensor, chain_offset: int | Tensor, states: Sequence[Tensor | None], graph: "Graph | None" = None
) -> _Batch:
    """``states``: every tensor [..., units] of the call, masks too. Without a graph, coupling is [..., n1, n2]."""
    own_dims = 2 if graph is None else 1
    model_shape, own_shape = coupling.shape[:-own_dims], coupling.shape[-own_dims:]
    shapes = [t.shape[:-1] for t in states if t is not None]
    if isinstance(chain_offset, Tensor):
        shapes.append(chain_offset.shape)
    shape = torch.broadcast_shapes(model_shape, *shapes)
    if isinstance(chain_offset, Tensor):
        chains = chain_offset.expand(shape).reshape(-1).numpy().astype(np.int64)
    else:
        chains = chain_offset + np.arange(math.prod(shape), dtype=np.int64)
    models = coupling.detach().reshape(math.prod(model_shape), *own_shape)
    models = models if models.dtype == torch.float64 else models.float()
    if graph is None:
        rounded = [round_couplings(model.numpy()) for model in models]
    else:
        rounded = [round_graph_couplings(model.numpy(), graph.edges.numpy(), graph.num_nodes) for model in models]
    integers = np.array([q for q, _ in rounded], np.float64).reshape(models.shape)
    model_of_row = torch.arange(len(rounded)).reshape(model_shape).expand(shape).reshape(-1).numpy()
    scale = np.array([2.0**-k for _, k in rounded], dtype=np.float32)[model_of_row][:, None]
    return _Batch(shape, chains, model_of_row, integers, scale)


def _rows(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> NDArray[Any]:
    """``tensor`` broadcast to the batch shape, as [B, n]."""
    return tensor.detach().to(dtype).expand(*shape, tensor.shape[-1]).reshape(-1, tensor.shape[-1]).numpy()


def _mask(clamp: Tensor | None, num_units: int, shape: torch.Size) -> NDArray[np.bool_] | bool:
    """A clamp as [B, n]; it may also be one value for all units."""
    return False if clamp is None else _rows(clamp.expand(*clamp.shape[:-1], num_units), shape, torch.bool)


def _integer_fields(state: NDArray[np.float64], batch: _Batch, transpose: bool) -> NDArray[np.float64]:
    """Sums of the couplings to the units that are 1. Exact: every partial sum is an integer below 2^53."""
    coupling = batch.coupling.swapaxes(-1, -2) if transpose else batch.coupling
    fields = np.zeros((state.shape[0], coupling.shape[-1]))
    for model, matrix in enumerate(coupling):
        rows = batch.model_of_row == model
        fields[rows] = state[rows] @ matrix
    return fields


def _logit(
    beta: NDArray[np.float32] | np.float32, sums: NDArray[np.float64], batch: _Batch, bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    """``beta * field`` in the contract's float32 steps; at beta = 0 it is 0 even where the field overflows."""
    # twin: csrc/core/threshold.h::binary_logit
    with np.errstate(over="ignore", invalid="ignore"):  # enormous couplings may make it infinite: see threshold()
        logit = beta * (sums.astype(np.float32) * batch.scale + bias)
    return np.where(beta == 0, np.float32(0), logit)


def _draw(logit: NDArray[np.float32], words: Words) -> NDArray[np.float64]:
    return (words < threshold(logit)).astype(np.float64)


def _flip(logit: NDArray[np.float32], words: Words, z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Metropolis's rule."""
    x = np.where(z == 1, -logit, logit)
    return np.where((x >= 0) | (words < acceptance(x)), 1 - z, z)


def _annealed_logit(
    beta: float, sums: NDArray[np.float64], batch: _Batch, bias: NDArray[np.float32], base: NDArray[np.float32]
) -> NDArray[np.float32]:
    """That of the path of AIS."""
    logit: NDArray[np.float32] = _logit(np.float32(beta), sums, batch, bias) + (np.float32(1) - np.float32(beta)) * base
    return logit


def _betas(beta: float | Sequence[float] | Tensor, num_sweeps: int) -> list[Tensor]:
    """Each sweep's beta, [1] or, of each chain, [..., 1]."""
    values = torch.as_tensor(beta, dtype=torch.float64)
    values = values if values.dim() > 1 else values.reshape(-1)
    return list(values.expand(*values.shape[:-1], num_sweeps).split(1, -1))[
        :num_sweeps
    ]  # split makes one piece of an empty tensor


def _schedule(betas: Sequence[float] | Tensor) -> list[float]:
    values: list[float] = torch.as_tensor(betas, dtype=torch.float64).tolist()
    return values


def _seed(generator: torch.Generator | None, seed: int | Tensor | None) -> int:
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator)
    return int(seed)


def _like(rows: NDArray[Any], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(rows).reshape(*shape, rows.shape[-1]).to(dtype)


# Binary sweeps ----------------------------------------------------------------------------------------------------


def bipartite_gibbs_reference(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    num_sweeps: int,
    *,
    beta: float | Sequence[float] | Tensor = 1.0,
    right: Tensor | None = None,
    clamp_left: Tensor | None = None,
    clamp_right: Tensor | None = None,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`gibbs_ext.bipartite_gibbs` must return, to the bit. Arguments are the same; none are checked."""
    n1, n2 = weight.shape[-2:]
    key = _seed(generator, seed)
    betas = _betas(beta, num_sweeps)
    batch = _prepare(weight, chain_offset, (left, right, left_bias, right_bias, clamp_left, clamp_right, *betas))
    z_left = _rows(left, batch.shape, torch.float64)
    z_right = np.zeros((len(z_left), n2)) if right is None else _rows(right, batch.shape, torch.float64)
    b_left, b_right = (_rows(bias, batch.shape, torch.float32) for bias in (left_bias, right_bias))
    fixed_left, fixed_right = _mask(clamp_left, n1, batch.shape), _mask(clamp_right, n2, batch.shape)

    for sweep, of_chains in enumerate(betas, start=sweep_offset):
        b = _rows(of_chains, batch.shape, torch.float32)
        words = random_words(key, batch.chains, sweep, n1 + n2)
        logit = _logit(b, _integer_fields(z_left, batch, transpose=False), batch, b_right)
        z_right = np.where(fixed_right, z_right, _draw(logit, words[:, n1:]))
        logit = _logit(b, _integer_fields(z_right, batch, transpose=True), batch, b_left)
        z_left = np.where(fixed_left, z_left, _draw(logit, words[:, :n1]))
    return _like(z_left, batch.shape, left.dtype), _like(z_right, batch.shape, left.dtype)


# Relaxed sweeps ---------------------------------------------------------------------------------------------------


def relax(
    field: Tensor, u: Tensor, beta: float | Tensor, relaxation: str, sharpness: float, slope_gradient: bool
) -> tuple[Tensor, Tensor]:
    """One relaxed update.

    With ``q = sigmoid(beta * field)``:

    - ``pwl``: ``zeta = clip(0.5 + slope * (u - (1 - q)), 0, 1)``, ``slope = sharpness / 4 / (q * (1 - q) + 1e-2)``;
    - ``concrete``: ``zeta = sigmoid(sharpness * (beta * field + logit(u)))``;
    - ``straight_through``: ``zeta = [u > 1 - q]``, whose derivative is taken to be that of q;
    - ``mean_field``: ``zeta = q``.

    Args:
        field: float64, any shape: ``bias + coupling @ z``, before beta.
        u: Uniforms in (0, 1) of the same shape.
        beta: Inverse temperature, one or one for each chain, [..., 1].
        relaxation: One of the names above.
        sharpness: Of ``pwl`` and ``concrete``.
        slope_gradient: Whether ``pwl`` differentiates its slope.

    Returns:
        zeta and q.
    """
    logit = beta * field
    q = torch.sigmoid(logit)
    if relaxation == "pwl":
        slope = sharpness / 4 / (q * (1 - q) + 1e-2)
        slope = slope if slope_gradient else slope.detach()
        zeta = torch.clamp(0.5 + slope * (u - (1 - q)), 0, 1)
    elif relaxation == "concrete":
        zeta = torch.sigmoid(sharpness * (logit + torch.logit(u)))
    elif relaxation == "straight_through":
        zeta = (u > 1 - q).to(q.dtype) + (q - q.detach())
    elif relaxation == "mean_field":
        zeta = q
    else:
        raise ValueError(f"relax: unknown relaxation {relaxation!r}")
    return zeta, q


def bipartite_gibbs_relaxed_reference(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    num_sweeps: int = 10,
    num_relaxed_sweeps: int = 1,
    *,
    relaxation: str = "pwl",
    sharpness: float = 4.0,
    slope_gradient: bool = True,
    beta: float | Sequence[float] | Tensor = 1.0,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, ...]:
    """What :func:`gibbs_ext.bipartite_gibbs_relaxed` computes, in float64 and differentiable by autograd.

    The uniforms are those of the parameters' dtype, so a float32 call is approximated by the same draws. Outputs are
    float64 whatever the parameters' dtype; arguments are the same as the public function's and not checked.
    """
    key = _seed(generator, seed)
    n1, n2 = weight.shape[-2:]
    betas = _betas(beta, num_sweeps + num_relaxed_sweeps)
    state = left.to(torch.float64)
    if num_sweeps:
        state, _ = bipartite_gibbs_reference(
            state, left_bias, right_bias, weight, num_sweeps, beta=torch.cat(betas[:num_sweeps], -1),
            chain_offset=chain_offset, sweep_offset=sweep_offset, seed=key,
        )  # fmt: skip
    batch = _prepare(weight, chain_offset, (left, left_bias, right_bias, *betas))
    w, b_left, b_right = weight.double(), left_bias.double(), right_bias.double()
    state = state.expand(*batch.shape, n1)
    z_left = state
    for sweep, b in enumerate(betas[num_sweeps:], start=sweep_offset + num_sweeps):
        words = random_words(key, batch.chains, sweep, n1 + n2)
        u = torch.from_numpy(uniform(words, weight.dtype)).reshape(*batch.shape, n1 + n2)
        field = (z_left.unsqueeze(-2) @ w).squeeze(-2) + b_right
        z_right, _ = relax(field, u[..., n1:], b, relaxation, sharpness, slope_gradient)
        field = (w @ z_right.unsqueeze(-1)).squeeze(-1) + b_left
        z_left, left_mean = relax(field, u[..., :n1], b, relaxation, sharpness, slope_gradient)
    return (z_left, z_right, left_mean, state) if return_state else (z_left, z_right, left_mean)


# Annealed importance sampling -------------------------------------------------------------------------------------


def bipartite_ais_reference(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    base_left_bias: Tensor,
    base_right_bias: Tensor,
    betas: Sequence[float] | Tensor,
    *,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`gibbs_ext.bipartite_ais` must return: states to the bit, log-weights to float64 accuracy."""
    n1, n2 = weight.shape[-2:]
    key = _seed(generator, seed)
    schedule = _schedule(betas)
    parameters = (left_bias, right_bias, base_left_bias, base_right_bias)
    batch = _prepare(weight, chain_offset, (left, *parameters))
    b_left, b_right, base_left, base_right = (_rows(bias, batch.shape, torch.float32) for bias in parameters)
    exact = [_rows(bias, batch.shape, torch.float64) for bias in parameters]
    z_left = _rows(left, batch.shape, torch.float64)
    z_right = np.zeros((len(z_left), n2))
    log_weights = np.zeros(len(z_left))

    def log_f(b: float, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        on_left = (z_left * (b * exact[0] + (1 - b) * exact[2])).sum(-1)
        logit = b * (sums * batch.scale.astype(np.float64) + exact[1]) + (1 - b) * exact[3]
        total: NDArray[np.float64] = on_left + np.logaddexp(0, logit).sum(-1)
        return total

    for sweep, (before, after) in enumerate(itertools.pairwise(schedule), start=sweep_offset):
        sums = _integer_fields(z_left, batch, transpose=False)
        log_weights += log_f(after, sums) - log_f(before, sums)
        words = random_words(key, batch.chains, sweep, n1 + n2)
        z_right = _draw(_annealed_logit(after, sums, batch, b_right, base_right), words[:, n1:])
        sums = _integer_fields(z_right, batch, transpose=True)
        z_left = _draw(_annealed_logit(after, sums, batch, b_left, base_left), words[:, :n1])
    return (
        _like(z_left, batch.shape, left.dtype),
        _like(z_right, batch.shape, left.dtype),
        torch.from_numpy(log_weights).reshape(batch.shape),
    )


# Coloured graphs --------------------------------------------------------------------------------------------------


class Graph(Protocol):
    """What a reference wants of a :class:`gibbs_ext.ColoredGraph`."""

    @property
    def num_nodes(self) -> int: ...
    @property
    def edges(self) -> Tensor: ...  # [E, 2] int64
    @property
    def colors(self) -> Tensor: ...  # [N] int64


class _Color(NamedTuple):
    """The n units of a colour with their neighbours, padded to one number of them by edge E, whose coupling is 0."""

    units: NDArray[np.int64]  # [n]
    neighbors: NDArray[np.int64]  # [n, degree] units
    edges: NDArray[np.int64]  # [n, degree] which coupling

    def integer_fields(self, state: NDArray[np.float64], batch: _Batch) -> NDArray[np.float64]:
        """[B, n] sums of the couplings to the neighbours that are 1; exact."""
        coupling = np.pad(batch.coupling, ((0, 0), (0, 1)))[batch.model_of_row]
        sums: NDArray[np.float64] = (coupling[:, self.edges] * state[:, self.neighbors]).sum(-1)
        return sums

    def fields(self, state: Tensor, bias: Tensor, coupling: Tensor) -> Tensor:
        """[..., n] differentiable fields of a relaxed state."""
        coupling = torch.nn.functional.pad(coupling, (0, 1))
        return bias[..., self.units] + (coupling[..., self.edges] * state[..., self.neighbors]).sum(-1)


def _colors(graph: Graph) -> list[_Color]:
    """In the order of a sweep."""
    edges, colors = graph.edges.numpy(), graph.colors.numpy()
    degrees = np.bincount(edges.reshape(-1), minlength=graph.num_nodes)
    neighbors = np.zeros((graph.num_nodes, degrees.max(initial=0)), np.int64)
    edge_of = np.full_like(neighbors, len(edges))
    filled = np.zeros_like(degrees)
    for e, (u, v) in enumerate(edges.tolist()):
        for here, there in ((u, v), (v, u)):
            neighbors[here, filled[here]], edge_of[here, filled[here]] = there, e
            filled[here] += 1
    classes = [np.flatnonzero(colors == color) for color in range(colors.max(initial=-1) + 1)]
    return [_Color(units, neighbors[units], edge_of[units]) for units in classes]


def graph_gibbs_reference(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    graph: Graph,
    num_sweeps: int,
    *,
    beta: float | Sequence[float] | Tensor = 1.0,
    clamp: Tensor | None = None,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """What :func:`gibbs_ext.graph_gibbs` must return, to the bit. Arguments are the same; none are checked."""
    return _graph_sweeps(
        lambda logit, words, z: _draw(logit, words), state, bias, coupling, graph, num_sweeps, beta, clamp,
        chain_offset, sweep_offset, _seed(generator, seed),
    )  # fmt: skip


def graph_metropolis_reference(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    graph: Graph,
    num_sweeps: int,
    *,
    beta: float | Sequence[float] | Tensor = 1.0,
    clamp: Tensor | None = None,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """What :func:`gibbs_ext.graph_metropolis` must return, to the bit. Arguments are the same; none are checked."""
    return _graph_sweeps(
        _flip, state, bias, coupling, graph, num_sweeps, beta, clamp, chain_offset, sweep_offset,
        _seed(generator, seed),
    )  # fmt: skip


def _graph_sweeps(
    update: Callable[[NDArray[np.float32], Words, NDArray[np.float64]], NDArray[np.float64]],
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    graph: Graph,
    num_sweeps: int,
    beta: float | Sequence[float] | Tensor,
    clamp: Tensor | None,
    chain_offset: int | Tensor,
    sweep_offset: int,
    key: int,
) -> Tensor:
    """Sweeps in which ``update`` makes a colour's new values of its logits, random words and values."""
    betas = _betas(beta, num_sweeps)
    batch = _prepare(coupling, chain_offset, (state, bias, clamp, *betas), graph)
    z = _rows(state, batch.shape, torch.float64).copy()
    biases = _rows(bias, batch.shape, torch.float32)
    fixed = np.broadcast_to(_mask(clamp, graph.num_nodes, batch.shape), z.shape)
    colors = _colors(graph)
    for sweep, of_chains in enumerate(betas, start=sweep_offset):
        b = _rows(of_chains, batch.shape, torch.float32)
        words = random_words(key, batch.chains, sweep, graph.num_nodes)
        for color in colors:
            units = color.units
            logit = _logit(b, color.integer_fields(z, batch), batch, biases[:, units])
            z[:, units] = np.where(fixed[:, units], z[:, units], update(logit, words[:, units], z[:, units]))
    return _like(z, batch.shape, state.dtype)


def graph_gibbs_relaxed_reference(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    graph: Graph,
    num_sweeps: int = 10,
    num_relaxed_sweeps: int = 1,
    *,
    relaxation: str = "pwl",
    sharpness: float = 4.0,
    slope_gradient: bool = True,
    beta: float | Sequence[float] | Tensor = 1.0,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, ...]:
    """What :func:`gibbs_ext.graph_gibbs_relaxed` computes, in float64 and differentiable by autograd.

    As :func:`bipartite_gibbs_relaxed_reference` is to its op.
    """
    key = _seed(generator, seed)
    betas = _betas(beta, num_sweeps + num_relaxed_sweeps)
    start = state.to(torch.float64)
    if num_sweeps:
        start = graph_gibbs_reference(
            start, bias, coupling, graph, num_sweeps, beta=torch.cat(betas[:num_sweeps], -1),
            chain_offset=chain_offset, sweep_offset=sweep_offset, seed=key,
        )  # fmt: skip
    batch = _prepare(coupling, chain_offset, (state, bias, *betas), graph)
    start = start.expand(*batch.shape, graph.num_nodes)
    zeta, mean = start, torch.zeros_like(start)
    colors = _colors(graph)
    for sweep, b in enumerate(betas[num_sweeps:], start=sweep_offset + num_sweeps):
        words = random_words(key, batch.chains, sweep, graph.num_nodes)
        u = torch.from_numpy(uniform(words, coupling.dtype)).reshape(start.shape)
        for color in colors:
            field = color.fields(zeta, bias.double(), coupling.double())
            relaxed, q = relax(field, u[..., color.units], b, relaxation, sharpness, slope_gradient)
            units = torch.from_numpy(color.units)
            zeta, mean = zeta.index_copy(-1, units, relaxed), mean.index_copy(-1, units, q)
    return (zeta, mean, start) if return_state else (zeta, mean)


def graph_ais_reference(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    graph: Graph,
    base_bias: Tensor,
    betas: Sequence[float] | Tensor,
    *,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`gibbs_ext.graph_ais` must return: states to the bit, log-weights to float64 accuracy."""
    key = _seed(generator, seed)
    schedule = _schedule(betas)
    batch = _prepare(coupling, chain_offset, (state, bias, base_bias), graph)
    biases, bases = (_rows(t, batch.shape, torch.float32) for t in (bias, base_bias))
    exact_bias, exact_base = (_rows(t, batch.shape, torch.float64) for t in (bias, base_bias))
    exact_coupling = batch.coupling[batch.model_of_row] * batch.scale.astype(np.float64)
    z = _rows(state, batch.shape, torch.float64).copy()
    log_weights = np.zeros(len(z))
    colors = _colors(graph)
    summed_out, ends = colors[0], graph.edges.numpy()

    def log_f(b: float) -> NDArray[np.float64]:
        rest = z.copy()
        rest[:, summed_out.units] = 0
        at_units = b * exact_bias + (1 - b) * exact_base
        inside = (exact_coupling * rest[:, ends[:, 0]] * rest[:, ends[:, 1]]).sum(-1)
        fields = summed_out.integer_fields(z, batch) * batch.scale.astype(np.float64)
        total: NDArray[np.float64] = (
            (rest * at_units).sum(-1) + b * inside + np.logaddexp(0, b * fields + at_units[:, summed_out.units]).sum(-1)
        )
        return total

    for sweep, (before, after) in enumerate(itertools.pairwise(schedule), start=sweep_offset):
        log_weights += log_f(after) - log_f(before)
        words = random_words(key, batch.chains, sweep, graph.num_nodes)
        for color in colors:
            units = color.units
            sums = color.integer_fields(z, batch)
            logit = _annealed_logit(after, sums, batch, biases[:, units], bases[:, units])
            z[:, units] = _draw(logit, words[:, units])
    return _like(z, batch.shape, state.dtype), torch.from_numpy(log_weights).reshape(batch.shape)


# Energies of states -----------------------------------------------------------------------------------------------

Energy = Callable[[Tensor], NDArray[np.float64]]


def _bipartite_energy(
    left: Tensor, left_bias: Tensor, right_bias: Tensor, weight: Tensor, chains: int | Tensor
) -> Energy:
    """Gives the energies [B] of the states z [..., n1 + n2] of all B chains, to the bit (csrc/README.md, 2.7)."""
    n1 = weight.shape[-2]
    batch = _prepare(weight, chains, (left, left_bias, right_bias))
    b_left, b_right = (_rows(bias, batch.shape, torch.float32) for bias in (left_bias, right_bias))

    def energy(z: Tensor) -> NDArray[np.float64]:
        z_left, z_right = (_rows(part, batch.shape, torch.float64) for part in (z[..., :n1], z[..., n1:]))
        of_left = _integer_fields(z_right, batch, transpose=True) * batch.scale.astype(np.float64) + b_left
        return _energy(np.concatenate([z_right * b_right.astype(np.float64), z_left * of_left], 1))

    return energy


def _graph_energy(state: Tensor, bias: Tensor, coupling: Tensor, graph: Graph, chains: int | Tensor) -> Energy:
    """As :func:`_bipartite_energy`."""
    batch = _prepare(coupling, chains, (state, bias), graph)
    biases, colors = _rows(bias, batch.shape, torch.float32), _colors(graph)

    def energy(z: Tensor) -> NDArray[np.float64]:
        rows = _rows(z, batch.shape, torch.float64)
        before = np.zeros_like(rows)
        terms = []
        for color in colors:
            fields = color.integer_fields(before, batch) * batch.scale.astype(np.float64)
            terms.append(rows[:, color.units] * (fields + biases[:, color.units]))
            before[:, color.units] = rows[:, color.units]
        return _energy(np.concatenate(terms, 1))

    return energy


def _energy(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Energies [B]: minus the sums of terms [B, n], added one after the other."""
    energies: NDArray[np.float64] = -np.cumsum(terms, axis=1)[:, -1]
    return energies


# Parallel tempering -----------------------------------------------------------------------------------------------


def bipartite_tempering_reference(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    betas: Sequence[float] | Tensor,
    num_swaps: int,
    *,
    sweeps_per_swap: int = 1,
    chains: Tensor,
    sweep_offset: int = 0,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op ``bipartite_tempering`` must return, to the bit.

    Args:
        left: [B, ..., n1] states at each of the betas [B].
        left_bias: [..., n1].
        right_bias: [..., n2].
        weight: [..., n1, n2].
        betas: The ladder [B].
        num_swaps: Number of rounds of sweeps and swaps.
        sweeps_per_swap: Number of sweeps of a round.
        chains: [B, ...] numbers of the replicas: that of column c's replica r is ``c * B + r``.
        sweep_offset: Number of the first sweep.
        seed: Any 64-bit integer.

    Returns:
        left and right at each beta; the energies [num_swaps, B, ...] before each round's swaps, and the numbers of the
        replicas at each beta after them.
    """
    n1 = weight.shape[-2]
    energy = _bipartite_energy(left, left_bias, right_bias, weight, chains)

    def sweep(z: Tensor, **options: Any) -> Tensor:
        sides = bipartite_gibbs_reference(
            z[..., :n1], left_bias, right_bias, weight, sweeps_per_swap, seed=seed, **options
        )
        return torch.cat(sides, -1)

    start = torch.cat([left, left.new_zeros(*left.shape[:-1], weight.shape[-1])], -1)
    z, energies, chains_at = _temper(
        start, betas, num_swaps, sweeps_per_swap, chains, sweep_offset, seed, sweep, energy
    )
    return z[..., :n1], z[..., n1:], energies, chains_at


def graph_tempering_reference(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    graph: Graph,
    betas: Sequence[float] | Tensor,
    num_swaps: int,
    *,
    sweeps_per_swap: int = 1,
    chains: Tensor,
    sweep_offset: int = 0,
    seed: int,
    cluster_moves: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op ``graph_tempering`` must return, to the bit: as :func:`bipartite_tempering_reference`.

    With ``cluster_moves`` neighbouring chains of the second batch dim exchange clusters between sweeps and swaps.
    """
    batch = _prepare(coupling, chains, (state, bias), graph)
    energy = _graph_energy(state, bias, coupling, graph, chains)

    def sweep(z: Tensor, **options: Any) -> Tensor:
        z = graph_gibbs_reference(z, bias, coupling, graph, sweeps_per_swap, seed=seed, **options)
        if cluster_moves:
            last = options["sweep_offset"] + sweeps_per_swap - 1
            z = _move_clusters(z, batch, graph, options["chain_offset"], seed, last)
        return z

    return _temper(state, betas, num_swaps, sweeps_per_swap, chains, sweep_offset, seed, sweep, energy)


def _move_clusters(z: Tensor, batch: _Batch, graph: Graph, chains: Tensor, seed: int, sweep: int) -> Tensor:
    """States [B, C, ..., N] after a cluster move of each pair of chains 2 c and 2 c + 1 at each beta."""
    # twin: csrc/core/tempering.h
    z, edges, models = z.clone(), graph.edges.tolist(), torch.from_numpy(batch.model_of_row).reshape(batch.shape)
    for index in np.ndindex(*batch.shape) if len(batch.shape) > 1 else ():
        b, c, *rest = index
        if c % 2 or c + 1 == batch.shape[1]:
            continue
        first, second = z[index], z[(b, c + 1, *rest)]
        differing = (first != second).nonzero()[:, 0].tolist()
        if not differing:
            continue
        column = int(chains[index]) // batch.shape[0]
        word = int(random_words(seed, np.array([column]), sweep, b + 1, stream=2)[0, b])
        cluster = {differing[word * len(differing) >> 32]}
        waiting, coupling = list(cluster), batch.coupling[int(models[index])]
        while waiting:
            unit = waiting.pop()
            for e, ends in enumerate(edges):
                if unit in ends and coupling[e]:
                    found = {sum(ends) - unit} & set(differing) - cluster
                    cluster |= found
                    waiting += found
        units = list(cluster)
        first[units], second[units] = second[units], first[units]
    return z


def _temper(
    z: Tensor,
    betas: Sequence[float] | Tensor,
    num_swaps: int,
    sweeps_per_swap: int,
    chains: Tensor,
    sweep_offset: int,
    seed: int,
    sweep: Callable[..., Tensor],
    energy: Energy,
) -> tuple[Tensor, Tensor, Tensor]:
    ladder = np.array(_schedule(betas), np.float32).astype(np.float64)
    beta = torch.from_numpy(ladder).reshape(-1, *[1] * (chains.dim() - 1), 1)
    chains = chains.clone()
    energies = torch.empty(num_swaps, *chains.shape, dtype=torch.float64)
    chains_at = chains.new_empty(num_swaps, *chains.shape)
    for round_ in range(num_swaps):
        first = sweep_offset + round_ * sweeps_per_swap
        z = sweep(z, beta=beta, chain_offset=chains, sweep_offset=first)
        of_round = energy(z).reshape(chains.shape)
        energies[round_] = torch.from_numpy(of_round)
        last = first + sweeps_per_swap - 1
        for b in range(first // sweeps_per_swap % 2, len(ladder) - 1, 2):
            swap = _swap(ladder[b : b + 2], of_round[b : b + 2], chains[b].numpy() // len(ladder), seed, last, b)
            pair, swaps = slice(b, b + 2), torch.from_numpy(swap)
            z[pair] = torch.where(swaps.unsqueeze(-1), z[pair].flip(0), z[pair])
            chains[pair] = torch.where(swaps, chains[pair].flip(0), chains[pair])
        chains_at[round_] = chains
    return z, energies, chains_at


def _swap(
    betas: NDArray[np.float64],
    energies: NDArray[np.float64],
    column: NDArray[np.int64],
    seed: int,
    sweep: int,
    pair: int,
) -> NDArray[np.bool_]:
    """Whether the replicas at two neighbouring betas swap, by Metropolis's rule, in each column."""
    # twin: csrc/core/tempering.h
    x = ((betas[0] - betas[1]) * (energies[0] - energies[1])).astype(np.float32)
    words = random_words(seed, column.reshape(-1), sweep, pair + 1, stream=1)[:, pair].reshape(column.shape)
    swaps: NDArray[np.bool_] = np.asarray((x >= 0) | (words < acceptance(x)))
    return swaps


# Moments ----------------------------------------------------------------------------------------------------------


def bipartite_moments_reference(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    num_sweeps: int,
    *,
    sweeps_per_read: int = 1,
    beta: Sequence[float] | Tensor = (1.0,),
    right: Tensor | None = None,
    clamp_left: Tensor | None = None,
    clamp_right: Tensor | None = None,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    seed: int,
) -> tuple[Tensor, ...]:
    """What the op ``bipartite_moments`` must return, to the bit.

    Args:
        left: [C, ..., n1] states of the chains, whose first batch dim is counted over.
        left_bias: [..., n1].
        right_bias: [..., n2].
        weight: [..., n1, n2], the same for all C chains.
        num_sweeps: Number of sweeps, a multiple of ``sweeps_per_read``.
        sweeps_per_read: A state is read after every so many sweeps.
        beta: 1 value or one per sweep, with or without batch dims.
        right: [..., n2] states, if they are clamped.
        clamp_left: [..., n1] mask of units that keep their values.
        clamp_right: [..., n2].
        chain_offset: Number of the first chain, or the chains' numbers.
        sweep_offset: Number of the first sweep.
        seed: Any 64-bit integer.

    Returns:
        left and right after the last sweep; of the states read, how many have each left unit [..., n1], each right
        unit [..., n2] and each pair [..., n1, n2] at 1; each chain's first state of the lowest energy, left and right,
        and that energy (the given state, or right at 0, and inf if none was read).
    """
    n1 = weight.shape[-2]
    energy = _bipartite_energy(left, left_bias, right_bias, weight, chain_offset)
    shape = _prepare(weight, chain_offset, (left, left_bias, right_bias)).shape
    start_right = left.new_zeros(*shape, weight.shape[-1]) if right is None else right.to(left.dtype)

    def sweep(z: Tensor, **options: Any) -> Tensor:
        sides = bipartite_gibbs_reference(
            z[..., :n1], left_bias, right_bias, weight, sweeps_per_read, right=z[..., n1:],
            clamp_left=clamp_left, clamp_right=clamp_right, chain_offset=chain_offset, seed=seed, **options,
        )  # fmt: skip
        return torch.cat(sides, -1)

    start = torch.cat([part.expand(*shape, -1) for part in (left, start_right)], -1)
    z, states, best, lowest = _read_states(start, num_sweeps, sweeps_per_read, beta, sweep_offset, sweep, energy)
    pairs = torch.einsum("r...i,r...j->...ij", states[..., :n1], states[..., n1:])
    # The chains of a model are the first dim that is left.
    counts = (states[..., :n1].sum((0, 1)), states[..., n1:].sum((0, 1)), pairs.sum(0))
    return z[..., :n1], z[..., n1:], *(count.long() for count in counts), best[..., :n1], best[..., n1:], lowest


def graph_moments_reference(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    graph: Graph,
    num_sweeps: int,
    *,
    sweeps_per_read: int = 1,
    beta: Sequence[float] | Tensor = (1.0,),
    clamp: Tensor | None = None,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    metropolis: bool = False,
    seed: int,
) -> tuple[Tensor, ...]:
    """What the op ``graph_moments`` must return, to the bit: as :func:`bipartite_moments_reference`."""
    energy = _graph_energy(state, bias, coupling, graph, chain_offset)
    update = graph_metropolis_reference if metropolis else graph_gibbs_reference

    def sweep(z: Tensor, **options: Any) -> Tensor:
        return update(
            z, bias, coupling, graph, sweeps_per_read, clamp=clamp, chain_offset=chain_offset, seed=seed, **options
        )

    start = state.expand(*_prepare(coupling, chain_offset, (state, bias), graph).shape, -1)
    z, states, best, lowest = _read_states(start, num_sweeps, sweeps_per_read, beta, sweep_offset, sweep, energy)
    ends = graph.edges.to(state.device)
    pairs = states[..., ends[:, 0]] * states[..., ends[:, 1]]
    return z, states.sum((0, 1)).long(), pairs.sum((0, 1)).long(), best, lowest


def _read_states(
    z: Tensor,
    num_sweeps: int,
    sweeps_per_read: int,
    beta: Sequence[float] | Tensor,
    sweep_offset: int,
    sweep: Callable[..., Tensor],
    energy: Energy,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last state, all that were read [R, C, ..., N] in float64, the best of each chain, and their energies."""
    betas = _betas(beta, num_sweeps)
    states = z.new_empty(num_sweeps // sweeps_per_read, *z.shape, dtype=torch.float64)
    best, lowest = z.clone(), torch.full(z.shape[:-1], torch.inf, dtype=torch.float64)
    for read in range(len(states)):
        first = read * sweeps_per_read
        z = sweep(z, beta=torch.cat(betas[first : first + sweeps_per_read], -1), sweep_offset=sweep_offset + first)
        states[read] = z
        now = torch.from_numpy(energy(z)).reshape(lowest.shape)
        best = torch.where((now < lowest).unsqueeze(-1), z, best)
        lowest = lowest.minimum(now)
    return z, states, best, lowest
