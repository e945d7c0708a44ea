"""Soft actor-critic on a pendulum, from the program.

The policy's loss of soft actor-critic is nothing of its own: it is minus temperature times the
evidence lower bound of the trajectory program cut after one step, whose reward is Q, the message
that stands for all that follow. Here that program is written out and given to Pyro; then the
library's routine, which records the same program as tensor operations, learns to swing up.
"""

import pyro
import pyro.distributions as dist
import torch
from gymnasium.spaces import Box
from pyro.infer import Trace_ELBO

from inference_rl import SAC, EnvironmentModel, UniformPrior, infer, load_target
from inference_rl.decision import bound, decide
from inference_rl.squashed_normal import SquashedNormal
from inference_rl.trajectory import trajectory

TEMPERATURE = 0.2
torch.manual_seed(0)
states = torch.randn(64, 3)


def q(state, action):
    """Any function of states and actions."""
    return torch.sin(state.sum(-1)) - (action[..., 0] - 0.3 * state[..., 0]) ** 2


class OneDecision(EnvironmentModel):
    """One step from states that are given, and it is paid Q."""

    state_space, action_space = Box(-torch.inf, torch.inf, (3,)), Box(-1, 1, (1,))
    discount, horizon = 1.0, 1

    def initial_state(self):
        return dist.Delta(states, event_dim=1)

    def transition(self, state, action):
        return dist.Delta(state, event_dim=1)

    def reward(self, state, action, next_state):
        return q(state, action)


prior = UniformPrior(OneDecision.action_space)
weights = torch.tensor([0.5, -0.2, 0.1], requires_grad=True)


def policy(state, t=None):
    """The tanh of a Gaussian around a linear function."""
    centre = (state @ weights).unsqueeze(-1)
    return SquashedNormal(centre, torch.tensor([0.4])).to_event(1)


def model():
    with pyro.plate("states", len(states)):
        trajectory(OneDecision(), prior, 1, temperature=TEMPERATURE)


def guide():
    with pyro.plate("states", len(states)):
        trajectory(OneDecision(), policy, 1)


# Pyro's loss, and its gradient.
pyro.set_rng_seed(1)
loss = TEMPERATURE * Trace_ELBO(max_plate_nesting=1).differentiable_loss(model, guide) / len(states)
(by_pyro,) = torch.autograd.grad(loss, weights)

# The library's: both readings of one decision, and the bound.
pyro.set_rng_seed(1)
decision = decide(
    states,
    policy,
    prior,
    lambda action: q(states, action),
    temperature=torch.tensor(TEMPERATURE),
    action_space=OneDecision.action_space,
)
value, entropy, divergence = bound(decision)
(by_library,) = torch.autograd.grad(-value.mean(), weights)

# The paper's, by hand (1812.05905, equation 9): temperature · log π(a|s) − Q(s, a). Entropy and
# divergence from the uniform prior differ by a constant, log 2 for an action in [−1, 1].
pyro.set_rng_seed(1)
guided = policy(states)
action = guided.rsample()
by_hand = (TEMPERATURE * guided.log_prob(action) - q(states, action)).mean()
(by_paper,) = torch.autograd.grad(by_hand, weights)

print(f"loss: Pyro {loss:.6f}, library {-value.mean():.6f}")
print(f"      paper {by_hand:.6f} + temperature · log 2 = {by_hand + TEMPERATURE * 0.6931472:.6f}")
for name, gradient in (("Pyro", by_pyro), ("library", by_library), ("paper", by_paper)):
    print(f"gradient, {name:8}", *(f"{g:.6f}" for g in gradient))
assert torch.allclose(loss, -value.mean(), atol=1e-5)
assert torch.allclose(loss, by_hand + TEMPERATURE * 0.6931472, atol=1e-5)
assert torch.allclose(by_pyro, by_library, atol=1e-5)
assert torch.allclose(by_pyro, by_paper, atol=1e-5)

# And now for real. What is learned in so few steps is not the best there is (about −150), but far
# from where it began: a pendulum that nobody moves on purpose costs about 1200.
result = infer(
    load_target("Pendulum-v1"),
    SAC(
        total_steps=6000,
        environments=2,
        updates_per_step=0.5,
        learning_rate=2e-3,
        value_learning_rate=2e-3,
        hidden=(64, 64),
        batch_size=128,
        target_rate=0.01,
        evaluation_episodes=0,
    ),
)
run = result.evaluate(episodes=20, deterministic=True)
print(f"Pendulum-v1: return {run.mean_return:.0f} ± {run.standard_error:.0f}")
assert run.mean_return > -400
