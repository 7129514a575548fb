# SPDX-License-Identifier: Apache-2.0
"""A restricted Boltzmann machine for scikit-learn, a drop-in for ``sklearn.neural_network.BernoulliRBM``."""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gibbs_ext import (
    BipartiteBoltzmann,
    BracketResult,
    TemperingResult,
    bipartite_gibbs,
    bracket_log_partition,
    parallel_tempering,
)
from gibbs_ext.checks import check_bits, check_flags, check_integers, reported_as, shown

try:
    from scipy.sparse import issparse
    from sklearn import neural_network
    from sklearn.utils import check_random_state, gen_even_slices
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("gibbs_ext.interop.sklearn: needs scikit-learn; pip install 'scikit-learn>=1.6'") from error

__all__ = ["BernoulliRBM", "LogLikelihood"]

_NAME = "BernoulliRBM"
_DTYPES = (np.float64, np.float32)
_OFFSETS = ("offset_visible_", "offset_hidden_")
# Names of the sweeps' arguments. A sweep draws the right side first, so v is on the right where chains start from h.
_ATTRIBUTES = {"left_bias": "intercept_hidden_", "right_bias": "intercept_visible_", "weight": "components_"}
# The weight of a new minibatch's means in the offsets of centred gradients, the sliding factor of Melchior et al. 2016.
_OFFSET_RATE = 0.01


class LogLikelihood(NamedTuple):
    """The result of :meth:`BernoulliRBM.log_likelihood`, in nats per sample."""

    mean: float  # by Bennett's estimate of log Z
    standard_error: float  # that of log Z, and so of the mean for these very samples
    lower: float  # by the reverse estimate of log Z, too low in expectation if the chains have mixed
    upper: float  # by the forward estimate of log Z, too high in expectation
    log_partition: BracketResult


