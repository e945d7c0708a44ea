"""What learned routines share on top of the loop: networks, temperature, descent, the result."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from inference_rl.inference import (
    Evidence,
    InferenceResult,
    ObjectiveParts,
    Progress,
    as_number,
    setup,
)

if TYPE_CHECKING:
    import torch
    import xarray
    from torch import Tensor, nn

    from inference_rl.environment import EnvironmentModel
    from inference_rl.learning.collection import Segment
    from inference_rl.learning.loop import Learner
    from inference_rl.learning.patience import Limit
    from inference_rl.networks import Architecture, ModulePolicy, StateFunction
    from inference_rl.policies import Policy
    from inference_rl.priors import ActionPrior
    from inference_rl.scale_out import Workers

OBJECTIVE_EPISODES = 32
"""From which the objective of the policy that was learned is estimated."""

OBJECTIVE_REST = 1e-6
"""Of the weight of all steps: what may follow the last step that the objective is estimated by."""

NO_EVIDENCE = "a learned routine sees samples only; Exact gives the evidence of a known model"


class How(TypedDict, total=False):
    """What `run` is told beside the settings, and every learned routine passes on; see `infer`."""

    prior: ActionPrior | None
    seed: int
    progress: Progress | None
    directory: Path | None
    workers: Workers | None


def networks(
    settings: Any,
    model: EnvironmentModel,
    prior: ActionPrior,
    *,
    logit_scale: float = 1.0,
    squashed: bool = False,
) -> tuple[Policy, Architecture]:
    """A policy for `model`, as `settings` want it, and what networks beside it are made of.

    :param logit_scale: reward units. :param squashed: those of a box; see `Architecture`.

    The built-in policy never takes discrete actions that `prior` forbids: by a table where states
    are discrete or the prior is the same in all of them, else by asking the prior, unless it is
    known to forbid nothing.
    """
    from gymnasium.spaces import Box

    from inference_rl.networks import Architecture, ModulePolicy, NetworkPolicy, described

    allowed, support = _restriction(model, prior)
    architecture = Architecture(
        states=described(model.state_space),
        actions=described(model.action_space),
        horizon=model.horizon,
        hidden=tuple(settings.hidden),
        activation=settings.activation,
        scaled=settings.scale_observations,
        masked=allowed is not None,
        support=support,
        logit_scale=logit_scale,
        squashed=squashed and isinstance(model.action_space, Box),
    )
    if settings.policy is None:
        return NetworkPolicy(architecture, allowed, prior if support else None), architecture
    own = _copied(ModulePolicy(settings.policy))
    own.check(model.state_space)
    return own, architecture


def policy_and_value(
    settings: Any, model: EnvironmentModel, prior: ActionPrior
) -> tuple[Policy, StateFunction]:
    """A policy and a state value for `model`, as `settings` want them."""
    from inference_rl.networks import StateFunction

    policy, architecture = networks(settings, model, prior)
    return policy, StateFunction(architecture, 1, 1.0)


def _copied(policy: ModulePolicy) -> ModulePolicy:
    """What is learned in place of a module of the user's own, which stays as it was given.

    :raises ValueError: there is nothing to learn in it.
    """
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            "policy: expected a module with parameters to learn, got a "
            f"{type(policy.module).__name__} in which none needs a gradient; call "
            "requires_grad_() on it, or give one with parameters"
        )
    return copy.deepcopy(policy)


def _restriction(
    model: EnvironmentModel, prior: ActionPrior
) -> tuple[Tensor | None, Literal["own", "given"] | None]:
    """Discrete actions that `prior` does not forbid, (A,) or (S, A), and whose prior is to be asked
    for them where no table can say; None where there is nothing to say."""
    from gymnasium.spaces import Discrete

    from inference_rl.distributions import possible

    if _forbids_nothing(prior, model):
        return None, None
    some, actions = _telling_states(model, prior), model.action_space
    if some is None or not isinstance(actions, Discrete):
        return None, support_of(model, prior)
    allowed = possible(prior(some), int(actions.n))
    return (None if allowed.all() else allowed), None


def support_of(model: EnvironmentModel, prior: ActionPrior) -> Literal["own", "given"]:
    """Whose prior a policy is to ask: that of the model, or one that was given in its place."""
    return "own" if prior == model.action_prior else "given"


def log_prior_table(model: EnvironmentModel, prior: ActionPrior, actions: Tensor) -> Tensor | None:
    """log ρ of all discrete actions, nats, (A,), or (S, A) for discrete states; None where it
    depends on a continuous state.

    :param actions: see `every_action`.
    """
    import torch
    from gymnasium.spaces import Discrete

    if is_uniform(model, prior):
        return torch.full((len(actions),), -math.log(len(actions)))
    some = _telling_states(model, prior)
    if some is None:
        return None
    log_prob: Tensor = prior(some).log_prob(actions)
    return log_prob.mT if isinstance(model.state_space, Discrete) else log_prob.squeeze(1)


def is_uniform(model: EnvironmentModel, prior: ActionPrior) -> bool:
    """Whether the prior is known to be: the model's own is, unless it says otherwise."""
    from inference_rl.priors import UniformPrior

    own = prior == model.action_prior and not overrides_prior(model)
    return own or isinstance(prior, UniformPrior)


