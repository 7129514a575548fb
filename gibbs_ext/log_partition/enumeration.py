# SPDX-License-Identifier: Apache-2.0
"""Exact answers for bipartite models: all states of the smaller side are enumerated, the other side is summed out."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gibbs_ext.log_partition import machine
from gibbs_ext.log_partition.machine import alternative, broadcast_batch, check_finite, expanded, mapped_first

ENUMERABLE_UNITS = 25

# The parameters of a bipartite model, in the order in which solvers get them, and their own dims.
_DIMS = {"left_bias": 1, "right_bias": 1, "weight": 2}


class Enumeration:
    """The :class:`gibbs_ext.log_partition.machine.Solver` of left_bias [..., n1], right_bias [..., n2] and weight."""

    def log_partition(self, name: str, parameters: Sequence[Tensor]) -> Tensor:
        return _States(*_smaller_side_first(name, parameters)).log_sums().logsumexp(0)

    def marginals(self, name: str, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        parameters = expanded(parameters, [*_DIMS.values()])
        return cast(tuple[Tensor, Tensor, Tensor], _Marginals.apply(name, *parameters))  # type: ignore[no-untyped-call]

    def samples(self, name: str, parameters: Sequence[Tensor], num_samples: int, generator: torch.Generator) -> Tensor:
        """First the chunk of the smaller side's state is drawn, then the state, then the other side."""
        n1, n2 = parameters[-1].shape[-2:]
        parts = []
        for bias, other_bias, weight in _few_models(name, parameters):
            states = _States(bias, other_bias, weight)
            chunks = _choose(states.log_sums().mT, num_samples, generator)
            numbers = torch.empty_like(chunks)
            for number in chunks.unique().unsqueeze(-1):
                here = chunks == number  # of all models, if there is one chunk; else there is one model
                low_numbers = _choose(states.chunk(number)[0], int(here.sum()) // len(bias), generator)
                numbers[here] = (low_numbers + (number << states.low)).flatten()
            n, m = weight.shape[-2:]
            z = torch.empty(*numbers.shape, n + m, dtype=torch.uint8, device=weight.device)
            side, other = z.split((n, m), -1) if n1 <= n2 else z.split((m, n), -1)[::-1]
            at_once = max(1, machine.CHUNK // (max(1, len(bias)) * max(n, m, 1)))
            for few in (slice(first, first + at_once) for first in range(0, num_samples, at_once)):
                state = _bits(numbers[:, few], n)
                p = (state @ weight + other_bias.unsqueeze(-2)).sigmoid()
                side[:, few] = state
                other[:, few] = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator) < p
            parts.append(z)
        batch_shape = broadcast_batch(parameters, _DIMS.values())
        return torch.cat(parts).reshape(*batch_shape, num_samples, n1 + n2)


def _smaller_side_first(name: str, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Biases of the side to enumerate and of the other, and the weight between them, in float64."""
    n1, n2 = parameters[-1].shape[-2:]
    if min(n1, n2) > ENUMERABLE_UNITS:
        raise ValueError(
            f"{name}: the smaller side of {n1} + {n2} units has more than {ENUMERABLE_UNITS}; "
            f"use {alternative(name, 'bipartite_gibbs')}"
        )
    for argument, parameter in zip(_DIMS, parameters, strict=True):
        check_finite(name, argument, parameter)
    left_bias, right_bias, weight = (parameter.double() for parameter in parameters)
    if n1 > n2:
        return right_bias, left_bias, weight.mT
    return left_bias, right_bias, weight


def _few_models(name: str, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The parameters of a few models at a time, as :func:`_smaller_side_first` has them, with one batch dim.

    The models of one turn fit into one chunk. A model too large for one chunk comes alone.
    """
    batch_shape = broadcast_batch(parameters, _DIMS.values())
    parameters = _smaller_side_first(name, parameters)
    num_models, (n, m) = math.prod(batch_shape), parameters[-1].shape[-2:]
    at_once = max(1, machine.CHUNK // (2**n * max(n, m, 1)))
    flat = (
        p.expand(*batch_shape, *own).reshape(num_models, *own)
        for p, own in zip(parameters, ((n,), (m,), (n, m)), strict=True)
    )
    yield from zip(*(p.split(at_once) for p in flat), strict=True)


def _bits(numbers: Tensor, num_units: int) -> Tensor:
    """States [..., num_units] float64 of these numbers [...], whose lowest bit is unit 0."""
    return (numbers.unsqueeze(-1) >> torch.arange(num_units, device=numbers.device) & 1).double()


def _choose(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Independent numbers of states, with these weights [B, S]: [B, count] int64."""
    cumulative = log_weights.softmax(-1).cumsum(-1)
    size = (len(log_weights), count)
    draws = torch.rand(size, dtype=cumulative.dtype, device=cumulative.device, generator=generator)
    # torch.multinomial has uniforms of 24 bits on a GPU.
    chosen = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    return chosen.clamp_(max=cumulative.shape[-1] - 1)


class _States:
    """The states of one side, n units, in chunks: states that differ in their first ``low`` units only.

    A state's fields are those of the first state of its chunk, plus what is the same in all chunks.

    Args:
        bias: [..., n] float64, of the side.
        other_bias: [..., m], of the other.
        weight: [..., n, m].
    """

    def __init__(self, bias: Tensor, other_bias: Tensor, weight: Tensor) -> None:
        self.bias, self.weight = bias, weight
        n, m = weight.shape[-2:]
        batch_shape = broadcast_batch((bias, other_bias, weight), _DIMS.values())
        self.per_state = max(1, math.prod(batch_shape)) * max(n, m, 1)
        self.low = max(0, min(n, (machine.CHUNK // self.per_state).bit_length() - 1))
        self.numbers = torch.arange(2 ** (n - self.low), device=weight.device)  # of the chunks
        self.low_numbers = torch.arange(2**self.low, device=weight.device)
        low_states = _bits(self.low_numbers, self.low)
        self.on_low = (low_states @ bias[..., : self.low].unsqueeze(-1)).squeeze(-1)
        self.low_fields = low_states @ weight[..., : self.low, :] + other_bias.unsqueeze(-2)  # [..., states, m]

    def chunk(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """``log sum_other exp(-energy)`` of the states of a chunk, [..., 2^low], and the other side's fields.

        Args:
            number: [1] int64.
        """
        state = _bits(number, self.weight.shape[-2] - self.low)
        fields = self.low_fields + state @ self.weight[..., self.low :, :]
        on_side = self.on_low + (state @ self.bias[..., self.low :].unsqueeze(-1)).squeeze(-1)
        # logaddexp with 0 is softplus, but accurate everywhere.
        return on_side + torch.logaddexp(fields, fields.new_zeros(())).sum(-1), fields

    def log_sums(self) -> Tensor:
        """The logarithms of the sums over each chunk, [chunks, ...]; differentiable."""

        def log_sum(number: Tensor) -> Tensor:
            return self.chunk(number)[0].logsumexp(-1)

        chunks = self.numbers.split(1)
        if len(chunks) > 1 and torch.is_grad_enabled() and (self.on_low.requires_grad or self.low_fields.requires_grad):
            if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
                # Recompute each chunk in backward rather than keep the whole enumeration.
                return torch.stack([checkpoint(log_sum, number, use_reentrant=False) for number in chunks])
            # torch.func.grad knows no checkpoints.
            kept = self.per_state << self.weight.shape[-2]
            if kept > 2**machine.MAX_TABLES:
                raise NotImplementedError(
                    f"exact_log_partition: torch.func.grad would keep {kept} numbers of the enumeration, and "
                    f"2^{machine.MAX_TABLES} is the limit; use torch.autograd.grad, for which they are computed again"
                )
            return torch.stack([log_sum(number) for number in chunks])
        # In a list, the small results would lie between the large tensors of chunks, and keep their memory from reuse.
        sums = torch.stack([log_sum(chunks[0])] * len(chunks))
        for i, number in enumerate(chunks[1:], 1):
            sums[i] = log_sum(number)
        return sums


class _Marginals(torch.autograd.Function):
    """log Z [*S] and the two of :class:`gibbs_ext.Marginals`. A Function, so that torch.vmap adds a batch dim."""

    @staticmethod
    def forward(name: str, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for bias, other_bias, weight in _few_models(name, parameters):
            states = _States(bias, other_bias, weight)
            log_partition = states.log_sums().logsumexp(0)
            side, other, pair = torch.zeros_like(bias), torch.zeros_like(other_bias), torch.zeros_like(weight)
            for number in states.numbers.split(1):
                log_weights, fields = states.chunk(number)
                p = (log_weights - log_partition.unsqueeze(-1)).exp().unsqueeze(-1)
                on = p * _bits(states.low_numbers + (number << states.low), weight.shape[-2])
                other_on = fields.sigmoid()
                side += on.sum(-2)
                other += (p.mT @ other_on).squeeze(-2)
                pair += on.mT @ other_on
            parts.append((log_partition, side, other, pair))
        batch_shape = broadcast_batch(parameters, _DIMS.values())
        log_partition, side, other, pair = (
            torch.cat(p).reshape((*batch_shape, *p[0].shape[1:])) for p in zip(*parts, strict=True)
        )
        n1, n2 = parameters[-1].shape[-2:]
        if n1 > n2:
            side, other, pair = other, side, pair.mT
        # Sums of probabilities may be rounded to more than 1.
        return log_partition, torch.cat((side, other), -1).clamp(max=1), pair.clamp(max=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, *parameters: Tensor) -> Any:
        outputs = _Marginals.apply(name, *mapped_first(parameters, in_dims[1:]))  # type: ignore[no-untyped-call]
        return outputs, (0,) * len(outputs)