class BernoulliRBM(neural_network.BernoulliRBM):  # type: ignore[misc]
    """A restricted Boltzmann machine of bits, with the parameters, attributes and methods of scikit-learn's.

    ``p(v, h) = exp(intercept_visible_ . v + intercept_hidden_ . h + h^T components_ v) / Z``. A minibatch of B samples
    moves the parameters by ``learning_rate`` times the estimated gradient of the mean log-likelihood: the mean over the
    B samples minus that over the states of C chains. The hidden units enter as ``P(h = 1 | v)`` in both. (scikit-learn
    divides both sums by B, which differs where C does, so in the last minibatch if the samples do not come out even.)
    Equal seeds start from the weights that scikit-learn's has, but chains draw other random numbers.

    Training computes in float32 on the CPU, as the sampler does, and attributes have the dtype of X: float32, or
    float64. That goes for :meth:`partial_fit`, too, where scikit-learn makes everything float64.

    Beside what scikit-learn's has, ``random_state`` decides all of :meth:`log_likelihood`, and there are four
    parameters more.

    Args:
        n_components: Number of hidden units, at least 1.
        learning_rate: Size of a step, above 0.
        batch_size: Samples in a minibatch, and the number of persistent chains, at least 1.
        n_iter: Number of times that :meth:`fit` goes over the samples, in their order, at least 0.
        verbose: Whether :meth:`fit` prints the mean of :meth:`score_samples` after each of these.
        random_state: An int, a RandomState or None, as everywhere in scikit-learn.
        solver: Where the chains of a minibatch start. "pcd": where they have stopped in the last minibatch, at first
            with all hidden units 0 (T. Tieleman, "Training restricted Boltzmann machines using approximations to the
            likelihood gradient", ICML 2008), as in scikit-learn. "cd": at the samples (G. Hinton, "Training products of
            experts by minimizing contrastive divergence", 2002), which is biased. "pt": as "pcd", but at first
            from uniform bits, and each chain has replicas at ``n_betas`` inverse temperatures, evenly spaced from 0 to
            1, with which it exchanges states (:func:`gibbs_ext.parallel_tempering`; G. Desjardins et al., "Tempered
            Markov chain Monte Carlo for training of restricted Boltzmann machines", AISTATS 2010). They reach
            modes that lie far apart, for the price of ``n_betas`` times as many sweeps.
        n_sweeps: Number of sweeps of the chains for each minibatch, at least 1.
        n_betas: Number of inverse temperatures of "pt", at least 2.
        centering: Whether to take the centred gradient, in which v and h have offsets subtracted, so that it does not
            depend on which value of a bit is called 1 (G. Montavon and K.-R. Mueller, "Deep Boltzmann machines and the
            centering trick", 2012; J. Melchior, A. Fischer and L. Wiskott, "How to center deep Boltzmann machines",
            JMLR 17, 2016). The offsets are sliding means over the minibatches, of v and of ``P(h = 1 | v)``.

    Attributes:
        components_: [n_components, n_features], the couplings, at first normal with the standard deviation 0.01.
        intercept_visible_: [n_features], at first 0.
        intercept_hidden_: [n_components], at first 0.
        h_samples_: [C, n_components] bits, the chains. C is ``batch_size``; with "cd" it is that of the last minibatch.
        tempering_: The last :class:`gibbs_ext.TemperingResult`, from which "pt" goes on; h is left and v is right.
        offset_visible_: [n_features], with ``centering`` only.
        offset_hidden_: [n_components], with ``centering`` only.
        n_features_in_, feature_names_in_: As everywhere in scikit-learn.

    Raises:
        TypeError, ValueError: A parameter does not fit, in :meth:`fit` and :meth:`partial_fit`. For parameters that
            scikit-learn's has the message is scikit-learn's.

    Warns:
        TemperingWarning: With "pt", as in :func:`gibbs_ext.parallel_tempering`.

    Example:
        >>> X = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]])
        >>> BernoulliRBM(n_components=2, random_state=0).fit(X).transform(X).shape
        (4, 2)
    """

    def __init__(
        self,
        n_components: int = 256,
        *,
        learning_rate: float = 0.1,
        batch_size: int = 10,
        n_iter: int = 10,
        verbose: int = 0,
        random_state: int | np.random.RandomState | None = None,
        solver: Literal["pcd", "cd", "pt"] = "pcd",
        n_sweeps: int = 1,
        n_betas: int = 10,
        centering: bool = False,
    ) -> None:
        self.n_components = n_components
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.n_iter = n_iter
        self.verbose = verbose
        self.random_state = random_state
        self.solver = solver
        self.n_sweeps = n_sweeps
        self.n_betas = n_betas
        self.centering = centering

    def fit(self, X: Any, y: Any = None) -> "BernoulliRBM":
        """Fits the model to X, from the start.

        Args:
            X: [n_samples, n_features] array or sparse matrix, of values in [0, 1] (which is not checked).
            y: Ignored.

        Returns:
            The estimator itself.

        Raises:
            TypeError, ValueError: A parameter or X does not fit; or the parameters of the model do not stay finite.
        """
        self._check_parameters()
        X = validate_data(self, X, accept_sparse="csr", dtype=_DTYPES)
        rng = check_random_state(self.random_state)
        self._start(X, rng)
        training = _Training(self, rng)
        num_batches = -(-X.shape[0] // self.batch_size)
        slices = list(gen_even_slices(num_batches * self.batch_size, num_batches, n_samples=X.shape[0]))
        start = time.time()
        for iteration in range(1, self.n_iter + 1):
            training.run(X[rows] for rows in slices)
            training.store(self)
            if self.verbose:
                end, score = time.time(), self.score_samples(X).mean()
                head = f"[{type(self).__name__}] Iteration {iteration}"
                print(f"{head}, pseudo-likelihood = {score:.2f}, time = {end - start:.2f}s")
                start = end
        return self

    def partial_fit(self, X: Any, y: Any = None) -> "BernoulliRBM":
        """Makes one step, with all of X as the minibatch, from where earlier calls or :meth:`fit` have stopped.

        Args:
            X: [n_samples, n_features] array or sparse matrix, of values in [0, 1] (which is not checked).
            y: Ignored.

        Returns:
            The estimator itself.

        Raises:
            TypeError, ValueError: A parameter or X does not fit; or the parameters of the model do not stay finite.
        """
        self._check_parameters()
        is_first = not hasattr(self, "components_")
        X = validate_data(self, X, accept_sparse="csr", dtype=_DTYPES, reset=is_first)
        rng = self._kept_random_state()
        if is_first:
            self._start(X, rng)
        training = _Training(self, rng)
        training.run([X])
        training.store(self)
        return self

    def gibbs(self, v: Any, n_sweeps: int = 1) -> NDArray[np.bool_]:
        """Sweeps chains: h given v, then v given h, ``n_sweeps`` times.

        Args:
            v: [n_samples, n_features] array or sparse matrix, of values in [0, 1] (which is not checked).
            n_sweeps: Number of sweeps, at least 1.

        Returns:
            v after the last sweep, as bool.

        Raises:
            NotFittedError: The model has no parameters yet.
            TypeError, ValueError: An argument does not fit.
        """
        name = f"{_NAME}.gibbs"
        check_is_fitted(self)
        check_integers(name, 1, n_sweeps=n_sweeps)
        v = validate_data(self, v, accept_sparse="csr", dtype=_DTYPES, reset=False)
        rng = self._kept_random_state()
        hidden = _draw(torch.from_numpy(self._mean_hiddens(v)), rng)
        visible_bias, hidden_bias, weight = self._tensors()
        with reported_as(name, **_ATTRIBUTES):
            _, visible = bipartite_gibbs(hidden, hidden_bias, visible_bias, weight.T, n_sweeps, seed=_seed(rng))
        return visible.bool().numpy()

    def log_likelihood(
        self, X: Any, *, n_chains: int = 500, n_betas: int = 1000, n_sweeps: int = 1000
    ) -> LogLikelihood:
        """The mean log-likelihood of samples, between two estimates, by :func:`gibbs_ext.bracket_log_partition`.

        Unlike the pseudo-likelihood of :meth:`score_samples`, it compares models. It needs pymbar.

        Args:
            X: [n_samples, n_features] array or sparse matrix of bits.
            n_chains: Number of chains for each of the two directions, at least 2.
            n_betas: Number of annealing steps, at least 1.
            n_sweeps: Number of sweeps, from uniform bits, after which chains count as draws from the model, at least 0.

        Returns:
            :class:`LogLikelihood`.

        Raises:
            ImportError: pymbar is not installed.
            NotFittedError: The model has no parameters yet.
            TypeError, ValueError: An argument does not fit.

        Warns:
            EffectiveSampleSizeWarning, BracketWarning: The estimates of log Z cannot be trusted: take more of each.
        """
        name = f"{_NAME}.log_likelihood"
        check_is_fitted(self)
        check_integers(name, 2, n_chains=n_chains)
        check_integers(name, 1, n_betas=n_betas)
        check_integers(name, 0, n_sweeps=n_sweeps)
        X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        check_bits(name, "X", torch.tensor(X.data if issparse(X) else X))
        rng = check_random_state(self.random_state)
        model = self.to_boltzmann()
        with reported_as(name):
            draws = model.sample((n_chains,), n_sweeps, seed=_seed(rng))
            found = bracket_log_partition(model, draws, n_betas, seed=_seed(rng))
        unnormalized = -float(self._free_energy(X).mean())
        mean, lower, upper = (unnormalized - float(z) for z in (found.log_partition, found.upper, found.lower))
        return LogLikelihood(mean, float(found.standard_error), lower, upper, found)

    def to_boltzmann(self) -> BipartiteBoltzmann:
        """The model as a :class:`gibbs_ext.BipartiteBoltzmann`: v is left, h is right. Parameters are copies.

        Raises:
            NotFittedError: The model has no parameters yet.
        """
        check_is_fitted(self)
        return BipartiteBoltzmann(*self._tensors())

    def _check_parameters(self) -> None:
        self._validate_params()  # those that scikit-learn's has
        check_integers(_NAME, 1, n_sweeps=self.n_sweeps)
        check_integers(_NAME, 2, n_betas=self.n_betas)
        if not isinstance(self.solver, str) or self.solver not in _SOLVERS:
            raise ValueError(f"{_NAME}: solver must be one of {', '.join(_SOLVERS)}, got {shown(self.solver)}")
        check_flags(_NAME, centering=self.centering)

    def _kept_random_state(self) -> np.random.RandomState:
        if not hasattr(self, "random_state_"):
            self.random_state_ = check_random_state(self.random_state)
        rng: np.random.RandomState = self.random_state_
        return rng

    def _start(self, X: Any, rng: np.random.RandomState) -> None:
        """Sets the attributes with which training starts."""
        self.components_ = np.asarray(rng.normal(0, 0.01, (self.n_components, X.shape[1])), X.dtype, order="F")
        self.intercept_visible_ = np.zeros(X.shape[1], X.dtype)
        self.intercept_hidden_ = np.zeros(self.n_components, X.dtype)
        self.h_samples_ = np.zeros((self.batch_size, self.n_components), X.dtype)
        self._n_features_out = self.n_components
        for name in (*_OFFSETS, "tempering_"):
            self.__dict__.pop(name, None)

    def _tensors(self, dtype: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the biases of v and h and of the weight [n_features, n_components]."""

        def copied(array: Any) -> Tensor:
            # PyTorch's memory, unlike NumPy's, begins where a cache line does, which is worth a tenth of fit's time.
            return torch.from_numpy(np.array(array, dtype, order="C")).clone()

        return copied(self.intercept_visible_), copied(self.intercept_hidden_), copied(self.components_.T)


class _Training:
    """A model in training, as float32 tensors.

    ``hidden`` [C, n_components] are the chains. ``offsets`` are those of v and h; there are none before the first step.
    """

    def __init__(self, estimator: BernoulliRBM, rng: np.random.RandomState) -> None:
        self.visible_bias, self.hidden_bias, self.weight = estimator._tensors(np.float32)
        self.hidden = torch.from_numpy(estimator.h_samples_.astype(np.float32))
        known = vars(estimator)
        self.offsets = [torch.from_numpy(known[name].astype(np.float32)) for name in _OFFSETS if name in known]
        self.tempering: TemperingResult | None = known.get("tempering_")
        self.model_phase, self.n_sweeps = _SOLVERS[estimator.solver], estimator.n_sweeps
        self.betas = torch.linspace(0, 1, estimator.n_betas, dtype=torch.float64)
        self.learning_rate, self.centering = float(np.float32(estimator.learning_rate)), estimator.centering
        self.rng, self.seed, self.sweeps_done = rng, _seed(rng), 0

    @torch.no_grad()
    def run(self, minibatches: Iterable[Any]) -> None:
        """Makes a step with each of the minibatches, arrays or sparse matrices [B, n_features]."""
        with reported_as(_NAME, **_ATTRIBUTES):
            for X in minibatches:
                self.step(torch.from_numpy((X.toarray() if issparse(X) else X).astype(np.float32)))

    def step(self, data: Tensor) -> None:
        """Moves the parameters and the chains by a minibatch [B, n_features]."""
        of_model, self.hidden = self.model_phase(self, data)
        visible = torch.cat((data, of_model))  # products of both phases at once
        hidden = torch.addmm(self.hidden_bias, visible, self.weight).sigmoid_()
        shares, ones = _shares(len(data), len(of_model))
        on_visible, on_hidden = shares, ones
        if self.centering:
            # With offsets mu of v and lambda of h, a step of the weight goes along the products of v - mu and
            # h - lambda, and the biases of v - mu and h - lambda are those here plus weight lambda and weight^T mu.
            # The latter take the usual step, so those here take it less the weight's step times lambda, or mu.
            mu, lambda_ = self.move_offsets(data, hidden[: len(data)])
            visible -= mu
            hidden -= lambda_
            on_visible = torch.addmv(ones, hidden, lambda_, alpha=-1).mul_(shares)
            on_hidden = torch.addmv(ones, visible, mu, alpha=-1)
        hidden *= shares.unsqueeze(1)
        self.weight.addmm_(visible.T, hidden, alpha=self.learning_rate)
        self.visible_bias.addmv_(visible.T, on_visible, alpha=self.learning_rate)
        self.hidden_bias.addmv_(hidden.T, on_hidden, alpha=self.learning_rate)

    def sweep(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """v [C, n_features] and h [C, n_components] of chains that go on from h."""
        hidden, visible = bipartite_gibbs(
            hidden, self.hidden_bias, self.visible_bias, self.weight.T, self.n_sweeps,
            seed=self.seed, sweep_offset=self.sweeps_done,
        )  # fmt: skip
        self.sweeps_done += self.n_sweeps
        return visible, hidden

    def temper(self) -> tuple[Tensor, Tensor]:
        """The same of tempered chains, at the last beta."""
        model = BipartiteBoltzmann(self.hidden_bias, self.visible_bias, self.weight.T, validate_args=False)
        chains, last = len(self.hidden), self.tempering
        if last is not None and last.all_samples.shape[:2] != (len(self.betas), chains):
            last = None  # The estimator's parameters have changed between two calls of partial_fit.
        self.tempering = parallel_tempering(model, chains, self.betas, self.n_sweeps, initial=last, seed=self.seed)
        hidden, visible = model.split(self.tempering.samples)
        return visible, hidden

    def move_offsets(self, visible: Tensor, hidden: Tensor) -> list[Tensor]:
        means = [visible.mean(0), hidden.mean(0)]
        if self.offsets:
            means = [torch.lerp(*pair, _OFFSET_RATE) for pair in zip(self.offsets, means, strict=True)]
        self.offsets = means
        return means

    def store(self, estimator: BernoulliRBM) -> None:
        """Sets the attributes of the estimator, in their dtype; none if one is not finite."""
        dtype = estimator.components_.dtype
        found = {
            "components_": self.weight.T,
            "intercept_visible_": self.visible_bias,
            "intercept_hidden_": self.hidden_bias,
            "h_samples_": self.hidden,
            **dict(zip(_OFFSETS, self.offsets, strict=False)),
        }
        for name, tensor in found.items():
            if not tensor.isfinite().all():
                rate = f"learning_rate={self.learning_rate:g}"
                raise ValueError(f"{_NAME}: {name} must stay finite, and did not with {rate}; take a smaller one")
        estimator.__dict__.update({name: tensor.numpy().astype(dtype) for name, tensor in found.items()})
        if self.tempering is not None:
            estimator.tempering_ = self.tempering


# What makes the model's phase of a step from a minibatch [B, n_features]: v [C, n_features], and h [C, n_components],
# which chains may go on from.
_ModelPhase = Callable[[_Training, Tensor], tuple[Tensor, Tensor]]


def _persistent(training: _Training, data: Tensor) -> tuple[Tensor, Tensor]:
    return training.sweep(training.hidden)


def _contrastive(training: _Training, data: Tensor) -> tuple[Tensor, Tensor]:
    return training.sweep(_draw(torch.addmm(training.hidden_bias, data, training.weight).sigmoid_(), training.rng))


def _tempered(training: _Training, data: Tensor) -> tuple[Tensor, Tensor]:
    return training.temper()


_SOLVERS: dict[str, _ModelPhase] = {"pcd": _persistent, "cd": _contrastive, "pt": _tempered}


@functools.lru_cache
def _shares(num_data: int, num_chains: int) -> tuple[Tensor, Tensor]:
    """The weights [B + C] of a difference of two means, and ones. They must not be mutated."""
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    shares = torch.tensor([1 / num_data] * num_data + [-1 / num_chains] * num_chains, **options)
    return shares, torch.ones(len(shares), **options)


def _draw(probabilities: Tensor, rng: np.random.RandomState) -> Tensor:
    """Bits of the probabilities' dtype."""
    return (torch.from_numpy(rng.random_sample(probabilities.shape)) < probabilities).to(probabilities.dtype)


def _seed(rng: np.random.RandomState) -> int:
    return int(rng.randint(2**63 - 1, dtype=np.int64))