def _telling_states(model: EnvironmentModel, prior: ActionPrior) -> Tensor | None:
    """States whose priors are those of all: all of them, if they are discrete, or any one, if they
    are known to share their prior; else None."""
    import torch
    from gymnasium.spaces import Discrete

    from inference_rl.learned_prior import LearnedPrior
    from inference_rl.priors import CategoricalPrior, MaskPrior, PolicyPrior

    if isinstance(model.state_space, Discrete):
        return torch.arange(int(model.state_space.n))
    marginal = isinstance(prior, PolicyPrior) and isinstance(prior.policy, LearnedPrior)
    masked = isinstance(prior, MaskPrior) and not callable(prior.allowed)
    if isinstance(prior, CategoricalPrior) or marginal or masked:
        return torch.zeros(model.state_space.shape or ())
    return None


def _forbids_nothing(prior: ActionPrior, model: EnvironmentModel) -> bool:
    """Whether there are no discrete actions, or `prior` is known to give all of them some mass in
    every state."""
    from gymnasium.spaces import Discrete, MultiDiscrete

    from inference_rl.learned_prior import LearnedPrior
    from inference_rl.networks import NetworkPolicy
    from inference_rl.priors import MixturePrior, PolicyPrior, UniformPrior

    if not isinstance(model.action_space, Discrete | MultiDiscrete):
        return True
    if isinstance(prior, UniformPrior):
        return True
    if isinstance(prior, PolicyPrior) and isinstance(prior.policy, LearnedPrior):
        return True
    if isinstance(prior, PolicyPrior) and isinstance(prior.policy, NetworkPolicy):
        made_of = prior.policy.architecture
        return not made_of.masked and made_of.support is None
    if isinstance(prior, MixturePrior):
        parts = zip(prior.priors, prior.weights.tolist(), strict=True)
        return any(weight > 0 and _forbids_nothing(part, model) for part, weight in parts)
    return prior == model.action_prior and not overrides_prior(model)


