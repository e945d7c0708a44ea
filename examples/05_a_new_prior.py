"""A new prior on actions, with every routine.

A prior is any function from states to a Pyro distribution over actions. It needs to be written
once: every routine keeps the divergence from it in its books, log-probabilities of actions where
others have entropies, so all of them come to the policy that exact inference has under it.
"""

import pyro.distributions as dist
import torch
from gymnasium.spaces import Box, Discrete

from inference_rl import (
    PCL,
    REPS,
    SAC,
    SQL,
    EnvironmentModel,
    Exact,
    PolicyGradient,
    SoftDDPG,
    SoftTD3,
    TruncatedNormal,
    infer,
    load_target,
)

TEMPERATURE = 0.3
chain = load_target("chain", env_kwargs={"length": 4})  # a bait on the left, a prize on the right


def leftward(state):
    """Of someone who used to find things on the left (action 0)."""
    return dist.Categorical(torch.tensor([0.7, 0.3]).expand(*state.shape, 2))


exact = infer(chain, Exact(temperature=TEMPERATURE), prior=leftward)
uniform = infer(chain, Exact(temperature=TEMPERATURE))
states = torch.arange(1, 4)
print("probability of going right in states 1, 2, 3")
print("  exact, under no preference:", *(f"{p:.3f}" for p in uniform.policy(states).probs[:, 1]))
print("  exact, under this prior:   ", *(f"{p:.3f}" for p in exact.policy(states).probs[:, 1]))

common = {"temperature": TEMPERATURE, "evaluation_episodes": 0, "environments": 16}
tables = {"learning_rate": 0.03, "value_learning_rate": 0.03}
replayed = {"warmup_steps": 1600, "updates_per_step": 0.02, "target_rate": 0.1}
routines = [
    SAC(**common, **tables, **replayed, steps_per_round=4, total_steps=10_000),
    SQL(**common, **replayed, value_learning_rate=0.03, total_steps=10_000),
    PolicyGradient(**common, **tables, steps_per_round=8, total_steps=16_000),
    PCL(**common, **tables, steps_per_round=8, total_steps=10_000),
    REPS(**common, total_steps=6_000),
]
for routine in routines:
    result = infer(chain, routine, prior=leftward)
    probs = result.policy(states).probs[:, 1]
    print(f"  {routine.name:26}", *(f"{p:.3f}" for p in probs))
    assert (probs - exact.policy(states).probs[:, 1]).abs().max() < 0.06
    apart = abs(float(result.objective) - float(exact.objective))
    assert apart < 4 * result.objective_standard_error + 0.01


class Throw(EnvironmentModel):
    """One throw, of strength a in [-1, 1], that pays the more the nearer it is to 0.6."""

    state_space, action_space = Discrete(1), Box(-1.0, 1.0, (1,))
    discount, horizon = 1.0, 1

    def initial_state(self):
        return dist.Categorical(torch.ones(1))

    def transition(self, state, action):
        return dist.Categorical(torch.ones(*state.shape, 1))

    def reward(self, state, action, next_state):
        return -((action[..., 0] - 0.6) ** 2)


def gentle(state):
    """Weak throws, most of them."""
    return TruncatedNormal(torch.zeros(1), torch.tensor([0.2])).to_event(1).expand(state.shape)


# Soft DDPG and soft TD3 have a guide of fixed width around a mean: of all such guides the best one
# is found on a grid here, u its centre before the tanh, by Simpson's rule over its noise.
WIDTH = 0.2
noise = torch.linspace(-6, 6, 601, dtype=torch.float64)
centre = torch.linspace(-1, 1, 401, dtype=torch.float64).unsqueeze(-1)
u = centre + WIDTH * noise
action = torch.tanh(u)
log_guide = dist.Normal(centre, WIDTH).log_prob(u) - torch.log1p(-(action**2))
log_prior = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 0.2).log_prob(action)
gain = -((action - 0.6) ** 2) - TEMPERATURE * (log_guide - log_prior)
weight = torch.exp(-(noise**2) / 2)
best = torch.tanh(centre[((gain * weight).sum(-1) / weight.sum()).argmax(), 0])
print(f"the best centre of a throw under this prior: {best:.3f} (without: about 0.6)")
quick = {
    "environments": 10,
    "total_steps": 3000,
    "updates_per_step": 0.3,
    "hidden": (32, 32),
    "batch_size": 64,
    "evaluation_episodes": 0,
}
for routine in (
    SoftDDPG(temperature=TEMPERATURE, width=WIDTH, **quick),
    SoftTD3(temperature=TEMPERATURE, width=WIDTH, **quick),
):
    result = infer(Throw(), routine, prior=gentle)
    found = float(result.policy.act(torch.tensor(0), 0, deterministic=True))
    print(f"  {routine.name:10} {found:.3f}")
    assert abs(found - best) < 0.05
