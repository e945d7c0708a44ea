"""Maximum-entropy policy gradient: the whole trajectory's evidence lower bound, by its score.

Inferred: a policy π, as guide q(τ) of the trajectory program; the target is control, so that the
guide keeps the environment's own dynamics.

1. log p(O) ≥ ELBO(π) = E_q[log p(τ, O) − log q(τ)]; the dynamics are in both and cancel (Levine
   2018, arXiv:1805.00909, §3.2).
2. temperature · ELBO = J(π) = E_q Σ_t γ^t [r_t − α ℓ_t], ℓ_t = log π(a_t|s_t) − log ρ(a_t|s_t).
3. ∇ E_q f = E_q[f ∇ log q] + E_q[∇ f] (Williams 1992); ∇ f is a score itself, of mean zero.
4. What came before a_t does not depend on it: ∇ J = E_q Σ_t γ^t ∇ log π(a_t|s_t) G_t, where
   G_t = Σ_{k≥t} γ^{k−t} [r_k − α ℓ_k], reward to go (Sutton et al. 2000).
5. Any b(s_t) may be subtracted from G_t: the learned soft value V, which is the message.
6. Where the segment ends before the episode does, V(s) stands for the rest, as `message=` does in
   the program; λ < 1 lets it stand in earlier (Schulman et al. 2016, arXiv:1506.02438, eq. 16).
7. Pathwise, where model and guide can be reparameterised: ∇ J = E ∇ Σ_t γ^t [r_t − α ℓ_t] through
   the sampled states (`estimator="pathwise"`), `steps_per_round` steps from the start; nothing
   stands for what follows them.

`estimator="entropy-bonus"` is the textbook's ∇ log π(a_t|s_t) R_t + α ∇ H(π(·|s_t)), R_t the return
of rewards alone. It is another gradient, not of J: it pays for entropy now, and not for getting to
states where entropy can be had.

Departures:
1. With λ < 1, or `centre_advantages`, the gradient is biased for lower variance: by what V gets
   wrong, and by one part in the number of steps of a round.
2. Gradients are clipped to `max_gradient_norm`, and taken by Adam. Advantages are not scaled to
   unit variance round by round, as is common: those of a policy that is nearly perfect are noise,
   and would move it as far as what it had to learn.
3. `weigh_by_discount=False` drops γ^t from 4, as most implementations do: it improves the policy
   where it is in the long run, and is the gradient of no function (Nota and Thomas 2020,
   arXiv:1906.07073).

Williams (1992), Machine Learning 8, 229-256. Sutton, McAllester, Singh and Mansour (2000), NIPS 12.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from inference_rl.inference import checks, learned
from inference_rl.search_spaces import Choice, LogUniform, Uniform, searched

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inference_rl.environment import EnvironmentModel
    from inference_rl.inference import InferenceResult
    from inference_rl.learning.collection import Collector, Segment
    from inference_rl.networks import StateFunction
    from inference_rl.policies import Policy
    from inference_rl.priors import ActionPrior


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """Maximum-entropy policy gradient: REINFORCE and actor-critic on the evidence lower bound.

    :raises ValueError: (when made) a setting out of its range.
    """

    temperature: float | Literal["auto"] = searched(0.01, LogUniform(1e-3, 0.1))
    """>= 0, reward units; "auto" tunes it to a target."""
    final_temperature: float | None = None
    """Annealed to this, geometrically, over the run; None keeps it."""
    target_entropy: float | None = None
    """Nats per step, with temperature "auto"; None chooses, and says which."""
    target_divergence: float | None = None
    """KL(π ‖ ρ), nats per step, with temperature "auto"; in place of target_entropy."""
    temperature_learning_rate: float = 0.02
    """Of the logarithm of a tuned temperature (Adam)."""
    estimator: Literal["score", "pathwise", "entropy-bonus"] = "score"
    """score: likelihood ratios. pathwise: through the program. entropy-bonus: the textbook's."""
    total_steps: int = 200_000
    """Environment steps."""
    environments: int = 8
    """Side by side."""
    steps_per_round: int = searched(32, Choice((8, 16, 32, 64, 128)))
    """Of each environment, between updates; 0 for one whole episode each."""
    baseline: Literal["learned", "none"] = "learned"
    """What is subtracted from the return: the soft value, or nothing."""
    trace_decay: float = searched(0.95, Uniform(0.8, 1.0))
    """λ of generalised advantage estimation, in [0, 1]; 1 is the plain return."""
    centre_advantages: bool = True
    """Subtract from the advantages of a round their mean."""
    weigh_by_discount: bool = False
    """Weigh step t by γ^t, which makes the gradient that of J."""
    learning_rate: float = searched(3e-3, LogUniform(3e-4, 3e-2))
    """Of the policy (Adam)."""
    value_learning_rate: float = searched(1e-2, LogUniform(1e-3, 3e-2))
    """Of the baseline (Adam)."""
    decay_learning_rates: bool = True
    """Linearly to zero over the run."""
    max_gradient_norm: float | None = searched(0.5, LogUniform(0.3, 5.0))
    """Longer gradients, of policy or baseline, are shortened to this; None keeps them."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers; discrete states have a table instead."""
    activation: Literal["tanh", "relu", "silu"] = "tanh"
    """Between layers."""
    scale_observations: bool = False
    """To zero mean and unit variance, as seen so far; saved with the policy."""
    evaluate_every: int = 20_000
    """Environment steps between evaluations."""
    evaluation_episodes: int = 10
    """Of each, with drawn and with most likely actions."""
    save_every: int = 50_000
    """Environment steps between checkpoints."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, in the directory of the run."""
    policy: Any = None
    """An nn.Module, `state -> distribution`, of which a copy is learned in place of the built-in
    networks (Python only)."""

    name: ClassVar[str] = "policy-gradient"

    def __post_init__(self) -> None:
        checks.check_temperature(self)
        checks.check_common(self)
        checks.check_ranges(
            self,
            trace_decay=(0, 1),
            steps_per_round=(0, None),
            max_gradient_norm=(0, None),
        )
        checks.check_positive(
            self, "learning_rate", "value_learning_rate", "temperature_learning_rate"
        )
        if self.estimator == "pathwise" and self.temperature == 0:
            raise ValueError(
                "temperature: the pathwise estimator runs the program, which divides by it; "
                "expected one above 0, got 0"
            )
        if self.estimator == "pathwise" and self.steps_per_round == 0:
            raise ValueError(
                "steps_per_round: the pathwise estimator goes a fixed number of steps through the "
                "program, expected at least 1, got 0"
            )
        if self.baseline == "none" and self.steps_per_round and self.estimator != "pathwise":
            raise ValueError(
                "baseline: without one nothing stands for what follows a segment; set "
                "steps_per_round=0 for whole episodes, or baseline='learned'"
            )

    def run(self, model: EnvironmentModel, **how: Unpack[learned.How]) -> InferenceResult:
        return learned.run(self, _Learner, model, **how)

    def sample(self, result: InferenceResult, draws: int, *, horizon: int | None, seed: int) -> Any:
        return learned.sample(result, draws, horizon=horizon, seed=seed)

    def messages(self, result: InferenceResult) -> dict[str, Tensor]:
        """The parameters of v."""
        return learned.messages(result)

    def read_messages(self, tensors: dict[str, Tensor], policy: Policy) -> dict[str, Any]:
        """q, which there is none of, and v from what `messages` gave."""
        return learned.read_messages(tensors, policy)