class Tempering:
    """The temperature of a run: where it is, and how it moves.

    :ivar temperature: reward units.
    :ivar targets: what a tuned one is tuned to, nats per step: `target_divergence` and, under a
        uniform prior, the `target_entropy` that is the same; empty if it is not tuned.
    """

    def __init__(self, settings: Any, model: EnvironmentModel, prior: ActionPrior) -> None:
        from inference_rl.temperature import Annealed, Fixed, Tuned, max_entropy

        self._how: Fixed | Annealed | Tuned
        self.targets: dict[str, float] = {}
        if settings.temperature == "auto":
            uniform = is_uniform(model, prior)
            self._how = Tuned(
                target_divergence=settings.target_divergence,
                target_entropy=settings.target_entropy,
                learning_rate=settings.temperature_learning_rate,
                start=getattr(settings, "initial_temperature", Tuned.start),
                low=getattr(settings, "least_temperature", Tuned.low),
                high=getattr(settings, "greatest_temperature", Tuned.high),
            ).resolved(model.action_space, uniform_prior=uniform)
            target = self._how.target_divergence
            assert target is not None
            self.targets["target_divergence"] = target
            if uniform:
                self.targets["target_entropy"] = max_entropy(model.action_space) - target
        elif settings.final_temperature is not None:
            self._how = Annealed(
                settings.temperature, settings.final_temperature, settings.total_steps
            )
        else:
            self._how = Fixed(settings.temperature)
        self._state, self._steps = self._how.initial_state(), 0

    @property
    def temperature(self) -> float:
        return self._how.temperature(self._state, self._steps)

    def advance(self, steps: int) -> None:
        """After `steps` environment steps."""
        self._steps += steps

    def update(self, divergence: Tensor, steps: int) -> None:
        """After a round of `steps` environment steps, at a mean `divergence` from the prior."""
        self.advance(steps)
        if self.targets:  # else nobody needs the number, for which a GPU is waited for
            self._state = self._how.update(self._state, as_number(divergence))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, **dataclasses.asdict(self._state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from inference_rl.temperature import TemperatureState

        self._steps = state["steps"]
        self._state = TemperatureState(**{k: v for k, v in state.items() if k != "steps"})


def overrides_prior(model: EnvironmentModel) -> bool:
    """Whether the model has an action prior of its own."""
    from inference_rl.environment import EnvironmentModel

    return type(model).action_prior is not EnvironmentModel.action_prior


def value_at(value: StateFunction, state: Tensor, step: Tensor) -> Tensor:
    """V(s_t), of the batch shape of `step`; any number after the last step of a horizon."""
    if value.horizon is not None:
        step = step.clamp(max=value.horizon - 1)
    return value(state, step).squeeze(-1)


def log_prior(prior: ActionPrior, data: Segment) -> Tensor:
    """log ρ(a_t | s_t), (T, N).

    :raises ValueError: the prior forbids an action that the policy took.
    """
    log_prob = prior(data.state).log_prob(data.action)
    forbidden = (log_prob == -math.inf) & data.valid
    if forbidden.any():
        state, action = data.state[forbidden][0].tolist(), data.action[forbidden][0].tolist()
        raise ValueError(
            f"prior: expected some mass on action {action} in state {state}, which the policy "
            "took, got none; give it a small probability there, or as policy=... a module of your "
            "own that never takes it"
        )
    return log_prob


def warn_of_random_dynamics(model: EnvironmentModel) -> None:
    """Warn if what follows a state and an action is random, where the program tells.

    :warns UserWarning: a squared residual of sampled paths is biased there.
    """
    import torch
    from gymnasium.spaces import Discrete

    from inference_rl.simulate import GymnasiumModel

    if isinstance(model, GymnasiumModel):
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(model.state_space, Discrete):
            state = torch.arange(int(model.state_space.n)).repeat(8)
            state = state[~model.terminal(state)]
        else:
            state = model.initial_state().sample((64,))
        transition = model.transition(state, model.action_prior(state).sample())
        draws = [transition.sample() for _ in range(8)]
    if any(not torch.equal(draws[0], other) for other in draws[1:]):
        warnings.warn(
            f"{model.name} has random dynamics, under which the squared residual of a sampled path "
            "is biased by the variance of the value it leads to, and the policy prefers what is "
            "certain; on a finite model use expectation='model' with window=1",
            stacklevel=2,
        )


def observe(data: Segment, *modules: nn.Module) -> None:
    """Let the networks that scale their observations see these."""
    from inference_rl.networks import ObservationScaling

    for module in modules:
        for part in module.modules():
            if isinstance(part, ObservationScaling):
                part.update(data.state[data.valid].to(part.mean.device))


def decay(optimiser: torch.optim.Optimizer, done: float) -> None:
    """Set the learning rates to what is left of those it began with, once `done` of 1 is done."""
    for group in optimiser.param_groups:
        group["lr"] = group.setdefault("first_lr", group["lr"]) * max(1 - done, 0.0)


def descend(
    optimiser: torch.optim.Optimizer, loss: Tensor, max_norm: float | None
) -> dict[str, Tensor]:
    """A step down the gradient of `loss`, whose groups are the policy and, if any, the value.

    :param max_norm: None does not clip.
    :returns: the norms of their gradients before they were clipped, by what they are logged as.

    Each group is clipped for itself: the errors of a value must not shorten the steps of a policy.
    """
    import torch

    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.requires_grad]
    # Without the bookkeeping of `backward` and `zero_grad`, which on small networks takes long.
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, slope in zip(parameters, slopes, strict=True):
        parameter.grad = slope
    norms = {}
    names = ("gradient_norm", "value_gradient_norm")
    for name, group in zip(names, optimiser.param_groups, strict=False):
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if not gradients:
            continue
        # As torch.nn.utils.clip_grad_norm_ does, which takes three times as long there.
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        if max_norm is not None and norm > max_norm:
            torch._foreach_mul_(gradients, max_norm / norm)
        norms[name] = norm
    optimiser.step()
    return norms


