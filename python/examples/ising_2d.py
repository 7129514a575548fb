# SPDX-License-Identifier: Apache-2.0
"""The ferromagnetic Ising model on an L x L torus, against its exact solutions.

The energy of spins s of -1 and 1 is ``- sum s_i s_j`` over nearest neighbours. On the infinite lattice the energy per
spin is that of Onsager (Phys. Rev. 65, 117, 1944), the spontaneous magnetization that of Yang (Phys. Rev. 85, 808,
1952), and the phase transition is at the inverse temperature beta = ln(1 + sqrt 2) / 2. The energy of a finite torus
follows from Kaufman's partition function (Phys. Rev. 76, 1232, 1949). Chains in the disordered phase start from
perfect samples, which need no warm-up; chains in the ordered phase start with all spins up.

    python python/examples/ising_2d.py --folder runs/ising_2d

prints |magnetization|, energy and Binder's cumulant for each size and beta, with standard errors from the
autocorrelation of the chains, and writes ``magnetization.png``. Needs arviz, matplotlib, scipy and tqdm.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import ellipkm1
from torch import Tensor

import gibbs_ext as gx

Floats = NDArray[np.float64]
CRITICAL = math.log(1 + math.sqrt(2)) / 2
# Binder's cumulant of the critical model on a large square torus (Kamieniarz and Blote, J. Phys. A 26, 201, 1993).
CRITICAL_BINDER = 0.61069
QUANTITIES = ["magnetization", "energy", "binder"]
WARMUP = 50  # draws that are not kept


def onsager_energy(beta: Floats) -> Floats:
    """The energy per spin of the infinite lattice; 0 < beta."""
    signed = 2 * np.tanh(2 * beta) ** 2 - 1  # plus or minus the complementary modulus
    return np.asarray(-(1 + 2 / np.pi * signed * ellipkm1(np.maximum(signed**2, 1e-300))) / np.tanh(2 * beta))


def yang_magnetization(beta: Floats) -> Floats:
    """The spontaneous magnetization of the infinite lattice; 0 < beta."""
    return np.asarray(np.maximum(1 - np.sinh(2 * beta) ** -4.0, 0) ** 0.125)


def torus_log_partition(size: int, beta: Tensor) -> Tensor:
    """log Z of the torus, by Kaufman's formula; beta [...] float64, above 0. Differentiable in beta."""
    beta = beta.unsqueeze(-1)
    steps = torch.arange(1, 2 * size, dtype=torch.float64)
    gamma = torch.acosh(torch.cosh(2 * beta) / torch.tanh(2 * beta) - torch.cos(math.pi * steps / size))
    odd, even = gamma[..., ::2], torch.cat([2 * beta + torch.tanh(beta).log(), gamma[..., 1::2]], -1)
    # The logarithm of the product of all 2 cosh(L gamma / 2) plus that of all 2 sinh(L gamma / 2), for either set. The
    # latter is about minus the former, and the sum negligible, where it is cut off.
    parts = [
        torch.logaddexp(half, -half).sum(-1) + (1 + torch.tanh(half).prod(-1)).clamp_min(1e-30).log()
        for half in (size / 2 * odd, size / 2 * even)
    ]
    return size**2 / 2 * (2 * torch.sinh(2 * beta[..., 0])).log() - math.log(2) + torch.logaddexp(*parts)


def torus_energy(size: int, beta: Floats) -> Floats:
    """The exact energy per spin of the torus."""
    at = torch.tensor(beta, requires_grad=True)
    (slope,) = torch.autograd.grad(torus_log_partition(size, at).sum(), at)
    return -slope.numpy() / size**2


def torus_models(size: int, beta: Floats) -> tuple[gx.GraphBoltzmann, Floats]:
    """The models of all betas [B], and the constants [B]: beta times the Ising energy is the model's energy plus it."""
    site = torch.arange(size**2).reshape(size, size)
    edges = torch.cat([torch.stack([site, site.roll(-1, dim)], -1).reshape(-1, 2) for dim in (0, 1)])
    graph = gx.ColoredGraph(size**2, edges)
    J = torch.from_numpy(beta).float().unsqueeze(-1).expand(-1, len(edges))
    bias, coupling, offset = gx.ising_to_boltzmann(torch.zeros(size**2), J, graph, convention="physics")
    return gx.GraphBoltzmann(graph, bias, coupling), offset.double().numpy()


