# SPDX-License-Identifier: Apache-2.0
import copy
import math

import pytest
import torch
from graph_support import graph_named
from support import assert_bits, assert_close, assert_same_bits, z_threshold

from gibbs_ext import ColoredGraph, exact_log_partition
from gibbs_ext.nn import BoltzmannPosterior, BoltzmannPrior

COUPLINGS = ["per_sample", "shared", "low_rank"]
ALL_COUPLINGS = [*COUPLINGS, "none"]
FOR_ALL = ("shared", "none")  # couplings that all data points share
SIDES = {"num_left": 5, "num_right": 4}
# Two colours, and three.
ON_GRAPHS = ["chimera with holes", "odd ring"]


def units(kind):
    return SIDES if kind == "sides" else {"graph": graph_named(kind)}


def complete_bipartite(n1, n2):
    """left is nodes 0 .. n1 - 1 and of colour 1: updated last."""
    edges = torch.cartesian_prod(torch.arange(n1), n1 + torch.arange(n2))
    return ColoredGraph(n1 + n2, edges, [1] * n1 + [0] * n2)


@pytest.mark.parametrize("coupling", ALL_COUPLINGS)
def test_parameters_are_those_of_the_method(coupling):
    """weight = 2 t J, left_bias = t (b1 - sum_j J), right_bias = t (b2 - sum_i J), J = 1.5 / sqrt(n1) * raw."""
    posterior = BoltzmannPosterior(7, 5, 4, coupling=coupling, rank=3, coupling_init=0.3, spin_beta=2.0).double()
    features = torch.randn(6, 7, dtype=torch.float64)
    if coupling in FOR_ALL:
        raw = posterior.raw_coupling.expand(6, 5, 4)
    else:
        out = features @ posterior.head.weight.mT
        assert_close(posterior.norm.weight, torch.full_like(posterior.norm.weight, 0.3), 1e-7)
        out = posterior.norm.weight * (out - out.mean(0)) / (out.var(0, correction=0) + 1e-2).sqrt()
        if coupling == "per_sample":
            raw = out.reshape(6, 5, 4)
        else:
            raw = torch.einsum("ir,br,jr->bij", posterior.left_factor, out, posterior.right_factor)
    spin = 1.5 / math.sqrt(5) * raw
    b1, b2 = posterior.bias(features).split((5, 4), -1)
    left_bias, right_bias, weight = posterior.parameters_of(features)
    assert weight.shape == ((5, 4) if coupling in FOR_ALL else (6, 5, 4))
    assert_close(weight.expand(6, 5, 4), 4 * spin, 1e-12)
    assert (weight.abs().sum() == 0) == (coupling == "none")
    assert_close(left_bias, 2 * (b1 - spin.sum(-1)), 1e-12)
    assert_close(right_bias, 2 * (b2 - spin.sum(-2)), 1e-12)
    # Without biases, flipping every bit leaves the energy: the units are fair.
    model = posterior.distribution(features)
    assert model.batch_shape == (6,)
    flat = type(model)(-weight.sum(-1) / 2, -weight.sum(-2) / 2, weight)
    z = (torch.rand(6, 9) < 0.5).double()
    assert_close(flat.energy(1 - z), flat.energy(z), 1e-12)