def run(
    settings: Any,
    make_learner: Callable[[Any, EnvironmentModel, ActionPrior], Learner],
    model: EnvironmentModel,
    *,
    prior: ActionPrior | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    directory: Path | None = None,
    workers: Workers | None = None,
) -> InferenceResult:
    """Learn a policy for `model`, and say what is known about it.

    :param directory: where to save checkpoints, and to resume from where there are any.
    :param workers: who steps the environments; None for this process.
    """
    import torch

    from inference_rl.learning.loop import Schedule, learn
    from inference_rl.learning.patience import Limit
    from inference_rl.learning.scalars import check_available
    from inference_rl.prior_checks import check_prior, states_to_act_in
    from inference_rl.randomness import derived
    from inference_rl.scale_out import Workers

    started = time.perf_counter()
    workers = Workers(0) if workers is None else workers
    if getattr(settings, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu', for torch sees no CUDA device here, got 'cuda'")
    if settings.tensorboard:
        if directory is None:
            raise ValueError("tensorboard: expected a directory to write to; give infer one")
        check_available()
    _say_where_episodes_are_cut(model)
    rho = prior if prior is not None else model.action_prior
    if len(states := states_to_act_in(model)):
        check_prior(rho, model, states)
    noted = None
    if directory is not None:
        is_ahead = workers is not None and workers.ahead
        noted = setup.write(directory, settings, model, prior, seed, ahead=is_ahead)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived(seed, "network"))
        learner = make_learner(settings, model, rho)
    schedule = Schedule(
        settings.total_steps,
        settings.evaluate_every,
        settings.evaluation_episodes,
        settings.save_every,
    )
    # Networks of this size gain nothing from a second thread for each of their operations, and lose
    # up to a factor of ten where another process needs its core.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            Limit(workers.patience).kept() as limit,
            _collector(settings, model, seed, workers, limit) as collector,
        ):
            metrics = learn(
                model,
                learner,
                collector,
                schedule,
                seed=seed,
                run=directory,
                setup=noted,
                tensorboard=settings.tensorboard,
                progress=progress,
                watch=limit.on,
            )
    finally:
        torch.set_num_threads(threads)
    learner.policy.requires_grad_(False)
    q, value = (getattr(learner, name, None) for name in ("q", "value"))
    for module in (q, value):
        if module is not None:
            module.requires_grad_(False).to("cpu")
    if progress is not None:
        progress("estimating the objective")
    rho = getattr(learner, "prior", rho)  # which may have been learned
    with Limit(workers.patience).kept() as limit:
        episodes = sampled_parts(model, learner.policy, rho, derived(seed, "objective"), limit)
    temperature = learner.tempering.temperature
    objective, standard_error = estimated_objective(episodes, temperature)
    result = InferenceResult(
        source=model,
        routine=settings,
        policy=learner.policy,
        q=q,
        v=value,
        objective=torch.tensor(objective, dtype=torch.float64),
        objective_standard_error=standard_error,
        parts_source=lambda: mean_parts(episodes),
        evidence_source=lambda: Evidence(reason=NO_EVIDENCE),
        final_temperature=temperature,
        iterations=metrics[-1]["steps"] if metrics else 0,
        seconds=time.perf_counter() - started,
        seed=seed,
        metrics=metrics,
        prior_source=lambda: rho,
        workers_replaced=collector.replaced,
    )
    if hasattr(settings, "value"):  # of those that learn q alone
        result.v = settings.value(result)
    return result


