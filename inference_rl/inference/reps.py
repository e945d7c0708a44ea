"""Relative entropy policy search: the best reweighting of a sample within a divergence, refitted.

Inferred: a policy π (`kind="step"`), or a distribution over the parameters of one
(`kind="episodic"`), as guide q(τ) of the trajectory program; the target is control. Each round
weighs what was sampled, and fits the policy to the weighted sample by maximum likelihood.

1. Let w(s, a) be the discounted visits of a policy, normalised. They flow: Σ_a w(s, a) =
   (1 − γ) p_0(s) + γ Σ w P, and (1 − γ) J(w) = E_w[r − α log(w(a|s) / ρ(a|s))], α · ELBO.
2. J is concave in w. At the visits q of the current policy π_k its slope is the soft reward
   r̃ = r − α log(π_k / ρ), and (1 − γ) J(w) = E_w[r̃ − α KL(w(·|s) ‖ π_k)] ≥ E_w[r̃] − α KL(w ‖ q).
3. So the best w of this bound within KL(w ‖ q) ≤ ε is no worse than q. It is the problem of Peters
   et al. (2010) with r̃ for r and η ≥ α: w ∝ q exp(δ / η), δ = r̃ + θᵀ(γ E φ(s') − φ(s)).
4. η and θ minimise the dual of `inference_rl.duals`; θᵀφ is the message, the soft value.
5. Where w = q, δ is constant: θᵀφ and r̃ obey the soft Bellman equation, and π ∝ ρ exp(Q / α).
6. The policy that maximises E_w log π is w(a|s) ∝ π_k exp(δ / η). As r̃ holds log π_k, the next
   round corrects what the fit of this one got wrong.
7. Episodic: parameters x_i ~ N(W ψ(context), Σ), R_i = Σ_t γ^t [r_t − α log(π_x / ρ)], weights
   exp(R_i / η), and W and Σ by weighted maximum likelihood (Deisenroth et al. 2013, §2.4.3).

The flow constraint is a Lagrangian, and this is where it is not variational inference alone.

Departures:
1. The start (1 − γ) E φ(s_0) is estimated by what it equals at the visits of a policy,
   E_q[φ − γ φ']: the reweighted sample must close as well as the sample does, and no better. With
   the start's own features every round would bend the policy to undo the noise of its visits.
2. A terminal state is worth nothing and is never left: one more sample holds the steps after the
   ends. The published chain starts again there, for which an end is worth what a start is.
3. Of a known finite model the means of r and of φ(s') are taken, not one draw, which would bias the
   dual; all actions of a state are reweighted, not those drawn, and all states that can be reached
   share one more visit. `expectation="sample"` does without.
4. Tables from draws: π_k times the mean weight of a draw, which leaves out the noise of how often
   an action was drawn; one that was not keeps its share.
5. What the flow fails to close by has a price, `flow_tolerance`, on the change of θ since the last
   round alone, so that it vanishes where rounds agree.
6. Truncated Gaussians and networks have no closed-form fit, and are fitted by gradients.

Peters, Mülling and Altün (2010), AAAI. Deisenroth, Neumann and Peters (2013),
doi:10.1561/2300000021. Kupcsik et al. (2013), AAAI, for contexts. van Hoof, Neumann and Peters
(2017), JMLR 18(73), for Fourier features. The bound of 2: Neu, Jonsson and Gómez (2017),
arXiv:1705.07798.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from inference_rl.inference import checks, learned
from inference_rl.search_spaces import Choice, LogUniform, searched

if TYPE_CHECKING:
    from torch import Tensor

    from inference_rl.environment import EnvironmentModel
    from inference_rl.inference import InferenceResult
    from inference_rl.policies import Policy


@dataclasses.dataclass(frozen=True)
class REPS:
    """Relative entropy policy search: reweight a sample within a divergence, refit the policy.

    :raises ValueError: (when made) a setting out of its range.
    """

    kind: Literal["step", "episodic"] = "step"
    """step: reweigh states and actions. episodic: reweigh parameters of policies, by return."""
    temperature: float | Literal["auto"] = searched(0.01, LogUniform(1e-3, 0.1))
    """>= 0, reward units; "auto" tunes it to a target. At 0 a degenerate dual is refused."""
    final_temperature: float | None = None
    """Annealed to this, geometrically, over the run; None keeps it."""
    target_entropy: float | None = None
    """Nats per step, with temperature "auto"; None chooses, and says which."""
    target_divergence: float | None = None
    """KL(π ‖ ρ), nats per step, with temperature "auto"; in place of target_entropy."""
    temperature_learning_rate: float = 0.02
    """Of the logarithm of a tuned temperature (Adam)."""
    epsilon: float = searched(0.5, LogUniform(0.05, 2.0))
    """> 0, nats: the trust region, KL(weights ‖ sample) of a round."""
    total_steps: int = 200_000
    """Environment steps."""
    environments: int = searched(16, Choice((8, 16, 32, 64)))
    """Whole episodes of a round, side by side."""
    expectation: Literal["auto", "model", "sample"] = "auto"
    """Means over next states by the model, or by one draw; auto: by the model if it is finite."""
    features: Literal["auto", "tabular", "fourier"] = "auto"
    """Of the state, whose flow is held; auto: tabular if states are discrete."""
    feature_count: int = 300
    """Of Fourier features."""
    bandwidth: float = 0.35
    """Of Fourier features, in median distances between the states of the first round."""
    flow_tolerance: float = 1e-6
    """>= 0: the price of flow that does not close, λ of `duals.solve_step`; 0 lets none pass."""
    form: Literal["auto", "table", "linear", "neural"] = "auto"
    """Of the policy. auto: a table, else linear in Fourier features (episodic: in the state), else
    a network."""
    fit_epochs: int = searched(10, Choice((5, 10, 20)))
    """Passes over a round's sample in which a network is fitted to it."""
    fit_penalty: float = 1e-3
    """>= 0: of the squared weights of a linear policy, per nat of mean log likelihood."""
    batch_size: int = 256
    """Steps to a gradient of a network."""
    learning_rate: float = searched(1e-3, LogUniform(1e-4, 1e-2))
    """Of a network (Adam)."""
    context: tuple[int, ...] = ()
    """Episodic: entries of the state that stay as they began, on which the parameters depend."""
    covariance: Literal["diagonal", "full"] = "diagonal"
    """Episodic: of the parameters."""
    search_deviation: float = 1.0
    """Episodic: > 0, standard deviation of every parameter at first."""
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
    """Step: an nn.Module, `state -> distribution`, of which a copy is learned in place of the
    built-in ones (Python only)."""
    feature_module: Any = None
    """Step: an nn.Module, `states -> (N, K)`, in place of the built-in features (Python only)."""

    name: ClassVar[str] = "reps"

    def __post_init__(self) -> None:
        checks.check_temperature(self)
        checks.check_common(self)
        checks.check_ranges(
            self,
            flow_tolerance=(0, None),
            fit_penalty=(0, None),
            feature_count=(1, None),
            fit_epochs=(1, None),
            batch_size=(1, None),
        )
        checks.check_positive(
            self,
            "epsilon",
            "bandwidth",
            "search_deviation",
            "learning_rate",
            "temperature_learning_rate",
        )
        if self.kind == "episodic":
            self._check_episodic()
        elif self.context:
            raise ValueError(
                "context: expected none with kind='step', whose policy sees the whole state, got "
                f"{self.context}; leave it out, or set kind='episodic'"
            )

    def _check_episodic(self) -> None:
        import math

        if self.environments < 2 or self.epsilon >= math.log(self.environments):
            raise ValueError(
                "epsilon: expected less than log(environments), the divergence of all weight on "
                f"one episode, got {self.epsilon} with {self.environments} environments; choose a "
                "smaller epsilon or more environments"
            )
        for name in ("policy", "feature_module"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: expected none with kind='episodic', which searches the parameters of "
                    "the built-in networks; leave it out, or set kind='step'"
                )

    def run(self, model: EnvironmentModel, **how: Unpack[learned.How]) -> InferenceResult:
        learner: Any
        if self.kind == "step":
            from inference_rl.inference.reps_step import StepLearner as learner
        else:
            from inference_rl.inference.reps_episodic import EpisodicLearner as learner
        return learned.run(self, learner, model, **how)

    def sample(self, result: InferenceResult, draws: int, *, horizon: int | None, seed: int) -> Any:
        return learned.sample(result, draws, horizon=horizon, seed=seed)

    def messages(self, result: InferenceResult) -> dict[str, Tensor]:
        """The parameters of v."""
        return learned.messages(result)

    def read_messages(self, tensors: dict[str, Tensor], policy: Policy) -> dict[str, Any]:
        """q, which there is none of, and v from what `messages` gave."""
        from inference_rl.feature_policies import FeaturePolicy, FeatureValue
        from inference_rl.networks import NetworkPolicy

        if "v.theta" not in tensors:
            return learned.read_messages(tensors, policy)
        horizon = None
        if isinstance(policy, FeaturePolicy):
            horizon = policy.horizon
        elif isinstance(policy, NetworkPolicy):
            horizon = policy.architecture.horizon
        named = {name.removeprefix("v."): value for name, value in tensors.items()}
        return {"q": None, "v": FeatureValue.made_of(named, horizon)}


