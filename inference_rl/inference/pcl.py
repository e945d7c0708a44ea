"""Path consistency learning: policy and soft value for which every path weighs the same.

Inferred: a policy π, as guide q(τ) of the trajectory program, and the message V; the target is
control. `kind="pcl"` learns them apart, `"unified"` as one network of logits, `"trust"` within a
divergence of a policy that lags behind.

1. A path of d steps from s_t, with V as `message=` for what follows it, has in the program the
   log-weight log p − log q = Σ_{j<d} γ^j [r_j/α − ℓ_j] + γ^d V(s_{t+d})/α, where
   ℓ = log π(a|s) − log ρ(a|s): the dynamics are in both and cancel.
2. At π*, where π* = ρ e^{(Q−V)/α} and Q = r + γ V', every summand telescopes: if nothing is random
   but the actions, log-weight · α = V(s_t) for any actions at all, from wherever they come.
3. So the residual C = Σ_{j<d} γ^j [r_j − α ℓ_j] + γ^d V(s_{t+d}) − V(s_t) vanishes on every path of
   every length exactly at the solution (Nachum et al. 2017, arXiv:1702.08892, §4).
4. Minimised: E ½ C² over paths of the policy and replayed ones, by the gradient in π and in both
   values: ∇ = C · [∇V(s_{t+d}) γ^d − ∇V(s_t) − α Σ_j γ^j ∇ log π(a_j|s_j)] (§5).
5. Unified: with logits f, π = softmax f and Q = α (f − log ρ), so that V = α log Σ e^f. At d = 1
   the residual is r + γ V' − Q(s, a), that of soft Q-learning.
6. Trust: a term λ log(π/π̃) beside α log(π/ρ), π̃ the lagging policy. That is line 3 at temperature
   α + λ with the prior ρ^{α/(α+λ)} π̃^{λ/(α+λ)} (Nachum et al. 2018, arXiv:1707.01891).
7. λ is the temperature at which the last episodes, weighted by e^{R/λ}, diverge from a uniform
   weighting by `max_divergence` · their mean length: the dual of episodic REPS (ibid.).
8. Where dynamics are random, 2 holds for one step and in expectation over s' only, and the squared
   residual of a sample is biased by γ² Var V(s')/2, which pays for certainty. `expectation="model"`
   takes the expectation from a known finite model; otherwise a warning says so.

Departures:
1. A path that meets the end of an episode, or of what was collected, stops there: m < d steps, γ^m,
   and V = 0 only where it terminated. The published program discounts such tails by one step less.
2. On-policy and replayed paths share one step of Adam, with clipped gradients, in place of a step
   of gradient descent each. Replay is uniform, not by reward or age.
3. `value_target_rate` < 1 takes V(s_{t+d}) from a network that lags behind, without its gradient.
4. λ = 0 where the episodes are too few, or too alike, to be reweighted that far: the trust region
   does not bind on them.

Nachum, Norouzi, Xu and Schuurmans (2017), "Bridging the gap between value and policy based
reinforcement learning". Nachum, Norouzi, Xu and Schuurmans (2018), "Trust-PCL".
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from inference_rl.inference import checks, learned
from inference_rl.search_spaces import Choice, LogUniform, searched

if TYPE_CHECKING:
    from torch import Tensor

    from inference_rl.environment import EnvironmentModel
    from inference_rl.finite import FiniteModel
    from inference_rl.inference import InferenceResult
    from inference_rl.learning.collection import Collector, Segment
    from inference_rl.policies import Policy
    from inference_rl.priors import ActionPrior


@dataclasses.dataclass(frozen=True)
class PCL:
    """Path consistency learning, Unified PCL and Trust-PCL: the squared residual of path weights.

    :raises ValueError: (when made) a setting out of its range.
    """

    kind: Literal["pcl", "unified", "trust"] = "pcl"
    """pcl: policy and value apart. unified: one network. trust: near a policy that lags behind."""
    temperature: float | Literal["auto"] = searched(0.01, LogUniform(1e-3, 0.1))
    """>= 0, reward units (0 with kind trust only); "auto" tunes it to a target."""
    final_temperature: float | None = None
    """Annealed to this, geometrically, over the run; None keeps it."""
    target_entropy: float | None = None
    """Nats per step, with temperature "auto"; None chooses, and says which."""
    target_divergence: float | None = None
    """KL(π ‖ ρ), nats per step, with temperature "auto"; in place of target_entropy."""
    temperature_learning_rate: float = 0.02
    """Of the logarithm of a tuned temperature (Adam)."""
    window: int = searched(20, Choice((1, 5, 10, 20, 50)))
    """Steps of a path, at least 1; fewer where an episode or a round ends, which has but
    `steps_per_round`."""
    expectation: Literal["sample", "model"] = "sample"
    """Of V(s'): as sampled, or (window 1, finite models) over all successors."""
    max_divergence: float = 1e-3
    """Trust: nats per step."""
    trust_episodes: int = 100
    """Trust: episodes from which its multiplier is found."""
    policy_target_rate: float = 0.01
    """Trust: how far the lagging policy moves towards the policy in an update, in (0, 1]."""
    value_target_rate: float = 1.0
    """The same for the value at the end of a path, in (0, 1]; 1 takes the value itself."""
    total_steps: int = 200_000
    """Environment steps."""
    environments: int = 8
    """Side by side."""
    steps_per_round: int = 32
    """Of each environment, between updates."""
    replay_capacity: int = 50_000
    """Environment steps that are kept."""
    replayed_paths: int = searched(8, Choice((4, 8, 16, 32)))
    """Stretches of `steps_per_round` steps that an update replays beside what was collected."""
    learning_rate: float = searched(2e-3, LogUniform(3e-4, 3e-2))
    """Of the policy (Adam)."""
    value_learning_rate: float = searched(1e-2, LogUniform(1e-3, 3e-2))
    """Of the value (Adam)."""
    decay_learning_rates: bool = True
    """Linearly to zero over the run."""
    max_gradient_norm: float | None = searched(0.5, LogUniform(0.3, 5.0))
    """Longer gradients, of policy or value, are shortened to this; None keeps them."""
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

    name: ClassVar[str] = "pcl"

    def __post_init__(self) -> None:
        checks.check_temperature(self)
        checks.check_common(self)
        checks.check_ranges(
            self,
            window=(1, None),
            steps_per_round=(1, None),
            replayed_paths=(0, None),
            replay_capacity=(1, None),
            max_gradient_norm=(0, None),
            trust_episodes=(2, None),
            policy_target_rate=(0, 1),
            value_target_rate=(0, 1),
        )
        checks.check_positive(
            self, "learning_rate", "value_learning_rate", "temperature_learning_rate"
        )
        if self.temperature == 0 and self.kind != "trust":
            raise ValueError(
                f"temperature: kind {self.kind!r} learns the policy from temperature · log π, "
                "expected one above 0, got 0; at 0 use kind 'trust'"
            )
        if not self.max_divergence > 0:
            raise ValueError(
                f"max_divergence: expected a number above 0, got {self.max_divergence}"
            )
        for name in ("policy_target_rate", "value_target_rate"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}: expected a number in (0, 1], got 0, which never moves")
        if self.expectation == "model" and self.window != 1:
            raise ValueError(
                "window: the expectation over successors is known for one step only, expected 1 "
                f"with expectation='model', got {self.window}"
            )
        if self.kind == "unified" and self.policy is not None:
            raise ValueError(
                "policy: kind 'unified' reads the value from the policy's own logits, which a "
                "module does not show; expected none, or another kind"
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
        from inference_rl.networks import LogPartition, NetworkPolicy

        if self.kind == "unified" and isinstance(policy, NetworkPolicy):
            return {"q": None, "v": LogPartition(policy, float(tensors["v.temperature"]))}
        return learned.read_messages(tensors, policy)


def path_residual(
    rate: Tensor,
    value: Tensor,
    next_value: Tensor,
    ended: Tensor,
    *,
    discount: float,
    window: int,
) -> Tensor:
    """C of the path from each step, (T, N), reward units (equation 3).

    :param rate: r − α ℓ, (T, N), reward units; whatever else a step costs is in it.
    :param value: V(s_t), (T, N). :param next_value: V(s_{t+1}), (T, N), zero where t terminated.
    :param ended: (T, N): whether what follows in time is another episode.
    :param window: d. A path ends sooner at the end of its episode or of the data.
    """
    import torch

    steps = len(rate)
    goes_on = (~ended).to(rate.dtype)
    goes_on[-1] = 0.0
    ahead = torch.nn.functional.pad(goes_on, (0, 0, 0, window)).unfold(0, window, 1)[:steps]
    within = torch.ones_like(ahead)  # (T, N, d): whether step t + j belongs to the path from t
    within[..., 1:] = ahead[..., :-1].cumprod(-1)
    powers = discount ** torch.arange(window + 1, dtype=rate.dtype)
    paid = torch.nn.functional.pad(rate, (0, 0, 0, window)).unfold(0, window, 1)[:steps]
    length = within.sum(-1).long()
    last = torch.arange(steps).unsqueeze(-1) + length - 1
    rest: Tensor = powers[length] * next_value.gather(0, last)
    return (within * powers[:-1] * paid).sum(-1) + rest - value


def residual_loss(residual: Tensor, weight: Tensor) -> Tensor:
    """½ Σ weight · C² (equation 4)."""
    return 0.5 * (weight * residual.square()).sum()


def unified(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log π, (..., A), and V, (...), reward units, from one set of logits f (equation 5)."""
    return logits.log_softmax(-1), temperature * logits.logsumexp(-1)


def follow(lagging: Any, leading: Any, rate: float) -> None:
    """Move the parameters of one module by `rate` of the way towards another's; copy the rest."""
    import torch

    with torch.no_grad():
        for behind, ahead in zip(lagging.parameters(), leading.parameters(), strict=True):
            behind.lerp_(ahead, rate)
        for behind, ahead in zip(lagging.buffers(), leading.buffers(), strict=True):
            behind.copy_(ahead)


class _Learner:
    """The state of a run: policy, soft value, those that lag behind them, replay, temperatures."""

    def __init__(self, settings: PCL, model: EnvironmentModel, prior: ActionPrior) -> None:
        import torch

        from inference_rl.learning.replay import PathReplay

        self.settings, self.model, self.prior = settings, model, prior
        self.finite = _known(model) if settings.expectation == "model" else None
        self.tempering = learned.Tempering(settings, model, prior)
        self.policy, self.value = self._networks()
        self.rounds, self.steps, self.replay_seed = 0, 0, int(torch.randint(2**62, ()))
        self.replay = PathReplay(settings.replay_capacity)
        self.episodes: list[tuple[float, int]] = []
        """Returns and lengths of the last `trust_episodes`."""
        self.lagging: dict[str, tuple[Any, Any, float]] = {}
        """What lags behind what, and how fast it follows."""
        if settings.kind == "trust":
            self._let_lag("policy", self.policy, settings.policy_target_rate)
        if settings.value_target_rate < 1:
            leading = self.policy if settings.kind == "unified" else self.value
            self._let_lag("value", leading, settings.value_target_rate)
        groups = [{"params": list(self.policy.parameters()), "lr": settings.learning_rate}]
        if settings.kind != "unified":
            rate = settings.value_learning_rate
            groups.append({"params": list(self.value.parameters()), "lr": rate})
        self.optimiser = torch.optim.Adam(groups, fused=True)
        if settings.expectation == "sample":
            learned.warn_of_random_dynamics(model)

    def _networks(self) -> tuple[Any, Any]:
        from inference_rl.networks import LogPartition, NetworkPolicy

        settings = self.settings
        if settings.kind != "unified":
            return learned.policy_and_value(settings, self.model, self.prior)
        scale = self.tempering.temperature
        policy, _ = learned.networks(settings, self.model, self.prior, logit_scale=scale)
        assert isinstance(policy, NetworkPolicy)
        if policy.action_kind != "discrete":
            raise TypeError(
                "kind: 'unified' sums over the actions, and those of "
                f"{self.model.name} are {self.model.action_space}, expected a Discrete space; use "
                "kind 'pcl' or 'trust'"
            )
        return policy, LogPartition(policy, scale)

    def _let_lag(self, name: str, leading: Any, rate: float) -> None:
        self.lagging[name] = copy.deepcopy(leading).requires_grad_(False), leading, rate

    def collect(self, collector: Collector) -> Segment:
        known = len(collector.finished)
        data = collector.collect(self.policy, self.settings.steps_per_round)
        self.episodes += [(e.total, e.length) for e in collector.finished[known:]]
        self.episodes = self.episodes[-self.settings.trust_episodes :]
        return data

    def update(self, data: Segment) -> dict[str, Tensor | float]:
        from inference_rl.learning.replay import joined
        from inference_rl.randomness import derived

        settings = self.settings
        self.rounds += 1
        if settings.decay_learning_rates:
            learned.decay(self.optimiser, self.steps / settings.total_steps)
        self.steps += data.steps
        learned.observe(data, self.policy, self.value)
        paths, fresh = data, data.reward.shape[1]
        if settings.replayed_paths:
            self.replay.add(data)
            seed = derived(self.replay_seed, f"round {self.rounds}")
            replayed = self.replay.sample(settings.replayed_paths, settings.steps_per_round, seed)
            paths = joined(data, replayed)
        numbers, divergence = self._descend(paths, fresh)
        for behind, ahead, rate in self.lagging.values():
            follow(behind, ahead, rate)
        self.tempering.update(divergence, data.steps)
        return numbers

    def _descend(self, paths: Segment, fresh: int) -> tuple[dict[str, Tensor | float], Tensor]:
        """One step down the squared residual of all `paths`, of which the first are `fresh`."""
        settings, temperature = self.settings, self.tempering.temperature
        multiplier = self._multiplier()
        residual, log_prob, divergence = self.residual(paths, temperature, multiplier)
        loss = residual_loss(residual, paths.valid / paths.valid.sum())
        norms = learned.descend(self.optimiser, loss, settings.max_gradient_norm)
        valid = paths.valid[:, :fresh]
        taken = log_prob.detach()[:, :fresh][valid]
        mean_divergence = divergence.detach()[:, :fresh][valid].mean()
        numbers: dict[str, Tensor | float] = {
            "loss": loss.detach(),
            **norms,
            "entropy": -taken.mean(),
            "divergence": mean_divergence,
            "temperature": temperature,
        }
        if settings.kind == "trust":
            numbers["trust_multiplier"] = multiplier
        return numbers, mean_divergence

    def residual(
        self, paths: Segment, temperature: float, multiplier: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """C of the path from each step, reward units, log π and log π − log ρ there; (T, N)."""
        import torch

        idle = ~paths.valid
        log_prob, value, next_value = self._evaluated(paths, temperature)
        log_prior = learned.log_prior(self.prior, paths).masked_fill(idle, 0.0)
        divergence = log_prob.masked_fill(idle, 0.0) - log_prior
        reward = paths.reward if self.finite is None else self._expected_reward(paths)
        rate = reward.to(value.dtype) - temperature * divergence
        if multiplier > 0:
            lagging = self.lagging["policy"][0]
            with torch.no_grad():
                before = lagging(paths.state, paths.step).log_prob(paths.action)
            rate = rate - multiplier * (log_prob - before)
        found = path_residual(
            rate,
            value,
            next_value,
            paths.ended,
            discount=self.model.discount,
            window=self.settings.window,
        )
        return found, log_prob, divergence

    def _multiplier(self) -> float:
        """λ, reward units; 0 without a trust region."""
        from inference_rl.duals import trust_multiplier

        if self.settings.kind != "trust" or len(self.episodes) < 2:
            return 0.0
        returns, lengths = zip(*self.episodes, strict=True)
        mean_length = sum(lengths) / len(lengths)
        if not mean_length:
            return 0.0
        return trust_multiplier(returns, self.settings.max_divergence, mean_length)

    def _evaluated(self, paths: Segment, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """log π(a_t|s_t), V(s_t) and V(s_{t+1}), (T, N); the last is zero where t terminated."""
        import torch

        from inference_rl.networks import LogPartition

        rest, after = self.value, paths.step + 1
        if "value" in self.lagging:
            rest = self.lagging["value"][0]
        if self.settings.kind == "unified":
            self.value.temperature.fill_(temperature)
            if rest is not self.value:
                rest = LogPartition(rest, temperature)
            log_probs, value = unified(self.policy.logits(paths.state, paths.step), temperature)
            log_prob = log_probs.gather(-1, paths.action.unsqueeze(-1)).squeeze(-1)
        else:
            log_prob = self.policy(paths.state, paths.step).log_prob(paths.action)
            if rest is self.value and self.finite is None:
                # Both at once: to call a small network costs more than what it computes.
                states = torch.cat([paths.state, paths.next_state])
                both = learned.value_at(self.value, states, torch.cat([paths.step, after]))
                value, next_value = both.split(len(paths.step))
                return log_prob, value, next_value * ~paths.terminated
            value = learned.value_at(self.value, paths.state, paths.step)
        if self.finite is not None:
            return log_prob, value, self._expected_value(rest, paths)
        next_value = learned.value_at(rest, paths.next_state, after)
        return log_prob, value, next_value * ~paths.terminated

    def _expected_reward(self, paths: Segment) -> Tensor:
        assert self.finite is not None
        return self.finite.expected_reward()[paths.state, paths.action]

    def _expected_value(self, value: Any, paths: Segment) -> Tensor:
        """E[V(s')] over the successors of (s_t, a_t), (T, N); zero past the horizon."""
        assert self.finite is not None
        step = self.finite.transition(paths.state, paths.action)
        after = (paths.step + 1).unsqueeze(-1).expand(step.states.shape)
        values = learned.value_at(value, step.states, after)
        counts = ~self.finite.terminal(step.states)
        if self.finite.horizon is not None:
            counts = counts & (after < self.finite.horizon)
        expected: Tensor = (step.probs.to(values.dtype) * values * counts).sum(-1)
        return expected

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "value": self.value.state_dict(),
            "lagging": {name: behind.state_dict() for name, (behind, _, _) in self.lagging.items()},
            "optimiser": self.optimiser.state_dict(),
            "temperature": self.tempering.state_dict(),
            "replay": self.replay.state_dict(),
            "episodes": self.episodes,
            "rounds": self.rounds,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.value.load_state_dict(state["value"])
        for name, (behind, _, _) in self.lagging.items():
            behind.load_state_dict(state["lagging"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.tempering.load_state_dict(state["temperature"])
        self.replay.load_state_dict(state["replay"])
        self.episodes = [(total, length) for total, length in state["episodes"]]
        self.rounds, self.steps = state["rounds"], state["steps"]


def _known(model: EnvironmentModel) -> FiniteModel:
    """`model` as tables. :raises TypeError: it is not finite, or a simulator."""
    from gymnasium.spaces import Discrete

    from inference_rl.simulate import GymnasiumModel
    from inference_rl.tabulation import tabulate

    spaces = model.state_space, model.action_space
    if isinstance(model, GymnasiumModel) or not all(isinstance(s, Discrete) for s in spaces):
        raise TypeError(
            f"expectation: 'model' sums over the successors of a known finite model, and "
            f"{model.name} is none; use expectation='sample'"
        )
    return tabulate(model)