def advantages(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    ended: Tensor,
    *,
    discount: float,
    trace_decay: float,
) -> Tensor:
    """Generalised advantages of soft rewards r − α ℓ, all (T, N); reward units.

    A_t = δ_t + γλ A_{t+1} within an episode, δ_t = r_t + γ V(s_{t+1}) − V(s_t); V counts for
    nothing once the episode has terminated, and for the rest where it was cut. Schulman et al.
    (2016), arXiv:1506.02438, eq. 16.
    """
    import torch

    # In NumPy, whose small operations take a fraction of torch's time.
    given = (reward, value, next_value, terminated, ended)
    paid, before, after, is_last, is_over = (part.cpu().numpy() for part in given)
    advantage = paid + discount * after * ~is_last - before
    carried = (~is_over).astype(advantage.dtype) * (discount * trace_decay)
    for t in range(len(advantage) - 2, -1, -1):
        advantage[t] += carried[t] * advantage[t + 1]
    return torch.from_numpy(advantage).to(reward.device)


def score_loss(log_prob: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
    """−Σ weight · log π(a|s) · A, whose gradient is that of −J (equation 4)."""
    return -(weight * log_prob * advantage.detach()).sum()


def entropy_bonus_loss(
    log_prob: Tensor, entropy: Tensor, advantage: Tensor, weight: Tensor, temperature: float
) -> Tensor:
    """−Σ weight · [log π(a|s) · A + α H(π(·|s))], A of rewards alone."""
    return -(weight * (log_prob * advantage.detach() + temperature * entropy)).sum()


def pathwise_loss(
    model: EnvironmentModel,
    policy: Policy,
    prior: ActionPrior,
    *,
    temperature: float,
    steps: int,
    paths: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """−J of the first `steps` steps, mean entropy and divergence of a step, from so many paths.

    The program itself: −temperature · mean of log p(τ, O) − log q(τ), differentiable through
    reparameterised states and actions.
    """
    import pyro
    from pyro import poutine

    from inference_rl.trajectory import trajectory

    with pyro.plate("paths", paths):
        guide = poutine.trace(trajectory).get_trace(model, policy, steps)
        joint = poutine.trace(poutine.replay(trajectory, guide)).get_trace(
            model, prior, steps, temperature=temperature
        )
    guide.compute_log_prob()
    joint.compute_log_prob()
    elbo: Any = joint.log_prob_sum() - guide.log_prob_sum()
    names = [f"action_{t}" for t in range(steps)]
    taken: Any = sum(guide.nodes[name]["unscaled_log_prob"].detach().mean() for name in names)
    expected: Any = sum(joint.nodes[name]["unscaled_log_prob"].detach().mean() for name in names)
    loss: Tensor = -temperature * elbo / paths
    entropy: Tensor = -taken / steps
    divergence: Tensor = (taken - expected) / steps
    return loss, entropy, divergence


def value_loss(value: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """½ Σ weight · (V(s) − target)²."""
    return 0.5 * (weight * (value - target.detach()).square()).sum()


@dataclasses.dataclass(frozen=True)
class _Paths:
    """A round whose steps are taken by the program, within the update."""

    steps: int


def _check_reparameterised(model: EnvironmentModel, policy: Policy) -> None:
    """:raises TypeError: draws of model or policy are no functions of their parameters."""
    from inference_rl.simulate import GymnasiumModel

    if isinstance(model, GymnasiumModel):
        raise TypeError(
            f"estimator: pathwise needs a program to differentiate through, and {model.name} is a "
            "simulator; use estimator='score', or write its dynamics as an EnvironmentModel"
        )
    state = model.initial_state().sample((1,))
    action = policy(state, 0).sample()
    for what, distribution in (
        ("actions", policy(state, 0)),
        ("states", model.transition(state, action)),
    ):
        if not distribution.has_rsample:
            raise TypeError(
                f"estimator: pathwise needs draws that can be differentiated, and the {what} of "
                f"{model.name} are drawn from {distribution}; use estimator='score'"
            )


def _check_entropy(model: EnvironmentModel, policy: Policy) -> None:
    """:raises TypeError: nobody knows the entropy of the distributions of the policy."""
    from inference_rl.networks import example_states

    distribution = policy(example_states(model.state_space, 2), 0)
    try:
        distribution.entropy()
    except NotImplementedError:
        raise TypeError(
            "estimator: entropy-bonus needs the entropy of the policy's distributions, and "
            f"{distribution} has none in closed form; use estimator='score', which samples it"
        ) from None


class _Learner:
    """The state of a run: policy, soft value, their optimiser and the temperature."""

    def __init__(
        self, settings: PolicyGradient, model: EnvironmentModel, prior: ActionPrior
    ) -> None:
        import torch

        from inference_rl.networks import ObservationScaling

        self.settings, self.model, self.prior = settings, model, prior
        self.policy, value = learned.policy_and_value(settings, model, prior)
        has_value = settings.baseline == "learned" and settings.estimator != "pathwise"
        self.value = value if has_value else None
        self.tempering = learned.Tempering(settings, model, prior)
        self.scaled = any(
            isinstance(part, ObservationScaling)
            for module in self._modules()
            for part in module.modules()
        )
        self.rounds, self.steps, self.path_seed = 0, 0, int(torch.randint(2**62, ()))
        if settings.estimator == "pathwise":
            _check_reparameterised(model, self.policy)
        elif settings.estimator == "entropy-bonus":
            _check_entropy(model, self.policy)
        rates = settings.learning_rate, settings.value_learning_rate
        self.optimiser = torch.optim.Adam(
            [
                {"params": list(module.parameters()), "lr": rate}
                for module, rate in zip(self._modules(), rates, strict=False)
            ],
            fused=True,
        )

    def _modules(self) -> list[nn.Module]:
        """The policy, and the value if one is learned."""
        return [self.policy] if self.value is None else [self.policy, self.value]

    def collect(self, collector: Collector) -> Segment | _Paths:
        if self.settings.estimator == "pathwise":
            return _Paths(self.settings.environments * self.settings.steps_per_round)
        if self.settings.steps_per_round == 0:
            return collector.collect_episodes(self.policy)
        return collector.collect(self.policy, self.settings.steps_per_round)

    def update(self, data: Segment | _Paths) -> dict[str, Tensor | float]:
        self.rounds += 1
        if self.settings.decay_learning_rates:
            learned.decay(self.optimiser, self.steps / self.settings.total_steps)
        self.steps += data.steps
        return self._along_paths(data) if isinstance(data, _Paths) else self._by_score(data)

    def _along_paths(self, data: _Paths) -> dict[str, Tensor | float]:
        import torch

        from inference_rl.randomness import derived

        settings, temperature = self.settings, self.tempering.temperature
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived(self.path_seed, f"round {self.rounds}"))
            loss, entropy, divergence = pathwise_loss(
                self.model,
                self.policy,
                self.prior,
                temperature=temperature,
                steps=settings.steps_per_round,
                paths=settings.environments,
            )
        norms = learned.descend(self.optimiser, loss, settings.max_gradient_norm)
        self.tempering.update(divergence, data.steps)
        return {
            "loss": loss.detach(),
            **norms,
            "entropy": entropy,
            "divergence": divergence,
            "temperature": temperature,
        }

    def _by_score(self, data: Segment) -> dict[str, Tensor | float]:
        settings, temperature = self.settings, self.tempering.temperature
        if self.scaled:
            learned.observe(data, *self._modules())
        distribution = self.policy(data.state, data.step)
        # Where nothing was left to do, the action that stands there may even be forbidden.
        log_prob = data.masked(distribution.log_prob(data.action))
        divergence = log_prob.detach() - data.masked(learned.log_prior(self.prior, data))
        share = data.valid.to(log_prob.dtype) / data.steps
        if self.value is None:
            value = next_value = log_prob.new_zeros(log_prob.shape)
        else:
            value, next_value = self._values(self.value, data)
        target, advantage = self._credit(data, divergence, value.detach(), next_value, temperature)
        weight = share
        if settings.weigh_by_discount:
            weight = weight * (self.model.discount ** data.step.double()).to(weight.dtype)
        if settings.centre_advantages:
            advantage = advantage - (share * advantage).sum()
        if settings.estimator == "entropy-bonus":
            entropy = distribution.entropy()
            loss = entropy_bonus_loss(log_prob, entropy, advantage, weight, temperature)
        else:
            loss = score_loss(log_prob, advantage, weight)
        if self.value is not None:
            loss = loss + value_loss(value, target, share)
        norms = learned.descend(self.optimiser, loss, settings.max_gradient_norm)
        mean_divergence = (share * divergence).sum()
        self.tempering.update(mean_divergence, data.steps)
        return {
            "loss": loss.detach(),
            **norms,
            "entropy": -(share * log_prob.detach()).sum(),
            "divergence": mean_divergence,
            "temperature": temperature,
        }

    def _values(self, function: StateFunction, data: Segment) -> tuple[Tensor, Tensor]:
        """The soft value at every step and, without its graph, after it; (T, N)."""
        import torch

        states = torch.cat([data.state, data.next_state[-1:]])
        values = learned.value_at(function, states, torch.cat([data.step, data.step[-1:] + 1]))
        following, cut = values.detach()[1:], data.truncated[:-1]
        if cut.any():  # there, what comes next in time is another episode
            following = following.clone()
            states, steps = data.next_state[:-1][cut], data.step[:-1][cut] + 1
            following[:-1][cut] = learned.value_at(function, states, steps).detach()
        return values[:-1], following

    def _credit(
        self,
        data: Segment,
        divergence: Tensor,
        value: Tensor,
        next_value: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """What the value should have been, and how much better it went than that; (T, N)."""
        settings, reward = self.settings, data.reward.to(value.dtype)
        if settings.estimator == "score":
            reward = reward - temperature * divergence
        trace_decay = 1.0 if self.value is None else settings.trace_decay
        advantage = advantages(
            reward,
            value,
            next_value,
            data.terminated,
            data.ended,
            discount=self.model.discount,
            trace_decay=trace_decay,
        )
        return advantage + value, advantage

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "value": None if self.value is None else self.value.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "temperature": self.tempering.state_dict(),
            "rounds": self.rounds,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        if self.value is not None:
            self.value.load_state_dict(state["value"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.tempering.load_state_dict(state["temperature"])
        self.rounds, self.steps = state["rounds"], state["steps"]