def simulate(size: int, beta: Floats, num_chains: int, num_draws: int, seed: int) -> dict[str, Floats]:
    """Means and their standard errors [2, B] of each quantity."""
    model, offset = torus_models(size, beta)
    start = torch.ones(num_chains, len(beta), size**2)
    hot = beta <= CRITICAL
    start[:, hot] = gx.perfect_samples(torus_models(size, beta[hot])[0], num_chains, seed=seed)
    thin = max(1, size**2 // 8)  # the chains slow down about as the square of the size
    data = gx.diagnostics.record(
        model, num_chains, num_draws, thin=thin, warmup=WARMUP * thin, initial=start, seed=seed, progress=True
    )
    chains = data.posterior
    chains["energy"] = (chains["energy"] + offset) / (beta * size**2)
    chains["magnetization"] = abs(chains["magnetization"])
    square = chains["magnetization"] ** 2
    m2, m4 = (x.mean(("chain", "draw")) for x in (square, square**2))
    # Its mean is 1 - m4 / (3 m2^2), and its fluctuations are those of that estimate, to first order.
    chains["binder"] = 1 - square**2 / (3 * m2**2) + 2 * m4 * (square - m2) / (3 * m2**3)
    errors = gx.diagnostics.summary(data, QUANTITIES)["mcse_mean"].to_numpy().reshape(len(QUANTITIES), -1)
    means = [chains[name].mean(("chain", "draw")).values for name in QUANTITIES]
    return {name: np.stack(pair) for name, pair in zip(QUANTITIES, zip(means, errors, strict=True), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[8, 16, 32], help="rows and columns L (default: %(default)s)"
    )
    parser.add_argument("--betas", type=int, default=17, help="number of inverse temperatures (default: %(default)s)")
    parser.add_argument("--chains", type=int, default=4, help="chains at each beta (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=2000, help="draws of each chain (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all chains (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/ising_2d"), help="where the picture goes (default: %(default)s)"
    )
    args = parser.parse_args()
    # A torus of 2 x 2 has double bonds.
    for option, least, value in (
        ("sizes", 3, min(args.sizes)), ("betas", 1, args.betas), ("chains", 2, args.chains), ("draws", 10, args.draws),
    ):  # fmt: skip
        if value < least:
            parser.error(f"--{option} must be at least {least}, got {value}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must lie in 0 .. 2^32 - 1, got {args.seed}")
    args.folder.mkdir(parents=True, exist_ok=True)

    # Betas lie close to each other around the transition.
    from_center = np.linspace(-1, 1, args.betas) if args.betas > 1 else np.zeros(1)
    beta = CRITICAL * (1 + 0.35 * np.sign(from_center) * np.abs(from_center) ** 1.5)
    results = {}
    for size in sorted(set(args.sizes)):
        results[size] = simulate(size, beta, args.chains, args.draws, args.seed)
        exact = torus_energy(size, beta)
        print(f"L = {size}, the transition of the infinite lattice at beta {CRITICAL:.5f}")
        for i in range(len(beta)):
            (m, m_error), (e, e_error), (u, u_error) = (results[size][name][:, i] for name in QUANTITIES)
            print(
                f"beta {beta[i]:.5f}: |m| {m:.5f} +- {m_error:.5f}, energy {e:.5f} +- {e_error:.5f} "
                f"(exact {exact[i]:.5f}), Binder {u:.5f} +- {u_error:.5f}"
            )
    draw(args.folder / "magnetization.png", beta, results)
    print(f"picture in {args.folder}")


def draw(path: Path, beta: Floats, results: dict[int, dict[str, Floats]]) -> None:
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    (magnetization, energy), (binder, deviation) = figure.subplots(2, 2, sharex=True)
    dense = np.linspace(beta.min(), beta.max(), 500)
    magnetization.plot(dense, yang_magnetization(dense), color="0.2", label="infinite lattice (Yang 1952)")
    energy.plot(dense, onsager_energy(dense), color="0.2", label="infinite lattice (Onsager 1944)")
    binder.axhline(CRITICAL_BINDER, color="0.2", linestyle=":", label=f"critical value, {CRITICAL_BINDER}")
    deviation.axhspan(-2, 2, color="0.92", label="two standard errors")
    style = {"linestyle": "none", "markersize": 4}
    for number, (size, values) in enumerate(results.items()):
        style |= {"color": f"C{number}", "marker": "os^Dv"[number % 5]}
        for axes, name in zip((magnetization, energy, binder), QUANTITIES, strict=True):
            axes.errorbar(beta, *values[name], capsize=2, label=f"L = {size}", **style)
        energy.plot(dense, torus_energy(size, dense), color=f"C{number}", linewidth=1, alpha=0.7)
        mean, error = values["energy"]
        deviation.plot(beta, (mean - torus_energy(size, beta)) / error, label=f"L = {size}", **style)
    energy.plot([], [], color="0.6", linewidth=1, label="L x L torus (Kaufman 1949)")
    magnetization.set(ylabel="|m|, magnetization per spin", ylim=(0, 1.03))
    energy.set(ylabel="energy per spin, in units of J")
    binder.set(
        xlabel="inverse temperature beta, in units of 1 / J",
        ylabel=r"Binder's cumulant $1 - \langle m^4 \rangle \,/\, 3 \langle m^2 \rangle^2$",
    )
    deviation.set(xlabel="inverse temperature beta, in units of 1 / J")
    deviation.set(ylabel="(energy - exact energy of the torus)\n/ standard error")
    for axes in (magnetization, energy, binder, deviation):
        axes.axvline(CRITICAL, color="0.5", linewidth=1, linestyle="--")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    deviation.margins(y=0.25)  # room for the legend
    deviation.legend(fontsize="small", loc="lower center", ncols=4, columnspacing=1)
    figure.suptitle("Ising model on an L x L torus; the dashed line is at the exact critical beta, ln(1 + sqrt 2) / 2")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