@pytest.mark.parametrize("coupling", ALL_COUPLINGS)
@pytest.mark.parametrize("kind", ON_GRAPHS)
def test_parameters_on_a_graph(kind, coupling):
    """coupling = 2 t J, bias_i = t (b_i - sum of J at i), J = 1.5 / sqrt(largest degree) * raw."""
    graph = graph_named(kind)
    posterior = BoltzmannPosterior(7, graph=graph, coupling=coupling, rank=3, spin_beta=2.0).double()
    features = torch.randn(6, 7, dtype=torch.float64)
    u, v = graph.edges.T
    if coupling in FOR_ALL:
        raw = posterior.raw_coupling.expand(6, -1)
    else:
        raw = features @ posterior.head.weight.mT
        raw = posterior.norm.weight * (raw - raw.mean(0)) / (raw.var(0, correction=0) + 1e-2).sqrt()
        if coupling == "low_rank":
            raw = torch.einsum("er,br,er->be", posterior.factor[u], raw, posterior.factor[v])
    spin = 1.5 / math.sqrt(graph.max_degree) * raw
    at_units = torch.zeros(6, graph.num_nodes, dtype=torch.float64)
    for e, (i, j) in enumerate(graph.edges.tolist()):
        at_units[:, i] += spin[:, e]
        at_units[:, j] += spin[:, e]
    bias, strength = posterior.parameters_of(features)
    assert strength.shape == ((graph.num_edges,) if coupling in FOR_ALL else (6, graph.num_edges))
    assert_close(strength.expand(6, -1), 4 * spin, 1e-12)
    assert_close(bias, 2 * (posterior.bias(features) - at_units), 1e-12)
    # Without biases, flipping every bit leaves the energy: the units are fair.
    torch.nn.init.zeros_(posterior.bias.weight)
    torch.nn.init.zeros_(posterior.bias.bias)
    model = posterior.distribution(features)
    assert model.batch_shape == (6,)
    z = (torch.rand(6, graph.num_nodes) < 0.5).double()
    assert_close(model.energy(1 - z), model.energy(z), 1e-12)


def matched(coupling, dataset_size=None):
    """The same posterior twice: on two sides, and on their complete bipartite graph."""
    settings = {"coupling": coupling, "rank": 3, "dataset_size": dataset_size}
    sides = BoltzmannPosterior(7, 5, 4, **settings).double()
    on_graph = BoltzmannPosterior(7, graph=complete_bipartite(5, 4), **settings).double()
    state = sides.state_dict()
    if coupling == "shared":
        state["raw_coupling"] = state["raw_coupling"].flatten()
    if coupling == "low_rank":
        state["factor"] = torch.cat((state.pop("left_factor"), state.pop("right_factor")))
    if dataset_size:
        on_graph.chains.store_(
            torch.cat((sides.chains.state(index := torch.arange(dataset_size)), torch.zeros(1, dataset_size, 4)), -1),
            index,
        )
        state |= {f"chains.{name}": value for name, value in on_graph.chains.state_dict().items()}
    state["edges"] = on_graph.graph.edges
    on_graph.load_state_dict(state)
    return sides, on_graph


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("index", [None, torch.tensor([3, 1, 4, 15, 9, 2])], ids=["no index", "index"])
def test_complete_bipartite_graph_is_the_two_sides(coupling, index):
    posteriors = matched(coupling, 20)
    priors = (
        BoltzmannPrior(5, 4, num_chains=30).double(),
        BoltzmannPrior(graph=complete_bipartite(5, 4), num_chains=30).double(),
    )
    with torch.no_grad():
        priors[1].bias.copy_(torch.cat((priors[0].left_bias.normal_(), priors[0].right_bias.normal_())))
        priors[1].coupling.copy_(priors[0].weight.normal_().flatten())
        priors[1].chains.store_(torch.cat((priors[0].chains.state(), torch.ones(30, 4)), -1))
    features = torch.randn(6, 7, dtype=torch.float64)
    results = []
    for posterior, prior in zip(posteriors, priors, strict=True):
        torch.manual_seed(5)
        inputs = features.clone().requires_grad_()
        sample = posterior(inputs, index)
        energies = prior.energy(sample.z_mean), sample.model.detach().energy(sample.z_mean)
        loss = (energies[0] - energies[1] + sample.z.square().sum(-1)).sum() + prior.log_partition_surrogate()
        loss.backward()
        coupling_grad = (prior.weight if prior.graph is None else prior.coupling).grad
        shared = [posterior.bias.weight, *([posterior.head.weight] if coupling != "shared" else [])]
        results.append(
            [sample.z, sample.z_mean, *energies, loss, inputs.grad, coupling_grad.flatten(), *(p.grad for p in shared)]
        )
    for on_sides, on_graph in zip(*results, strict=True):
        assert_close(on_graph, on_sides, 1e-10)
    assert results[0][0].std() > 0.1
    if index is not None:
        states = [posterior.chains.state(index) for posterior in posteriors]
        assert_same_bits(states[1][..., :5], states[0])


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("kind", ON_GRAPHS)
def test_sample_on_a_graph(kind, coupling, chains):
    graph = graph_named(kind)
    posterior = BoltzmannPosterior(7, graph=graph, coupling=coupling, chains_per_point=chains, dataset_size=20)
    features = torch.randn(6, 7, requires_grad=True)
    for index in (None, torch.arange(6)):
        sample = posterior(features, index)
        shape = (6, graph.num_nodes) if chains == 1 else (chains, 6, graph.num_nodes)
        assert sample.z.shape == sample.z_mean.shape == shape
        assert ((sample.z >= 0) & (sample.z <= 1)).all()
        # Only the last colour, given the rest.
        last = graph.colors == graph.num_colors - 1
        assert_same_bits(sample.z_mean[..., ~last], sample.z[..., ~last])
        conditional = torch.sigmoid(sample.model.fields(sample.z))
        assert_close(sample.z_mean[..., last], conditional[..., last], 1e-5)
        assert (sample.z_mean - sample.z)[..., last].abs().max() > 0.05
        posterior.zero_grad()
        features.grad = None
        (sample.z_mean.sum() + sample.model.energy(sample.z).sum()).backward()
        for name, parameter in posterior.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        assert features.grad.abs().max() > 0


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_parameters_at_zero_give_fair_bits(coupling):
    posterior = BoltzmannPosterior(7, graph=graph_named("chimera"), coupling=coupling, chains_per_point=2000)
    for parameter in posterior.parameters():
        torch.nn.init.zeros_(parameter)
    posterior.relaxation = "straight_through"
    sample = posterior(torch.randn(2, 7))
    bits, means = sample.z, sample.z_mean
    assert_bits(bits)
    assert_close(means[..., graph_named("chimera").colors == 1], torch.full((2000, 2, 16), 0.5), 0)
    assert (bits.mean(0) - 0.5).abs().max() < z_threshold(64) * 0.5 / 2000**0.5


