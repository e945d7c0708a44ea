"""Which prior explains behaviour: habits, or none?

An action prior is what somebody does who wants nothing. It shows in what is done by somebody who
wants something, too: priors are told apart by how well each predicts episodes that it was not
shown, where the temperature is known and where it is not.
"""

import torch

from inference_rl import CategoricalPrior, Exact, StickyPrior, UniformPrior, infer, load_target
from inference_rl.diagnostics.prior_comparison import compare_priors
from inference_rl.diagnostics.samples import column

TEMPERATURE = 0.3
chain = load_target("chain", env_kwargs={"length": 6})  # a bait on the left, a prize on the right
priors = {
    "leftward": CategoricalPrior([0.8, 0.2]),
    "none": UniformPrior(chain.action_space),
    "rightward": CategoricalPrior([0.3, 0.7]),
    "sticky": StickyPrior(chain.action_space, 0.6),
}


def behaviour(name):
    """Sixty episodes of somebody with this habit: states and actions."""
    result = infer(chain, Exact(temperature=TEMPERATURE), prior=priors[name])
    tree = result.sample(60, horizon=100, seed=0)
    state, action, alive = (column(tree, "posterior", n)[0] for n in ("state", "action", "alive"))
    if result.model.remembers_action:  # its states are those of the chain, and the last action
        state = state // 3
    return [(s[:-1][a], x[a]) for s, x, a in zip(state, action, alive, strict=True)]


def show(scores):
    for score in scores:
        lag = f"{score.difference:7.1f} ± {score.difference_standard_error:.1f}"
        alpha = f"{score.temperature_low:.2f} to {score.temperature_high:.2f}"
        print(f"  {score.name:10} behind the best by {lag:14} nats, temperature {alpha}")


# With the temperature known, elpd is the log-likelihood of what was done, and nothing is fitted.
for name in ("leftward", "sticky"):
    print(f"behaviour of somebody who is {name}:")
    scores = compare_priors(chain, behaviour(name), priors, TEMPERATURE)
    show(scores)
    assert scores[0].name == name
    assert not any(score.as_good_as_the_best for score in scores[1:])

# By hand: how likely one prior's policy makes the actions of one episode.
episodes = behaviour("leftward")
policy = infer(chain, Exact(temperature=TEMPERATURE), prior=priors["leftward"]).policy
total = sum(
    float(policy(torch.as_tensor(state)).log_prob(torch.as_tensor(action)).sum())
    for state, action in episodes
)
best = compare_priors(chain, episodes, priors, TEMPERATURE)[0]
print(f"elpd of the best: {best.elpd:.6f}, by hand {total:.6f} nats")
assert abs(best.elpd - total) < 1e-4

# With the temperature unknown each prior gets its own, and the elpd is that of leaving out one
# episode after the other (PSIS-LOO). A liking for the right then looks like wanting the prize.
print("behaviour of somebody with no habit, temperature unknown:")
scores = compare_priors(chain, behaviour("none"), priors, (0.05, 3.0))
show(scores)
found = {score.name: score for score in scores}
assert found["none"].as_good_as_the_best
assert found["none"].temperature_low < TEMPERATURE < found["none"].temperature_high
assert found["rightward"].temperature > found["none"].temperature  # less wanted, more liked
assert all(score.pareto_k is None or score.pareto_k < 0.7 for score in scores)