def soft_reward(reward: Tensor, log_ratio: Tensor, temperature: float) -> Tensor:
    """r̃ = r − α log(π_k(a|s) / ρ(a|s)), reward units (line 2)."""
    return reward - temperature * log_ratio


def absorbed(step: Tensor, discount: float, horizon: int | None) -> Tensor:
    """Σ_{k > t} γ^k, of the steps that a problem would still have had after an end at `step` t."""
    step = step.double()
    if horizon is None:
        return discount ** (step + 1) / (1 - discount)
    if discount == 1:
        return horizon - 1 - step
    return (discount ** (step + 1) - discount**horizon) / (1 - discount)


def table_from_draws(
    logits: Tensor, row: Tensor, action: Tensor, base: Tensor, weight: Tensor
) -> Tensor:
    """log of π_k(a|s) · mean of w / q over draws of a in s, up to a constant of s (departure 4).

    :param logits: (R, A), log π_k up to a constant of the row. :param row, action: (N,), of draws.
    :param base, weight: (N,), q and w of the draws.
    """
    import torch

    cell = row * logits.shape[1] + action
    flat = torch.zeros(2, logits.numel(), dtype=torch.float64)
    flat.index_add_(1, cell, torch.stack([base, weight]))
    drawn, weighed = flat.reshape(2, *logits.shape)
    mean = weighed / drawn
    seen = drawn.sum(1, keepdim=True) > 0
    average = weighed.sum(1, keepdim=True) / drawn.sum(1, keepdim=True)
    mean = torch.where(drawn > 0, mean, average)
    # What has underflowed is as good as never, which a table of logits has no number for.
    change = torch.where(seen, mean, 1.0).clamp(min=1e-300).log()
    return logits + change


def weighted_gaussian(inputs: Tensor, outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum weighted likelihood of outputs ~ N(W inputs, Σ): W (P, C) and an unbiased Σ (P, P).

    Σ = Σ_i w_i e_i e_iᵀ / Z with Z = Σ w − Σ w² / Σ w, Deisenroth et al. (2013), eq. 2.33, which
    also counts for C > 1. Inputs that are collinear get the W of least norm.

    :param inputs: (N, C). :param outputs: (N, P). :param weights: (N,), >= 0.
    """
    import torch

    root = weights.sqrt().unsqueeze(-1)
    gain = torch.linalg.lstsq(root * inputs, root * outputs, driver="gelsd").solution.mT
    error = outputs - inputs @ gain.mT
    total = weights.sum()
    scale = total - weights.square().sum() / total
    return gain, (weights.unsqueeze(-1) * error).mT @ error / scale
