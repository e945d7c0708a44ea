"""A demonstrator's reward, from what it does.

A demonstrator acts by the exact policy of some reward and some temperature. Both are unknown, so
they are sites of a Pyro program like any other; what it did is observed; and NUTS samples what it
may have wanted. Behaviour does not tell everything, and what it leaves open is said.
"""

import warnings

import pyro.distributions as dist
import torch

from inference_rl import Exact, infer
from inference_rl.diagnostics.demonstrator import infer_reward
from inference_rl.diagnostics.samples import column
from inference_rl.models.grid_world import GridWorld

# A start between a hole, past which the goal is near, and a cliff, in the way round. Steps slip.
ICE = """
...G
.#.H
.CS.
"""


def world(parameters):
    """The goal pays 1 and a step costs 0.04: in these units the other two are asked for."""
    return GridWorld(
        text=ICE,
        slip=0.2,
        hole_reward=parameters["hole"],
        cliff_reward=parameters["cliff"],
        discount=0.9,
    )


# Fifty episodes of somebody.
true = {"hole": torch.tensor(-0.7), "cliff": torch.tensor(-0.4), "temperature": torch.tensor(0.2)}
somebody = infer(world(true), Exact(temperature=float(true["temperature"])))
episodes = somebody.sample(50, horizon=30, seed=0)
priors = {"hole": dist.Normal(-1.0, 0.5), "cliff": dist.Normal(-0.5, 0.5)}
found = infer_reward(world, episodes, priors, dist.LogNormal(-1.5, 0.5), chains=2, draws=300)
print(found)
assert found.identified
for row in found.summary():
    assert row.low - 0.1 < true[row.name] < row.high + 0.1  # nine intervals in ten have it
    assert row.rhat < 1.03
    before = column(found.posterior, "prior", row.name).std()
    print(f"{row.name}: standard deviation {before:.2f} before, now", end=" ")
    print(f"{column(found.posterior, 'posterior', row.name).std():.2f}")

# The same by hand, at one point: an episode is as likely as its actions, the rest cancels.
draw = {name: column(found.posterior, "posterior", name)[0, 0] for name in true}
policy = infer(world(draw), Exact(temperature=float(draw["temperature"]))).policy
first = {name: column(episodes, "posterior", name)[0, 0] for name in ("state", "action", "alive")}
steps = int(first["alive"].sum())
state, action = (torch.as_tensor(first[name][:steps]) for name in ("state", "action"))
by_hand = policy(state).log_prob(action).sum()
stored = column(found.posterior, "log_likelihood", "actions")[0, 0, 0]
print(f"log-likelihood of the first episode: {stored:.6f}, by hand {by_hand:.6f} nats")
assert abs(stored - by_hand) < 1e-6


# What cannot be known. Let the price of a step be asked for, in place of the cliff: then there is
# another world that looks the same from outside, at another temperature.
def other(parameters):
    return GridWorld(
        text=ICE.replace("C", "."),
        slip=0.2,
        hole_reward=parameters["hole"],
        step_reward=parameters["step"],
        discount=0.9,
    )


here = {"hole": torch.tensor(-0.7), "step": torch.tensor(-0.1)}
episodes = infer(other(here), Exact(temperature=0.2)).sample(50, horizon=30, seed=0)
priors = {"hole": dist.Normal(-1.0, 0.5), "step": dist.Normal(-0.1, 0.1)}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    open_ended = infer_reward(other, episodes, priors, chains=1, draws=50, warmup=30)
print(said[0].message)
assert not open_ended.identified
assert "cannot be told apart" in str(said[0].message)

# Why: a potential that is c wherever one goes on and 0 at the end adds -c to what ends pay, and
# (discount - 1) c to a step. It changes no policy; and one unit of reward is as good as another.
scale, c = 1.25, 0.2  # so that the goal still pays scale · (1 - c) = 1
there = {"hole": scale * (here["hole"] - c), "step": scale * (here["step"] - 0.1 * c)}
policies = [
    infer(other(here), Exact(temperature=0.2)).policy.probs,
    infer(other(there), Exact(temperature=0.2 * scale)).policy.probs,
]
apart = float((policies[0] - policies[1]).abs()[~somebody.model.is_terminal].max())
print(f"another reward, the same policy: probabilities within {apart:.0e}")
assert apart < 1e-6