@pytest.mark.parametrize("kind", ["no edges", "no edges, 3 colours", "one node", "some isolated"])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_graphs_with_few_edges(kind, coupling):
    graph = graph_named(kind)
    posterior = BoltzmannPosterior(7, graph=graph, coupling=coupling, dataset_size=6)
    prior = BoltzmannPrior(graph=graph, num_chains=10)
    sample = posterior(torch.randn(6, 7), torch.arange(6))
    (
        prior.energy(sample.z_mean).sum() - sample.model.energy(sample.z).sum() + prior.log_partition_surrogate()
    ).backward()
    assert all(p.grad.isfinite().all() for p in [*posterior.bias.parameters(), *prior.parameters()])


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("chains", [1, 3])
def test_sample(coupling, chains):
    posterior = BoltzmannPosterior(7, 5, 4, coupling=coupling, chains_per_point=chains, dataset_size=20)
    features = torch.randn(6, 7, requires_grad=True)
    leading = () if chains == 1 else (chains,)
    for index in (None, torch.arange(6)):
        sample = posterior(features, index)
        assert sample.left.shape == sample.left_mean.shape == (*leading, 6, 5)
        assert sample.right.shape == (*leading, 6, 4)
        assert sample.model.energy_of(sample.left, sample.right).shape == (*leading, 6)
        assert ((sample.left >= 0) & (sample.left <= 1)).all()
        assert_same_bits(sample.model.split(sample.z), (sample.left, sample.right))
        assert_same_bits(sample.model.split(sample.z_mean), (sample.left_mean, sample.right))
        posterior.zero_grad()
        features.grad = None
        (sample.left_mean.sum() + (sample.right**2).sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in posterior.parameters())
        assert features.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["sides", *ON_GRAPHS])
