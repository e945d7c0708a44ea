"""What a demonstrator wants, and how much: the posterior of reward parameters and temperature.

1. Parameters θ and the temperature α have priors; `build(θ)` is the model, if θ is what it pays.
2. The demonstrator acts by π_{θ,α}, the exact policy of control of that model: a soft one, so that
   how often it did what says how much better it thought that. `demonstration` is the program.
3. Given states, actions are observed. What start and dynamics add to an episode is the same for
   all θ, and cancels; where they depend on θ too, first and next states are observed as well.
4. `infer_reward` samples p(θ, α | episodes) by NUTS, several chains in one process, each started
   at a draw from the prior, as wide a start as any. The density is the program's, by fewer
   operations (`reward_density`), compared with it before every run.
5. It moves in coordinates in which the posterior is about a standard normal: unconstrained, in
   units of the prior's width, and whitened by the Fisher information at the mode.
6. What the episodes cannot tell is said (`identification`): only θ/α has a say in π, and a reward
   that is the same everywhere has none, if there is no end to come to.
7. So is it (`mixing`) where chains do not agree, as on mirror images, or are too short or too few.

Departures. From Ziebart et al. (2008), "Non-Deterministic Path Distributions" and "Learning from
Demonstrated Behavior": a posterior in place of its mode, and the causal entropy of Ziebart et al.
(2010), with which random dynamics are not wished for. From Ramachandran and Amir (2007), §3.1: Q is
that of a soft policy, which expects itself to act so in future too.

References: Ziebart, Maas, Bagnell and Dey (2008), "Maximum entropy inverse reinforcement learning",
AAAI. Ziebart, Bagnell and Dey (2010), "Modeling interaction via the principle of maximum causal
entropy", ICML. Ramachandran and Amir (2007), "Bayesian inverse reinforcement learning", IJCAI.
Hoffman and Gelman (2014), "The no-U-turn sampler", JMLR 15.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer import MCMC, NUTS
from scipy.optimize import minimize
from torch import Tensor

from inference_rl.diagnostics.behaviour import (
    Episode,
    check_episodes,
    episodes_of,
    first_forbidden,
)
from inference_rl.diagnostics.identification import not_identified
from inference_rl.diagnostics.mixing import ParameterSummary, not_mixed, summarised
from inference_rl.diagnostics.page import Array
from inference_rl.diagnostics.reward_density import NEAR, PRIOR_DRAWS, RewardDensity
from inference_rl.diagnostics.reward_likelihood import Build, ParametricModel, RewardLikelihood
from inference_rl.diagnostics.samples import column
from inference_rl.finite import FiniteModel
from inference_rl.randomness import derived, torch_seeded

if TYPE_CHECKING:
    import xarray

TEMPERATURE = (-1.0, 1.0)
"""Mean and width of log α unless a prior is given: α within 0.07 and 1.9 with probability 0.9, for
rewards of about one."""

ACCEPTANCE = (0.8, 0.95)
"""Of proposals: what steps are made for, and if some of them diverged, made shorter for."""

LOOKED_AT = 50
"""Draws at which rewards are computed anew, where they were taken to be affine."""

RESERVED = ("temperature", "action", "next_state", "state_0")
"""Sites of the program, whose names no parameter can have."""


@dataclasses.dataclass(frozen=True)
class RewardPosterior:
    """What a demonstrator wants, as far as its episodes say.

    :ivar posterior: draws, an xarray DataTree that a netCDF file holds and ArviZ reads: `posterior`
        (each parameter, and the temperature if it was inferred), `sample_stats` (whether a draw
        diverged), `log_likelihood` (`actions`, of each episode, nats), and draws of the `prior`.
    :ivar not_identified: sentences, one for each direction in which the posterior is no narrower
        than the prior.
    :ivar not_mixed: sentences, if chains do not agree, or cannot be compared, or are too short for
        the intervals: who they are about, with R-hat and effective draws, and what to do.
    """

    posterior: xarray.DataTree
    not_identified: tuple[str, ...]
    not_mixed: tuple[str, ...]

    @property
    def identified(self) -> bool:
        """Whether the episodes say something of every combination of parameters."""
        return not self.not_identified

    @property
    def mixed(self) -> bool:
        """Whether there are chains that agree, R-hat ≤ 1.01, on 100 effective draws or more, in
        every parameter.
        """
        return not self.not_mixed

    @property
    def divergences(self) -> int:
        """Draws at which the sampler lost its way, with short steps too: intervals may be too
        narrow if there are any.
        """
        return int(column(self.posterior, "sample_stats", "diverging").sum())

    def summary(self) -> list[ParameterSummary]:
        """Of every number inferred, by ArviZ."""
        return _summaries(self.posterior)

    def __str__(self) -> str:
        lines = [f"{'':16}{'mean':>9}{'90% interval':>20}{'R-hat':>8}{'ESS':>7}"]
        lines += [
            f"{row.name:16}{row.mean:9.3f}{row.low:10.3f}{row.high:10.3f}{row.rhat:8.3f}"
            f"{row.ess:7.0f}"
            for row in self.summary()
        ]
        if self.divergences:
            lines.append(f"{self.divergences} draws diverged: intervals may be too narrow")
        return "\n".join([*lines, *self.not_identified, *self.not_mixed])


def _summaries(tree: xarray.DataTree) -> list[ParameterSummary]:
    found = []
    for name, variable in tree["posterior"].data_vars.items():
        values = np.asarray(variable.values)
        for index in np.ndindex(values.shape[2:]):
            label = f"{name}[{', '.join(map(str, index))}]" if index else str(name)
            found.append(summarised(label, values[(..., *index)]))
    return found


def infer_reward(
    build: Build,
    episodes: xarray.DataTree | Sequence[Episode | tuple[object, object]],
    parameters: Mapping[str, TorchDistribution],
    temperature: TorchDistribution | float | None = None,
    *,
    chains: int = 4,
    draws: int = 500,
    warmup: int = 100,
    seed: int = 0,
) -> RewardPosterior:
    """What rewards, and what temperature, demonstrated behaviour speaks for.

    :param build: the model, given parameters by name as float64 tensors. Its rewards (and dynamics,
        and prior) may depend on them, by operations of torch; it has Discrete states and actions.
    :param episodes: pairs of states and actions, `Episode`s, those of a Minari dataset
        (`episodes_from_minari`), or what `InferenceResult.sample` gave.
    :param parameters: a prior for each, of any shape, over continuous values.
    :param temperature: α of whoever acted, > 0, reward units: a prior, or a number if it is known.
        Log-normal unless given, with a median of 0.37, for rewards of about one.
    :param chains, draws, warmup: draws of each chain, after so many in which it is adapted.
    :param seed: of everything random: draws are the same to rounding.
    :raises TypeError: something that is no prior, or a model that is not finite.
    :raises ValueError: no episodes in which something is done, or such as the model does not allow
        for, whatever it pays; priors with mass on what makes the model invalid.
    :warns UserWarning: a combination of parameters that the episodes do not tell of; chains that
        do not agree, are too short, or are one alone.
    """
    for name, value, least in (("chains", chains, 1), ("draws", draws, 4), ("warmup", warmup, 20)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    priors, known = _checked_priors(parameters, temperature)
    done = episodes_of(episodes)
    if not done:
        raise ValueError("episodes: expected at least one in which something is done, got none")
    prior_draws = _prior_draws(priors, derived(seed, "prior"))
    model = ParametricModel(build, {n: v for n, v in prior_draws.items() if n != "temperature"})
    _check_possible(model.fixed, done)
    density = RewardDensity(RewardLikelihood(model, done), priors, known, prior_draws)
    if not (scores := density.of_episodes(density.draws[0])).min() > -math.inf:
        raise ValueError(
            f"episodes: episode {int(scores.argmin())} starts or moves as the model never does, "
            "whose dynamics depend on the parameters; let build give every step that was seen a "
            "probability"
        )
    density.check(density.draws[0])
    for acceptance in ACCEPTANCE:
        z, diverging = _sampled(density, chains, draws, warmup, acceptance, seed)
        spread = z.reshape(-1, density.size)[:: max(1, chains * draws // LOOKED_AT)]
        if not model.is_still_affine(density.parameters(spread), len(spread)):
            z, diverging = _sampled(density, chains, draws, warmup, acceptance, seed)
        if not diverging.any():
            break
    tree = _tree(density, z, diverging, prior_draws)
    tree.attrs.update({"seed": seed, "warmup": warmup})
    if known is not None:
        tree.attrs["temperature"] = known
    found = RewardPosterior(tree, not_identified(density, z), not_mixed(_summaries(tree), chains))
    for sentences in (found.not_identified, found.not_mixed):
        if sentences:
            warnings.warn("; ".join(sentences), stacklevel=2)
    return found


def _sampled(
    density: RewardDensity, chains: int, draws: int, warmup: int, acceptance: float, seed: int
) -> tuple[Tensor, Array]:
    """Coordinates (chain, draw, d), and which draws diverged."""
    whitened, found = _Whitened(density), []
    for chain in range(chains):
        with torch_seeded(derived(seed, f"chain {chain}")):
            start = density.draws[chain % len(density.draws)]
            found.append(whitened.sample(start, draws, warmup, acceptance))
    return torch.stack([z for z, _ in found]), np.array([lost for _, lost in found])


def _checked_priors(
    parameters: Mapping[str, TorchDistribution], temperature: TorchDistribution | float | None
) -> tuple[dict[str, TorchDistribution], float | None]:
    """Priors of all that is inferred, and α if it is known."""
    priors = dict(parameters)
    if taken := [name for name in priors if name in RESERVED]:
        raise ValueError(
            f"parameters: {taken[0]!r} is the program's own, call the parameter something else"
        )
    known = None
    if temperature is None:
        priors["temperature"] = dist.LogNormal(*torch.tensor(TEMPERATURE, dtype=torch.float64))
    elif isinstance(temperature, torch.distributions.Distribution):
        priors["temperature"] = temperature
    else:
        known = float(temperature)
        if not 0 < known < math.inf:
            raise ValueError(
                "temperature: expected a finite number > 0 in reward units, or a prior, got "
                f"{known}"
            )
    if not priors:
        raise ValueError(
            "parameters: expected something to infer, got none and a known temperature"
        )
    for name, prior in priors.items():
        if not isinstance(prior, torch.distributions.Distribution):
            raise TypeError(f"{name}: expected a Pyro distribution as its prior, got {prior!r}")
        if prior.support is None or prior.support.is_discrete:
            raise TypeError(f"{name}: expected a prior over continuous values, got {prior}")
    return priors, known


def _prior_draws(priors: Mapping[str, TorchDistribution], seed: int) -> dict[str, Tensor]:
    with torch_seeded(seed):
        found = {name: prior.sample((PRIOR_DRAWS,)).double() for name, prior in priors.items()}
    wrong = found.get("temperature", torch.ones(1))
    if wrong.dim() > 1 or not bool((wrong > 0).all()):
        raise ValueError(
            "temperature: expected a prior over one number > 0, such as a LogNormal, got "
            f"{priors['temperature']}"
        )
    return found


def _check_possible(model: FiniteModel, episodes: Sequence[Episode]) -> None:
    check_episodes(model, episodes)
    if (found := first_forbidden(model, episodes)) is not None:
        i, t = found
        raise ValueError(
            "build: the model's action prior has no mass on action "
            f"{int(episodes[i].actions[t])} in state {int(episodes[i].states[t])}, which was taken "
            f"at step {t} of episode {i}, so that no reward explains it; give it a small "
            "probability"
        )


class _Whitened:
    """NUTS in coordinates w, z = mode + L w, in which the posterior is about a standard normal."""

    def __init__(self, density: RewardDensity) -> None:
        self.density = density
        found = minimize(
            self._downhill,
            np.zeros(density.size),
            jac=True,
            method="L-BFGS-B",
            bounds=[(-NEAR, NEAR)] * density.size,
        )
        self.mode = torch.from_numpy(found.x)
        # The prior has about unit variance, so that this is the precision of the posterior there.
        precision = np.eye(density.size) + density.information(self.mode)
        self.root = torch.linalg.cholesky(torch.from_numpy(precision))
        self.stretch = torch.linalg.inv(self.root).T

    def _downhill(self, z: Array) -> tuple[float, Array]:
        value, gradient = self.density.with_gradient(torch.from_numpy(z))
        return -value, -gradient.numpy()

    def potential(self, at: Mapping[str, Tensor]) -> Tensor:
        return _Potential.apply(at["w"], self)

    def sample(
        self, start: Tensor, draws: int, warmup: int, acceptance: float
    ) -> tuple[Tensor, list[bool]]:
        """z of each draw, (draws, d), and whether it diverged."""
        # In these coordinates all scales are one; estimates of them from a warm-up are worse.
        kernel = NUTS(
            potential_fn=self.potential, adapt_mass_matrix=False, target_accept_prob=acceptance
        )
        first = {"w": self.root.T @ (start - self.mode)}
        chain = MCMC(kernel, draws, warmup, initial_params=first, disable_progbar=True)
        chain.run()
        lost = set(chain.diagnostics()["divergences"]["chain 0"])
        z = self.mode + chain.get_samples()["w"] @ self.stretch.T
        return z, [i in lost for i in range(draws)]


class _Potential(torch.autograd.Function):
    """-log p as NUTS takes it, whose gradient was found with it."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, whitened: _Whitened) -> Tensor:
        value, gradient = whitened.density.with_gradient(whitened.mode + whitened.stretch @ w)
        ctx.save_for_backward(-(whitened.stretch.T @ gradient))
        return w.new_tensor(-value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


def _tree(
    density: RewardDensity, z: Tensor, diverging: Array, prior_draws: Mapping[str, Tensor]
) -> xarray.DataTree:
    """Draws (chain, draw, d) as `RewardPosterior.posterior` has them."""
    import xarray

    scores = np.array([density.of_episodes(point) for point in z.reshape(-1, density.size)])
    prior = {name: draws.numpy()[np.newaxis] for name, draws in prior_draws.items()}
    return xarray.DataTree.from_dict(
        {
            "posterior": _dataset(density.values(z)),
            "sample_stats": _dataset({"diverging": diverging}),
            "log_likelihood": xarray.Dataset(
                {"actions": (["chain", "draw", "episode"], scores.reshape(*z.shape[:2], -1))}
            ),
            "prior": _dataset(prior),
        }
    )


def _dataset(columns: Mapping[str, Array]) -> xarray.Dataset:
    import xarray

    return xarray.Dataset(
        {
            name: (["chain", "draw", *(f"{name}_dim_{i}" for i in range(values.ndim - 2))], values)
            for name, values in columns.items()
        }
    )