@contextlib.contextmanager
def _collector(
    settings: Any, model: EnvironmentModel, seed: int, workers: Workers, watch: Limit
) -> Iterator[Any]:
    """What collects for a run: environments of this process, or workers.

    :param watch: limits the time of a step in this process, and of closing.
    """
    from inference_rl.evaluation import episode_limit
    from inference_rl.learning.collection import Collector
    from inference_rl.scale_out.collector import divided
    from inference_rl.simulate import environments

    size, limit = settings.environments, episode_limit(model)
    if workers.count == 0:
        batch = environments(model, size, limit)
        with contextlib.closing(Collector(batch, seed, limit=watch)) as alone:
            yield alone
        return
    if workers.ahead and not hasattr(settings, "updates_per_step"):
        raise ValueError(
            f"workers: expected ahead=False (no --async) with {settings.name}, which learns from "
            "what its own policy does"
        )
    total_steps = settings.total_steps
    with divided(
        model, seed, workers, size=size, limit=limit, total_steps=total_steps
    ) as collector:
        yield collector


def _say_where_episodes_are_cut(model: EnvironmentModel) -> None:
    """:warns UserWarning: nothing but this library's own limit ends an episode of a simulator."""
    from inference_rl.evaluation import STEP_LIMIT
    from inference_rl.simulate import time_limit

    if model.gymnasium_id is not None and model.horizon is None and time_limit(model) is None:
        warnings.warn(
            f"{model.name} sets no limit to its episodes, so they are cut after {STEP_LIMIT:,} "
            "steps; another limit is given by --env-kwargs '{\"max_episode_steps\": N}'",
            stacklevel=2,
        )


def messages(result: InferenceResult) -> dict[str, Tensor]:
    """The parameters of the messages, by name."""
    return {
        f"{name}.{key}": value
        for name in ("q", "v")
        if (module := getattr(result, name)) is not None
        for key, value in module.state_dict().items()
    }


def read_messages(tensors: dict[str, Tensor], policy: Policy) -> dict[str, Any]:
    """v from what `messages` gave; a network of the policy's own architecture."""
    from inference_rl.networks import NetworkPolicy, StateFunction

    parameters = {key[2:]: value for key, value in tensors.items() if key.startswith("v.")}
    if not parameters or not isinstance(policy, NetworkPolicy):
        return {"q": None, "v": None}
    value = StateFunction(policy.architecture, 1, 1.0)
    value.load_state_dict(parameters)
    return {"q": None, "v": value.requires_grad_(False)}


def sample(
    result: InferenceResult, draws: int, *, horizon: int | None, seed: int
) -> xarray.DataTree:
    """Trajectories of the policy that was learned, as `InferenceResult.sample` says."""
    from inference_rl.inference.sampling import effective_horizon, trajectories_tree
    from inference_rl.learning.collection import Collector
    from inference_rl.randomness import derived
    from inference_rl.simulate import environments

    steps = effective_horizon(result.model, draws, horizon)
    batch = environments(result.model, draws, steps)
    with contextlib.closing(Collector(batch, derived(seed, "sampling"))) as collector:
        data = collector.collect_episodes(result.policy)
    columns = {
        "state": _with_last_state(data).transpose(0, 1),
        "action": data.action.transpose(0, 1),
        "reward": data.reward.transpose(0, 1),
        "alive": data.valid.transpose(0, 1),
    }
    if result.temperature > 0 and result.prior_source is not None:
        columns["log_weight"] = log_weights(
            data,
            result.policy,
            result.prior_source(),
            temperature=result.temperature,
            discount=float(result.model.discount),
        )
    return trajectories_tree(columns, {"seed": seed, **result.summary()})