def test_persistent_chains_are_continued_in_training_only(kind):
    posterior = BoltzmannPosterior(7, **units(kind), num_sweeps=0, dataset_size=20)
    features, index = torch.randn(6, 7), torch.tensor([3, 1, 4, 15, 9, 2])
    before = posterior.chains.bits.clone()
    posterior(features, index)  # no binary sweeps: the state stays
    assert_same_bits(posterior.chains.bits, before)
    posterior.num_sweeps = 10
    posterior.eval()(features, index)
    assert_same_bits(posterior.chains.bits, before)
    posterior.train()
    posterior(features)  # no index: chains of its own
    assert_same_bits(posterior.chains.bits, before)
    posterior(features, index)
    changed = (posterior.chains.bits != before).flatten(1).any(1)
    assert not changed[[i for i in range(20) if i not in index.tolist()]].any()
    assert changed.any()
    with pytest.raises(ValueError, match=r"^BoltzmannPosterior: index needs"):
        BoltzmannPosterior(7, **units(kind))(features, index)
    with pytest.raises(ValueError, match=r"^BoltzmannPosterior: coupling must be one of"):
        BoltzmannPosterior(7, **units(kind), coupling="all")


@pytest.mark.parametrize(
    "change",
    [{"chains_per_point": 0}, {"num_left": 0}, {"num_sweeps": -1}, {"num_relaxed_sweeps": 0}, {"dataset_size": 0},
     {"num_right": 2.5}, {"rank": 0}, {"coupling_init": -0.5}, {"coupling_init": math.inf}],
)  # fmt: skip
def test_bad_posterior(change):
    ((name, value),) = change.items()
    with pytest.raises((TypeError, ValueError), match=f"^BoltzmannPosterior: {name} must be .*, got {value}$"):
        BoltzmannPosterior(**{"in_features": 7, "num_left": 5, "num_right": 4, **change})


@pytest.mark.parametrize(
    "change",
    [{"num_left": 0}, {"num_right": 2.5}, {"num_chains": 0}, {"num_sweeps": 0}, {"betas": 5},
     {"betas": None, "sampler": "population_annealing"}, {"betas": None, "sampler": "parallel_tempering"}],
)  # fmt: skip
def test_bad_prior(change):
    name, value = next(iter(change.items()))
    with pytest.raises((TypeError, ValueError), match=f"^BoltzmannPrior: {name} must be .*, got {value}$"):
        BoltzmannPrior(**{"num_left": 5, "num_right": 4, **change})


def test_bad_samplers_of_a_prior():
    wanted = "sampler must be one of persistent, population_annealing, parallel_tempering, got 'pcd'"
    with pytest.raises(ValueError, match=f"^BoltzmannPrior: {wanted}$"):
        BoltzmannPrior(5, 4, sampler="pcd")
    with pytest.raises(ValueError, match=r"^BoltzmannPrior: betas must rise from 0 to 1, got 0 to 0.5$"):
        BoltzmannPrior(5, 4, num_chains=10, sampler="population_annealing", betas=[0.0, 0.5])
    with pytest.raises(
        TypeError, match=r"^BoltzmannPrior: betas must be a number or a sequence of numbers, got 'fast'$"
    ):
        BoltzmannPrior(5, 4, num_chains=10, sampler="population_annealing", betas="fast")
    for ladder, wanted in (
        ([0.0, 0.5], "rise to 1, got"),
        ([2.0, 1.0], "rise to 1, got"),
        ([0.5, 0.2, 1.0], "be finite and rise or fall strictly, got"),
        ([float("-inf"), 1.0], "be finite and rise or fall strictly, got"),
        ([], "hold at least 1 value, got none"),
    ):
        with pytest.raises(ValueError, match=f"^BoltzmannPrior: betas must {wanted}"):
            BoltzmannPrior(5, 4, sampler="parallel_tempering", betas=ladder)
    with pytest.raises(ValueError, match=r"^BoltzmannPrior: num_sweeps must be at least 2, got 1$"):
        BoltzmannPrior(5, 4, sampler="parallel_tempering", betas=[0.0, 1.0], num_sweeps=1)


