"""Path consistency and relative entropy policy search agree with exact inference.

Neither passes messages backwards. Path consistency learning uses that along any path, whoever took
it, the soft values of its ends and what happens in between must add up. Relative entropy policy
search weighs what was sampled by e^{return / temperature}, as the posterior of the program does.
"""

import numpy as np
import torch

from inference_rl import PCL, REPS, Exact, infer, load_target, tabulate
from inference_rl.duals import episodic_dual, solve_episodic
from inference_rl.inference.pcl import path_residual
from inference_rl.learning.collection import Collector
from inference_rl.simulate import environments

TEMPERATURE = 0.3
tree = tabulate(load_target("tree", env_kwargs={"depth": 3, "branching": 2}))
exact = infer(tree, Exact(temperature=TEMPERATURE))

# 1. The exact messages are consistent along every path: here along those of the prior, which is no
#    good policy. Each of 1000 residuals of three steps is zero, to rounding.
batch = environments(tree, 1000)
data = Collector(batch, 0).collect_episodes(lambda state, t: tree.action_prior(state))
batch.close()
values = exact.v[data.step, data.state]
following = torch.where(data.terminated, 0.0, exact.v[data.step + 1, data.next_state])
log_ratio = exact.policy(data.state, data.step).log_prob(data.action)
log_ratio = log_ratio - tree.action_prior(data.state).log_prob(data.action)
rate = data.reward - TEMPERATURE * log_ratio
residual = path_residual(
    rate, values, following, data.terminated | data.truncated, discount=1.0, window=3
)
print(f"largest residual of 1000 random paths: {residual.abs().max():.1e}")
assert residual.abs().max() < 1e-10

# 2. So whoever makes residuals zero finds the exact policy. PCL does, from samples.
pcl = infer(
    tree,
    PCL(
        temperature=TEMPERATURE,
        total_steps=20_000,
        environments=16,
        steps_per_round=6,
        learning_rate=0.02,
        value_learning_rate=0.02,
        evaluation_episodes=0,
    ),
)

# 3. REPS: of returns R it makes weights ∝ e^{R/η}, η the minimum of a dual, g(η) = η ε + η log mean
#    e^{R/η}. Weights within ε nats of equal ones have no larger mean return than g: the bound is
#    met, and the divergence is ε.
returns = data.reward.sum(0).numpy()
dual = solve_episodic(returns, epsilon=0.3)
print(f"dual: η = {dual.temperature:.4f}, divergence {dual.divergence:.10f} nats")
print(f"      weighted mean return {dual.weights @ returns:.10f}, bound {dual.dual_value:.10f}")
assert abs(dual.divergence - 0.3) < 1e-9
assert abs(dual.weights @ returns - dual.dual_value) < 1e-9
grid = [episodic_dual(eta, returns, 0.3)[0] for eta in np.geomspace(0.05, 50, 200)]
assert min(grid) >= dual.dual_value - 1e-12

# 4. At η = temperature the weights are those of the posterior, which without noise is the best
#    policy: the share of first actions comes to it, as near as 1000 paths tell.
weights = np.exp((returns - returns.max()) / TEMPERATURE)
first = data.action[0].numpy()
share = weights[first == 1].sum() / weights.sum()
print(f"first action 1: {share:.3f} by weighted paths, {exact.policy.probs[0, 0, 1]:.3f} exactly")
assert abs(share - exact.policy.probs[0, 0, 1]) < 0.06

reps = infer(tree, REPS(temperature=TEMPERATURE, total_steps=8000, evaluation_episodes=0))

print(f"exact: J = {exact.objective:.4f}, first action 1 {exact.policy.probs[0, 0, 1]:.3f}")
for name, result in (("pcl", pcl), ("reps", reps)):
    objective, error = float(result.objective), result.objective_standard_error
    first = float(result.policy(torch.tensor(0), 0).probs[1])
    print(f"{name:5}: J = {objective:.4f} ± {error:.4f}, first action 1 {first:.3f}")
    assert abs(objective - exact.objective) < 4 * error + 0.01
    assert abs(first - exact.policy.probs[0, 0, 1]) < 0.03