def log_weights(
    data: Segment, policy: Policy, prior: ActionPrior, *, temperature: float, discount: float
) -> Tensor:
    """log p(τ, O) - log q(τ) of N paths, whole episodes of `policy`; nats, (N,) float64.

    Σ_t γ^t [r_t / temperature - log π(a_t|s_t) + log ρ(a_t|s_t)]; -inf where ρ forbids an action.
    """
    import torch

    with torch.no_grad():
        log_prob = policy(data.state, data.step).log_prob(data.action).double()
        ratio = prior(data.state).log_prob(data.action) - log_prob
        gain = torch.where(data.valid, data.reward / temperature + ratio, 0.0)
    return (discount ** data.step.double() * gain).sum(0)


def _with_last_state(data: Segment) -> Tensor:
    """(T + 1, N, ...): where every episode was, and where it stood still once it had ended."""
    import torch

    states = [data.state[0]]
    for valid, following in zip(data.valid, data.next_state, strict=True):
        mask = valid.reshape(valid.shape + (1,) * (following.dim() - 1))
        states.append(torch.where(mask, following, states[-1]))
    return torch.stack(states)


def sampled_parts(
    model: EnvironmentModel,
    policy: Policy,
    prior: ActionPrior,
    seed: int,
    limit: Limit | None = None,
) -> list[ObjectiveParts]:
    """What J is made of, in each of `OBJECTIVE_EPISODES` episodes of `policy`.

    Episodes are cut after `objective_steps`.

    :param limit: to the time of a step.
    """
    import torch

    from inference_rl.learning.collection import Collector
    from inference_rl.simulate import environments

    batch = environments(model, OBJECTIVE_EPISODES, objective_steps(model))
    with contextlib.closing(Collector(batch, seed, limit=limit)) as collector:
        data = collector.collect_episodes(policy)
    with torch.no_grad():
        log_prob = policy(data.state, data.step).log_prob(data.action).double()
        divergence = log_prob - log_prior(prior, data)
    weight = model.discount ** data.step.double() * data.valid

    def sums(rate: Tensor) -> list[float]:
        # Whole batches of episodes that ended where they started came to nothing before these.
        empty = len(collector.finished) - OBJECTIVE_EPISODES
        found: list[float] = (weight * torch.where(data.valid, rate, 0.0)).sum(0).tolist()
        return [0.0] * empty + found

    columns = (data.reward, -log_prob, divergence, torch.ones_like(data.reward))
    return [ObjectiveParts(*row) for row in zip(*map(sums, columns), strict=True)]


def objective_steps(model: EnvironmentModel) -> int:
    """Steps after which episodes that J is estimated by are cut.

    Where those of an evaluation are (`episode_limit`), or before: where Σ_{k >= t} γ^k is
    `OBJECTIVE_REST` of the whole. What is cut off is then at most that part of max|r̃| / (1 - γ),
    r̃ = r - α log(π/ρ), thousands of times less than what 32 episodes leave uncertain unless their
    returns agree to a thousandth.
    """
    from inference_rl.evaluation import episode_limit

    limit = episode_limit(model)
    if model.discount == 0:
        return 1
    if model.discount == 1:
        return limit
    return min(limit, math.ceil(math.log(OBJECTIVE_REST) / math.log(model.discount)))


def mean_parts(episodes: list[ObjectiveParts]) -> ObjectiveParts:
    """The means of what `sampled_parts` gave."""
    names = [field.name for field in dataclasses.fields(ObjectiveParts)]
    return ObjectiveParts(
        **{n: math.fsum(getattr(e, n) for e in episodes) / len(episodes) for n in names}
    )


def estimated_objective(episodes: list[ObjectiveParts], temperature: float) -> tuple[float, float]:
    """J in KL form, reward units, and the standard error of that estimate."""
    values = [e.expected_return - temperature * e.divergence for e in episodes]
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