@pytest.mark.parametrize("module", [lambda **units: BoltzmannPosterior(7, **units), BoltzmannPrior])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "num_left must be an integer, got None"),
        ({"num_left": 5}, "num_right must be an integer, got None"),
        ({"graph": 3}, "graph must be a ColoredGraph, got int"),
        ({"graph": ColoredGraph(2, [(0, 1)]), "num_left": 5}, "num_left must be None when a graph is given, got 5"),
        ({"graph": ColoredGraph(2, [(0, 1)]), "num_right": 4}, "num_right must be None when a graph is given, got 4"),
    ],
)
def test_either_two_sides_or_a_graph(module, given, message):
    with pytest.raises((TypeError, ValueError), match=f"^Boltzmann(Posterior|Prior): {message}$"):
        module(**given)


def test_no_right_on_a_graph():
    prior = BoltzmannPrior(graph=graph_named("one edge"))
    with pytest.raises(ValueError, match=r"^BoltzmannPrior: right must be None when a graph is given$"):
        prior.energy(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"z must have shape \[..., 2\], got \[3\]$"):
        prior.energy(torch.zeros(3))


@pytest.mark.parametrize("kind", ["sides", *ON_GRAPHS])
def test_posterior_is_governed_by_manual_seed(kind):
    posterior = BoltzmannPosterior(7, **units(kind)).eval()
    features = torch.randn(6, 7)
    torch.manual_seed(3)
    first, second = posterior(features), posterior(features)
    torch.manual_seed(3)
    assert_same_bits(posterior(features)[:-1], first[:-1])
    assert not second.z.equal(first.z)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("kind", ["sides", *ON_GRAPHS])
@pytest.mark.parametrize("index", [None, torch.tensor([3, 0, 4])], ids=["no index", "index"])
def test_compiles_as_one_graph(kind, coupling, index):
    """Without a break for a check that reads values, or for the chains."""
    torch.manual_seed(0)
    eager = BoltzmannPosterior(5, **units(kind), coupling=coupling, rank=3, dataset_size=6, chains_per_point=2)
    other = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    features = torch.randn(3, 5)
    for seed in range(2):
        samples = [module(features, index, seed=torch.tensor(seed)).z for module in (compiled, eager)]
        assert_close(*samples, 1e-6)
        gradients = [
            torch.autograd.grad(z.square().sum(), module.bias.weight)
            for z, module in zip(samples, (other, eager), strict=True)
        ]
        assert_close(*(gradient for (gradient,) in gradients), 1e-5)
        assert_same_bits(other.chains.bits, eager.chains.bits)


@pytest.mark.parametrize("kind", ["sides", *ON_GRAPHS])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chain_offset": 1.5}, "chain_offset must be an integer, got 1.5"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"seed": 1, "generator": torch.Generator()}, "give generator or seed, not both"),
        ({"index": torch.tensor([0, 1])}, r"index must have shape \[3\], one for each row of features, got \[2\]"),
        ({"index": torch.tensor([0])}, r"index must have shape \[3\], one for each row of features, got \[1\]"),
        ({"index": torch.tensor(0)}, r"index must have shape \[3\], one for each row of features, got \[\]"),
        ({"index": [0, 1, 2]}, "index must be a tensor, got list"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_arguments_of_a_sample(kind, change, message, training):
    posterior = BoltzmannPosterior(5, **units(kind), dataset_size=4).train(training)
    before = posterior.chains.bits.clone()
    with pytest.raises((TypeError, ValueError), match=f"^BoltzmannPosterior: {message}"):
        posterior(torch.randn(3, 5), **{"index": torch.tensor([0, 1, 2]), **change})
    assert_same_bits(posterior.chains.bits, before)


EDGES = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)]


