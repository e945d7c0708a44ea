"""One program: a trajectory, read as a model of optimal behaviour and as a guide to it.

The same Pyro program is p(τ, O) when actions come from the prior and rewards are observed as
optimality, and q(τ) when actions come from a policy. Three things are true of the two readings, and
Pyro, which knows nothing of reinforcement learning, computes all of them here.
"""

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

from inference_rl import Exact, infer, load_target, tabulate
from inference_rl.trajectory import trajectory

TEMPERATURE = 0.5
DEPTH = 3

# A small tree: at each of its nodes a branch is chosen, and a branch pays something.
tree = tabulate(load_target("tree", env_kwargs={"depth": DEPTH, "branching": 2}))


def model():
    """p(τ, O): actions from the prior, and every O_t observed to be 1."""
    return trajectory(tree, tree.action_prior, DEPTH, temperature=TEMPERATURE)


def guide_of(policy):
    """q(τ): the same steps, with actions of the policy and nothing observed."""
    return lambda: trajectory(tree, policy, DEPTH)


# 1. The log-joint is a sum over sites: log-prior of actions, log-dynamics, reward / temperature.
pyro.set_rng_seed(0)
trace = poutine.trace(model).get_trace()
by_hand = 0.0
for t in range(DEPTH):
    state, action = trace.nodes[f"state_{t}"]["value"], trace.nodes[f"action_{t}"]["value"]
    following = trace.nodes[f"state_{t + 1}"]["value"]
    by_hand += tree.action_prior(state).log_prob(action)
    by_hand += tree.transition(state, action).log_prob(following)
    by_hand += tree.reward(state, action, following) / TEMPERATURE
by_hand += tree.initial_state().log_prob(trace.nodes["state_0"]["value"])
print("sites:", ", ".join(name for name in trace.nodes if name[0] != "_"))
print(f"log p(τ, O) of one draw: {trace.log_prob_sum():.10f}, by hand {by_hand:.10f}")
assert abs(trace.log_prob_sum() - by_hand) < 1e-12

# 2. Summed over all trajectories it is the evidence, log p(O): Pyro's enumeration of the program
#    and this library's messages, passed backwards, agree.
evidence = -TraceEnum_ELBO(max_plate_nesting=0).loss(config_enumerate(model), lambda: None)
best = infer(tree, Exact(temperature=TEMPERATURE))
print(f"log p(O): {evidence:.10f} by enumeration, {best.log_evidence:.10f} by messages")
assert abs(evidence - best.log_evidence) < 1e-10

# 3. Temperature times the evidence lower bound of a guide is what its policy is worth in MaxEnt RL,
#    J(π) = E Σ [r − temperature · KL(π ‖ ρ)]; the best policy, without noise, closes the gap.
for name, policy in (("prior", tree.action_prior), ("best policy", best.policy)):
    guide = config_enumerate(guide_of(policy))
    bound = -TraceEnum_ELBO(max_plate_nesting=0).loss(model, guide)
    print(f"guide = {name}: temperature · ELBO = {TEMPERATURE * bound:.10f}")
print(f"J of the best policy, by exact inference:  {best.objective:.10f}")
assert abs(TEMPERATURE * bound - best.objective) < 1e-10
assert abs(bound - evidence) < 1e-10

# The policy in the first state is a ratio of messages: π = ρ e^{(Q − V) / temperature}.
ratio = torch.exp((best.q[0] - best.v[0].unsqueeze(-1)) / TEMPERATURE) / 2
print("π(a | s_0):", best.policy.probs[0, 0].tolist(), "by messages:", ratio[0].tolist())
assert torch.allclose(best.policy.probs[0], ratio)
