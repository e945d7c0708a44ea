"""Control against posterior: two questions that noise in the dynamics tells apart.

*Control*: which policy is best, when the world behaves as it does? *Posterior*: given that all went
well, what was done? The second also draws lucky noise, because luck is part of how it went well.
"""

import warnings

import torch

from inference_rl import Exact, infer, load_target

warnings.filterwarnings("ignore", message="the posterior's policy assumes")

TEMPERATURE = 0.5
lottery = load_target("lottery")  # 0.5 for sure, or a ticket: 3.0 with probability 0.1

control = infer(lottery, Exact(temperature=TEMPERATURE))
posterior = infer(lottery, Exact(temperature=TEMPERATURE, target="posterior"))
for name, result in (("control", control), ("posterior", posterior)):
    buys = float(result.policy.probs[0, 0, 1])
    print(f"{name:9}: buys the ticket with probability {buys:.3f}")
assert control.policy.probs[0, 0, 1] < 0.5 < posterior.policy.probs[0, 0, 1]

# By hand. Control averages the reward and then asks for its exponential; the posterior averages the
# exponential, in which 3.0 outweighs all else.
safe, ticket, luck = 0.5, 3.0, 0.1
average = luck * ticket
wished = TEMPERATURE * torch.log(
    luck * torch.exp(torch.tensor(ticket / TEMPERATURE, dtype=torch.float64)) + (1 - luck)
)
print(f"the ticket is worth {average:.2f} to control, and {wished:.2f} to the posterior")


def soft(value):
    """Probability of the ticket under a uniform prior."""
    return 1 / (1 + torch.exp((safe - torch.as_tensor(value)) / TEMPERATURE))


assert torch.isclose(control.policy.probs[0, 0, 1], soft(average).double())
assert torch.isclose(posterior.policy.probs[0, 0, 1], soft(wished))

# What acting on the wish costs: the posterior's policy in the real world. Its return is found by
# play, and it is lower than that of the control policy.
played = [result.evaluate(episodes=4000) for result in (control, posterior)]
for name, run in zip(("control", "posterior"), played, strict=True):
    print(f"played, {name:9}: return {run.mean_return:.3f} ± {run.standard_error:.3f}")
spread = sum(run.standard_error**2 for run in played) ** 0.5
assert played[0].mean_return - played[1].mean_return > 3 * spread

# The evidence exceeds the best bound by a divergence, and `gap` says whose it is: of the start, of
# the policy, or of the dynamics, which the posterior would have to bend.
gap = control.gap
print(f"evidence − bound = {gap.total:.4f} nats: policy {gap.policy:.4f}, luck {gap.dynamics:.4f}")
assert abs(control.log_evidence - control.objective / TEMPERATURE - gap.total) < 1e-10

# Without noise there is nothing to wish for: both questions have one answer.
still = load_target("tree", env_kwargs={"depth": 3, "branching": 2})
both = [infer(still, Exact(temperature=TEMPERATURE, target=t)) for t in ("control", "posterior")]
assert torch.allclose(both[0].policy.probs, both[1].policy.probs)
assert both[0].gap.total < 1e-10
print("on a tree without noise the two policies are the same")