def machine(module, coupling, edges, num_nodes=5):
    torch.manual_seed(0)
    graph = ColoredGraph(num_nodes, edges)
    if module == "prior":
        prior = BoltzmannPrior(graph=graph, num_chains=3)
        torch.nn.init.normal_(prior.coupling)
        return prior
    posterior = BoltzmannPosterior(4, graph=graph, coupling=coupling, rank=2, dataset_size=6)
    for name, tensor in posterior.state_dict().items():
        if name.startswith("norm") and tensor.dim():
            tensor.uniform_(0.5, 2)
    return posterior.eval()


MACHINES = pytest.mark.parametrize(("module", "coupling"), [("prior", ""), *(("posterior", c) for c in ALL_COUPLINGS)])


@MACHINES
def test_state_of_the_same_edges_in_another_order_loads(module, coupling):
    saved = machine(module, coupling, EDGES)
    other = machine(module, coupling, [(4, 3), (1, 0), (0, 4), (2, 1), (2, 3)])
    before = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    other.load_state_dict(saved.state_dict())
    assert_same_bits(list(saved.state_dict().values()), list(before.values()))  # the state itself is left alone
    z, features = torch.randint(2, (7, 5)).float(), torch.randn(7, 4)
    if module == "prior":
        assert_close(other.energy(z), saved.energy(z), 1e-6)
    else:
        energies = [part.distribution(features).energy(z) for part in (other, saved)]
        assert_close(*energies, 1e-5)
    # And back again.
    third = machine(module, coupling, EDGES)
    third.load_state_dict(other.state_dict())
    assert_same_bits(list(third.state_dict().values()), list(before.values()))


@MACHINES
@pytest.mark.parametrize(
    ("edges", "num_nodes"), [([*EDGES[:4], (1, 4)], 5), (EDGES[:4], 5), ([*EDGES, (0, 2)], 5), (EDGES, 6)]
)
def test_state_of_other_edges_is_an_error(module, coupling, edges, num_nodes):
    other = machine(module, coupling, edges, num_nodes)
    message = "edges: the state is that of a machine on other edges" if edges != EDGES else "num_units: .* 5 units"
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(machine(module, coupling, EDGES).state_dict())
    state = machine(module, coupling, edges, num_nodes).state_dict()
    del state["edges"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"edges\""):
        other.load_state_dict(state)


@pytest.mark.parametrize("module", ["posterior", "prior"])
@pytest.mark.parametrize("kind", ["sides", *ON_GRAPHS])
def test_state_dict_round_trip(module, kind):
    def make():
        if module == "prior":
            return BoltzmannPrior(**units(kind), num_chains=7)
        return BoltzmannPosterior(7, **units(kind), dataset_size=9)

    first, second = make(), make()
    assert any("bits" in key for key in first.state_dict())
    second.load_state_dict(first.state_dict())
    for key, value in first.state_dict().items():
        assert_same_bits(second.state_dict()[key], value)
    # As a moving average of the parameters makes it.
    third = copy.deepcopy(first)
    assert third.graph is first.graph
    assert all(value.equal(first.state_dict()[key]) for key, value in third.state_dict().items())


SAMPLERS = {
    "persistent": {"num_sweeps": 30},
    "population_annealing": {"sampler": "population_annealing", "betas": 10, "num_sweeps": 3},
    "parallel_tempering": {"sampler": "parallel_tempering", "betas": [0.0, 0.3, 0.6, 1.0], "num_sweeps": 30},
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["sides", "odd ring", "one edge"])
def test_log_partition_surrogate_has_the_gradient_of_log_z(kind, sampler):
    count = 20_000
    prior = BoltzmannPrior(**units(kind), num_chains=count, **SAMPLERS[sampler])
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    names, parameters = zip(*prior.named_parameters(), strict=True)
    actual = torch.autograd.grad(prior.log_partition_surrogate(), parameters)
    exact = torch.autograd.grad(exact_log_partition(prior.distribution()), parameters)
    for name, a, e in zip(names, actual, exact, strict=True):
        assert (a - e).abs().max() < z_threshold(29) * 0.5 / count**0.5, name
    # Planted fault: parameters that moved after the chains did.
    with torch.no_grad():
        parameters[-1].add_(0.2)
    moved = torch.autograd.grad(exact_log_partition(prior.distribution()), parameters)
    assert (
        max(float((a - e).abs().max()) for a, e in zip(actual, moved, strict=True)) > z_threshold(29) * 0.5 / count**0.5
    )


