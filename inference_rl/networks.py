"""Networks: the policies and state values that learned routines fit.

Discrete states index a table, one row for each state (and step, under a horizon), which is exact
and needs no network; boxes go through a multilayer perceptron.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import pyro
import pyro.distributions as dist
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import linear

from inference_rl.distributions import as_discrete, possible
from inference_rl.policies import Policy
from inference_rl.squashed_normal import SquashedNormal
from inference_rl.truncated_normal import TruncatedNormal

if TYPE_CHECKING:
    from inference_rl.priors import ActionPrior
    from inference_rl.softmax_policy import SoftmaxPolicy

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "silu": nn.functional.silu}

NARROWEST = 1e-3
"""Least width of a continuous policy, in units of the action box [-1, 1]."""

SQUASHED_LOG_SCALES = (-20.0, 2.0)
"""Logarithms of the least and largest width of a Gaussian that is squashed.

Haarnoja et al. (2018), arXiv:1801.01290, in the authors' code.
"""

CLIPPED = 10.0
"""Scaled observations further out than so many standard deviations are moved there."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a network is made of; JSON.

    :ivar states, actions: spaces, as `described`.
    :ivar horizon: steps of an episode, if what is best depends on the step.
    :ivar hidden: widths of the hidden layers. :ivar activation: tanh, relu or silu.
    :ivar scaled: whether observations are scaled to zero mean and unit variance, as seen so far.
    :ivar masked: whether some discrete actions are forbidden, by a table.
    :ivar support: whose zero mass forbids discrete actions, state by state: that of the model's own
        prior, or of one that was given in its place.
    :ivar logit_scale: reward units; what outputs are divided by to be logits of discrete actions.
    :ivar squashed: whether actions of a box are the tanh of Gaussians, whose widths too are a
        function of the state, in place of truncated Gaussians.
    :ivar width: of Gaussians that are squashed, the same in all states, before tanh; where it is
        given it is where a policy's `width` begins, which is no parameter.
    """

    states: dict[str, Any]
    actions: dict[str, Any]
    horizon: int | None = None
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    scaled: bool = False
    masked: bool = False
    support: Literal["own", "given"] | None = None
    logit_scale: float = 1.0
    squashed: bool = False
    width: float | None = None


def described(space: Space[Any]) -> dict[str, Any]:
    """A space as JSON: what of it a network must know.

    :raises TypeError: no network is made for such spaces.
    """
    if isinstance(space, Discrete):
        return {"kind": "discrete", "size": int(space.n)}
    if isinstance(space, MultiDiscrete):
        if space.nvec.ndim != 1:
            raise TypeError(f"expected a MultiDiscrete space of one dimension, got {space}")
        return {"kind": "multi-discrete", "sizes": [int(n) for n in space.nvec]}
    if isinstance(space, Box):
        bounded = bool(space.is_bounded())
        return {"kind": "box", "dim": math.prod(space.shape), "bounded": bounded}
    raise TypeError(f"expected a Discrete, MultiDiscrete or Box space, got {space}")


def as_space(actions: dict[str, Any]) -> Space[Any]:
    """The space of actions that was `described`, as policies know it: a box with bounds is
    [-1, 1]^d."""
    if actions["kind"] == "discrete":
        return Discrete(actions["size"])
    if actions["kind"] == "multi-discrete":
        return MultiDiscrete(actions["sizes"])
    edge = 1.0 if actions["bounded"] else math.inf
    return Box(-edge, edge, (actions["dim"],))


def example_states(space: Space[Any], count: int) -> Tensor:
    """`count` states of a Discrete or Box space, to see what a policy gives before it learns."""
    if isinstance(space, Discrete):
        return torch.arange(count) % int(space.n)
    assert isinstance(space, Box)
    low, high = (torch.from_numpy(edge.astype(space.dtype)) for edge in (space.low, space.high))
    return torch.zeros(count, *space.shape, dtype=low.dtype).clamp(low, high)


class ObservationScaling(nn.Module):
    """Observations to zero mean and unit variance, by what was seen up to the last `update`."""

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, observations: Tensor) -> None:
        """Add a batch (..., d) to the running moments.

        Chan, Golub and LeVeque (1983), The American Statistician 37(3), 242-247.
        """
        batch = observations.reshape(-1, len(self.mean)).double()
        count, change = len(batch), batch.mean(0) - self.mean
        total = self.count + count
        spread = self.variance * self.count + batch.var(0, correction=0) * count
        self.variance.copy_((spread + change.square() * self.count * count / total) / total)
        self.mean.add_(change * count / total)
        self.count.copy_(total)

    def forward(self, observation: Tensor) -> Tensor:
        scaled = (observation - self.mean) / self.variance.sqrt().clamp(min=1e-8)
        return scaled.clamp(-CLIPPED, CLIPPED).to(observation.dtype)


class StateFunction(nn.Module):
    """A function of the state (and the step) with `outputs` values: a table or a perceptron.

    :param last_gain: scale of the last layer's initial weights; a table starts at zero.

    Orthogonal initialisation: Saxe, McClelland and Ganguli (2014), arXiv:1312.6120.
    """

    def __init__(self, architecture: Architecture, outputs: int, last_gain: float) -> None:
        super().__init__()
        self.horizon = architecture.horizon
        self.tabular = architecture.states["kind"] == "discrete"
        if self.tabular:
            rows = (architecture.horizon or 1) * architecture.states["size"]
            self.size = architecture.states["size"]
            self.table = nn.Parameter(torch.zeros(rows, outputs))
            return
        if architecture.states["kind"] != "box":
            raise TypeError(f"expected Discrete or Box states, got {architecture.states}")
        dim = architecture.states["dim"]
        self.scaling = ObservationScaling(dim) if architecture.scaled else None
        widths = [dim + (self.horizon is not None), *architecture.hidden]
        self.activation = ACTIVATIONS[architecture.activation]
        hidden = [_linear(*pair, math.sqrt(2)) for pair in pairwise(widths)]
        self.layers = nn.ModuleList([*hidden, _linear(widths[-1], outputs, last_gain)])

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        """Of shape batch + (outputs,).

        :raises ValueError: the function depends on the step, and is called without one.
        """
        if self.horizon is not None and t is None:
            raise ValueError(
                f"this policy depends on the step: call policy(state, t) with t in "
                f"0..{self.horizon - 1}"
            )
        if self.tabular:
            row = state if self.horizon is None else state + self.size * _steps(t)
            return self.table[row]
        inputs = state.to(torch.get_default_dtype())
        if self.scaling is not None:
            inputs = self.scaling(inputs)
        if self.horizon is not None:
            share = (_steps(t) / self.horizon).to(inputs.dtype)
            inputs = torch.cat([inputs, share.expand(inputs.shape[:-1]).unsqueeze(-1)], dim=-1)
        # Not as modules, nor in more dimensions than two: at these sizes that is what takes long.
        outputs = inputs if inputs.dim() == 2 else inputs.reshape(-1, inputs.shape[-1])
        layers: list[Any] = [*self.layers]
        for layer in layers[:-1]:
            outputs = self.activation(linear(outputs, layer.weight, layer.bias))
        outputs = linear(outputs, layers[-1].weight, layers[-1].bias)
        if inputs.dim() == 2:
            return outputs
        return outputs.reshape(*inputs.shape[:-1], outputs.shape[-1])


def _steps(t: int | Tensor | None) -> Tensor:
    return torch.as_tensor(t)


def _linear(fan_in: int, fan_out: int, gain: float) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class _Logits(dist.Categorical):
    """`Categorical(logits=...)`, which torch is slower to make than the network is to run."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = self._param = logits.log_softmax(-1)
        self._num_events = logits.shape[-1]
        self._batch_shape, self._event_shape = logits.shape[:-1], torch.Size()
        self._validate_args = False

    @property
    def probs(self) -> Tensor:
        return self.logits.exp()

    def log_prob(self, value: Tensor) -> Tensor:
        if value.shape != self._batch_shape:
            log_prob: Tensor = super().log_prob(value)
            return log_prob
        return self.logits.gather(-1, value.long().unsqueeze(-1)).squeeze(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Logits:
        return _Logits(self.logits.expand(*batch_shape, -1))


def _support(prior: ActionPrior, actions: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """From states to the discrete actions that `prior` gives any mass: booleans, as `logits`."""
    # A function, and not the prior: copies of a policy are not to copy a prior, or its model.
    if actions["kind"] == "discrete":
        return lambda state: possible(prior(state), actions["size"])
    widest = max(actions["sizes"])

    def allowed(state: Tensor) -> Tensor:
        distribution = prior(state)
        if isinstance(distribution, torch.distributions.Independent):
            return possible(distribution.base_dist, widest)
        # Its dimensions hang together, as those of the policy cannot.
        return torch.ones((len(actions["sizes"]), widest), dtype=torch.bool)

    return allowed


class NetworkPolicy(Policy):
    """A policy whose parameters are a function of the state.

    Discrete actions are categorical, each dimension of a MultiDiscrete one for itself. In a bounded
    box they are truncated Gaussians on [-1, 1]^d, whose density is finite up to the edges; where
    the box has no bounds, Gaussians; or, if they are to be `squashed`, the tanh of Gaussians. All
    start close to uniform, or as wide as half the box.

    :param allowed: booleans, (A,), or (S, A) for discrete states: discrete actions that are False
        are never taken. All of them where it is not given.
    :param prior: discrete actions to which it gives no mass in a state are not taken there; needed
        where the architecture names its `support`. It is code, and no part of what is saved.
    :raises ValueError: there is no such prior.
    """

    kind = "network"
    allowed: Tensor
    width: Tensor

    def __init__(
        self,
        architecture: Architecture,
        allowed: Tensor | None = None,
        prior: ActionPrior | None = None,
    ) -> None:
        super().__init__()
        self._support: Callable[[Tensor], Tensor] | None = None
        if architecture.support is not None:
            if prior is None:
                raise ValueError(
                    "NetworkPolicy: expected the prior whose forbidden actions it never takes, got "
                    "none; give it as prior=..."
                )
            self._support = _support(prior, architecture.actions)
        if architecture.masked:
            shape = [architecture.actions["size"]]
            if architecture.states["kind"] == "discrete":
                shape = [architecture.states["size"], *shape]
            given = torch.ones(shape, dtype=torch.bool) if allowed is None else allowed
            self.register_buffer("allowed", given.expand(shape).clone())
        self.architecture, actions = architecture, architecture.actions
        self.register_parameter("log_scale", None)
        self.action_kind = actions["kind"]
        if self.action_kind == "discrete":
            self.parameters_of = StateFunction(architecture, actions["size"], 0.01)
        elif self.action_kind == "multi-discrete":
            self.sizes = actions["sizes"]
            self.parameters_of = StateFunction(architecture, sum(self.sizes), 0.01)
        elif architecture.squashed:
            if not actions["bounded"]:
                raise TypeError(
                    "NetworkPolicy: expected a box with bounds to squash actions into, got one "
                    "without; give the action space bounds"
                )
            kinds = 2 if architecture.width is None else 1
            self.parameters_of = StateFunction(architecture, kinds * actions["dim"], 0.01)
            if architecture.width is not None:
                self.register_buffer("width", torch.tensor(architecture.width))
        else:
            self.parameters_of = StateFunction(architecture, actions["dim"], 0.01)
            self.log_scale = nn.Parameter(torch.full((actions["dim"],), math.log(0.5)))

    @classmethod
    def described_by(
        cls, description: dict[str, Any], *, prior: ActionPrior | None = None
    ) -> NetworkPolicy:
        """A new policy of the architecture that `description` gave."""
        hidden = tuple(description["hidden"])
        return cls(Architecture(**{**description, "hidden": hidden}), prior=prior)

    def description(self) -> dict[str, Any]:
        return dataclasses.asdict(self.architecture)

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> TorchDistribution:
        return self.distribution(self.parameters_of(state, t), self.log_scale, state)

    def distribution(
        self, parameters: Tensor, log_scale: Tensor | None, state: Tensor
    ) -> TorchDistribution:
        """That of these parameters, which `parameters_of` gives in `state`, and of this width."""
        if self.action_kind == "discrete":
            return _Logits(self._logits_of(parameters, state))
        if self.architecture.squashed:
            loc, scale = self._squashed(parameters)
            return SquashedNormal(loc, scale, validate_args=False).to_event(1)
        if log_scale is None:
            logits = self._logits_of(parameters, state)
            return dist.Categorical(logits=logits, validate_args=False).to_event(1)
        scale = log_scale.exp() + NARROWEST
        if self.architecture.actions["bounded"]:
            return TruncatedNormal(parameters, scale, validate_args=False).to_event(1)
        return dist.Normal(parameters, scale, validate_args=False).to_event(1)

    def _squashed(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Means and widths of Gaussians that are to be squashed."""
        if self.architecture.width is not None:
            return parameters, self.width
        loc, log_scale = parameters.chunk(2, -1)
        return loc, log_scale.clamp(*SQUASHED_LOG_SCALES).exp()

    def logits(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        """Of discrete actions, batch + (A,), as they are: log π up to a constant of the state.

        Of a MultiDiscrete batch + (dimensions, widest), -inf beyond the end of the others.
        """
        return self._logits_of(self.parameters_of(state, t), state)

    def _logits_of(self, parameters: Tensor, state: Tensor) -> Tensor:
        logits = parameters
        if self.architecture.logit_scale != 1:
            logits = logits / self.architecture.logit_scale
        if self.action_kind == "multi-discrete":
            logits = _side_by_side(logits.split(self.sizes, dim=-1))
        if self.architecture.masked:
            allowed = self.allowed if self.allowed.dim() == 1 else self.allowed[state]
            logits = logits.masked_fill(~allowed, -torch.inf)
        if self._support is not None:
            with torch.no_grad(), torch.device("cpu"):  # where priors are
                allowed = self._support(state.cpu())
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        return logits

    def mode(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        return self.mode_of(self.parameters_of(state, t), state)

    def mode_of(self, parameters: Tensor, state: Tensor) -> Tensor:
        """The most likely action under what `parameters_of` gave."""
        if self.action_kind in ("discrete", "multi-discrete"):
            return self._logits_of(parameters, state).argmax(-1)
        if self.architecture.squashed:
            return self._squashed(parameters)[0].tanh()
        return parameters.clamp(-1, 1) if self.architecture.actions["bounded"] else parameters


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Logits of several choices as one tensor, (..., choices, widest)."""
    widest = max(part.shape[-1] for part in parts)
    padded = [
        nn.functional.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in parts
    ]
    return torch.stack(padded, dim=-2)


class LogPartition(nn.Module):
    """V(s) = temperature · log Σ_a exp f(s, a), reward units, of the logits f of a policy.

    :param temperature: > 0, reward units.
    """

    temperature: Tensor

    def __init__(self, policy: NetworkPolicy | SoftmaxPolicy, temperature: float) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple, because it is no part of this module
        self.horizon = policy.architecture.horizon
        self.register_buffer("temperature", torch.tensor(temperature))

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        """Batch + (1,)."""
        return self.temperature * self._policy[0].logits(state, t).logsumexp(-1, keepdim=True)


class ModulePolicy(Policy):
    """A user's own module, `state -> distribution`, as a policy.

    :param module: called with states of any batch shape; an `nn.Module` or `PyroModule` whose
        parameters are its own. It returns a Pyro distribution over actions: of `event_dim` 1 on
        [-1, 1]^d for boxes.

    The module is in evaluation mode from here on, also while it learns: dropout does nothing, and
    batch normalisation uses the statistics that it came with. What it returns must be a function of
    its parameters and the state alone, or the run could not be resumed exactly.
    """

    kind = "module"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"policy: expected an nn.Module that maps states to a distribution, got {module!r}"
            )
        self.module = module
        self.eval()

    def train(self, mode: bool = True) -> ModulePolicy:
        super().train(False)
        return self

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> TorchDistribution:
        # Or Pyro would put in place of its parameters what any other module calls by their names.
        with pyro.get_param_store().scope():
            returned = self.module(state)
        if not isinstance(returned, torch.distributions.Distribution):
            raise TypeError(
                f"policy: expected {type(self.module).__name__} to return a distribution over "
                f"actions, got {type(returned).__name__}; make one of it, such as "
                "pyro.distributions.Categorical(logits=...)"
            )
        distribution: Any = returned
        return distribution

    def mode(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        """The most likely action; under a density that a monotone transform such as tanh bends, the
        image of what is most likely before it, which need not be where the bent density is highest.

        :raises TypeError: nobody knows it.
        """
        return _mode(self(state, t))

    def check(self, space: Space[Any]) -> None:
        """See whether learning and evaluation will get from the module what they need.

        :param space: of the states.
        :raises TypeError: no distribution, or one whose most likely action nobody knows.
        :raises ValueError: the module draws from torch's generator.
        """
        before = torch.get_rng_state()
        with torch.no_grad():
            self.mode(example_states(space, 2))
        if not torch.equal(torch.get_rng_state(), before):
            raise ValueError(
                f"policy: expected {type(self.module).__name__} to return a function of its "
                "parameters and the state, but it draws from torch's generator, and such a run "
                "cannot be resumed exactly; leave the drawing to the distribution"
            )


def _mode(distribution: Any) -> Tensor:
    """:raises TypeError: nobody knows the most likely value of such a distribution."""
    if isinstance(distribution, torch.distributions.Independent):
        return _mode(distribution.base_dist)
    if isinstance(distribution, dist.Delta):
        return distribution.v
    if isinstance(distribution, torch.distributions.TransformedDistribution) and all(
        transform.bijective and transform.domain.event_dim == 0
        for transform in distribution.transforms
    ):
        image = _mode(distribution.base_dist)
        for transform in distribution.transforms:
            image = transform(image)
        return image
    try:
        if distribution.has_enumerate_support and not distribution.event_shape:
            size = distribution.enumerate_support().shape[0]
            return as_discrete(distribution, size).logits.argmax(-1)
        mode: Tensor = distribution.mode
    except NotImplementedError:
        raise TypeError(
            "policy: expected distributions whose most likely action is known, for evaluation, got "
            f"{distribution}; give its class a property `mode`"
        ) from None
    return mode