def test_annealed_samples_find_modes_in_proportion_where_persistent_chains_do_not():
    """All units are 0, or (e^6 times as probable) all are 1, and chains cannot go from one mode to the other."""
    errors = {}
    long = {"sampler": "parallel_tempering", "betas": torch.linspace(0, 1, 12), "num_sweeps": 300}
    for sampler, options in (SAMPLERS | {"parallel_tempering": long}).items():
        prior = BoltzmannPrior(10, 10, num_chains=2000, **options)
        with torch.no_grad():
            for parameter, value in zip(prior.parameters(), (-19.7, -19.7, 4.0), strict=True):
                parameter.fill_(value)
        gradient = torch.autograd.grad(prior.log_partition_surrogate(), prior.left_bias)[0]
        exact = torch.autograd.grad(exact_log_partition(prior.distribution()), prior.left_bias)[0]
        errors[sampler] = (gradient - exact).abs().max()
    assert errors["persistent"] > 0.3
    assert errors["population_annealing"] < 0.02
    assert errors["parallel_tempering"] < 0.03


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_prior_chains_advance(sampler):
    prior = BoltzmannPrior(5, 4, num_chains=50, **SAMPLERS[sampler])
    assert_bits(prior.chains.state())
    before = prior.chains.state()
    prior.log_partition_surrogate(part=slice(10, 30), seed=1)
    after = prior.chains.state()
    assert not after[10:30].equal(before[10:30])
    assert after[:10].equal(before[:10])
    assert after[30:].equal(before[30:])
    again = BoltzmannPrior(5, 4, num_chains=50, **SAMPLERS[sampler])
    again.load_state_dict(prior.state_dict())
    surrogates = [module.log_partition_surrogate(seed=2) for module in (prior, again)]
    assert surrogates[0].equal(surrogates[1])
    assert prior.chains.state().equal(again.chains.state())
    assert prior.energy(torch.zeros(5), torch.zeros(4)).item() == 0
    left = torch.randint(2, (10, 5)).float()
    energies = prior.energy(left, torch.ones(10, 4))
    assert energies.requires_grad
    assert_close(prior.energy(torch.cat((left, torch.ones(10, 4)), -1)), energies, 1e-6)


@pytest.mark.parametrize("coupling", ["per_sample", "shared"])
@pytest.mark.parametrize("kind", ["sides", *ON_GRAPHS])
@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_half_precision(mode, kind, coupling):
    posterior, features = BoltzmannPosterior(7, **units(kind), coupling=coupling), torch.randn(6, 7)
    if mode == "bfloat16":
        posterior, features = posterior.bfloat16(), features.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        sample = posterior(features.requires_grad_())
        loss = sample.model.energy(sample.z_mean).sum() + sample.z.square().sum()
    assert sample.z.dtype == torch.float32
    loss.backward()
    for name, parameter in posterior.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relaxation": "PWL"}, "relaxation must be one of pwl, .*, got 'PWL'"),
        ({"sharpness": "4"}, "sharpness must be a number, got '4'"),
        ({"sharpness": True}, "sharpness must be a number, got True"),
        ({"sharpness": 0.0}, "sharpness must be positive and finite, got 0.0"),
        ({"sharpness": 1e39}, r"sharpness must be positive and finite, got 1e\+39"),
        ({"sharpness": 10**400}, "sharpness must be positive and finite, got 1000.*"),
    ],
)
def test_relaxation_is_checked_at_construction(change, message):
    with pytest.raises((TypeError, ValueError), match=f"^BoltzmannPosterior: {message}$"):
        BoltzmannPosterior(7, 5, 4, **change)
