"""The derivation in code: from one program to the soft Bellman equations, and each step checked.

What `inference-rl derive` shows is done here by hand for its central steps, in plain tensor algebra
on the tables of a small slippery lake; then all steps are run, each against a second computation
that shares nothing with the first, and against a broken twin that has to fail.
"""

import torch

from inference_rl import Exact, infer, load_target
from inference_rl.derivation import derive

TEMPERATURE, DISCOUNT = 0.1, 0.99
lake = load_target("FrozenLake-v1", discount=DISCOUNT)
S, A = lake.num_states, lake.num_actions
P = torch.from_numpy(lake.csr.toarray()).reshape(S, A, S)  # p(s' | s, a)
R = lake.expected_reward()  # E[r | s, a]
log_prior = lake.log_prior  # log ρ(a | s), uniform here
going = (~lake.is_terminal).double()

# 1. The objective. Temperature times the evidence lower bound of a guide that keeps the dynamics is
#    J(π) = E Σ γ^t [r − α log π/ρ]: a linear system for any policy, by its own reward.


def value_of(policy):
    """V^π, (S,), by solving (I − γ P^π) V = r^π − α KL(π ‖ ρ)."""
    divergence = (policy * (policy.log() - log_prior)).sum(-1)
    rate = going * ((policy * R).sum(-1) - TEMPERATURE * divergence)
    forward = going[:, None] * torch.einsum("sa,sat->st", policy, P)
    return torch.linalg.solve(torch.eye(S, dtype=P.dtype) - DISCOUNT * forward, rate)


# 2. Its maximum. One step is won by π ∝ ρ e^{Q/α}, and is then worth V = α log Σ ρ e^{Q/α}: the
#    soft Bellman equations, iterated to their fixed point.
V = torch.zeros(S, dtype=P.dtype)
for _ in range(3000):
    Q = R + DISCOUNT * P @ V
    V = going * TEMPERATURE * (log_prior + Q / TEMPERATURE).logsumexp(-1)
best = torch.exp(log_prior + (Q - Q.max(-1, keepdim=True).values) / TEMPERATURE)
best = best / best.sum(-1, keepdim=True)

exact = infer(lake, Exact(temperature=TEMPERATURE))
print(f"V(start): by hand {V[0]:.12f}, by exact inference {exact.v[0]:.12f}")
assert torch.allclose(V, exact.v, atol=1e-9)
assert torch.allclose(best, exact.policy.probs, atol=1e-8)
assert torch.allclose(value_of(best), V, atol=1e-8)

# 3. Regret is a divergence. What any policy falls short of the best is α E_π Σ γ^t KL(π ‖ π*).
generator = torch.Generator().manual_seed(0)
some = torch.softmax(torch.randn(S, A, generator=generator, dtype=P.dtype), -1)
forward = going[:, None] * torch.einsum("sa,sat->st", some, P)
occupancy = torch.linalg.solve(torch.eye(S, dtype=P.dtype) - DISCOUNT * forward.T, lake.initial)
nats = going * (some * (some.log() - best.log())).sum(-1)
short = lake.initial @ (V - value_of(some))
print(f"regret of some policy: {short:.12f}, as a divergence {TEMPERATURE * occupancy @ nats:.12f}")
assert torch.isclose(short, TEMPERATURE * occupancy @ nats)

# 4. The limit is regular RL: V falls short of the hard optimum, and by no more than what a greedy
#    policy would have to pay, α log|A| for every step.
hard = infer(lake, Exact(temperature=0.0))
for temperature in (0.1, 0.01, 0.001):
    soft = infer(lake, Exact(temperature=temperature))
    limit = temperature * torch.tensor(float(A)).log() / (1 - DISCOUNT)
    below = (hard.v - soft.v).max()
    print(
        f"temperature {temperature}: V at most {below:.4f} below the hard one (bound {limit:.4f})"
    )
    assert 0 <= below <= limit

# 5. All of it: `inference-rl derive FrozenLake-v1 --temperature 0.1` prints this with words and
#    formulas, `--html FILE` makes a page of it.
derivation = derive(lake, temperature=TEMPERATURE)
for finding in derivation.findings[:6]:
    print(f"  {finding.step.title:50} {finding.verdict}, its broken twin: {finding.twin_verdict}")
print("  ...")
print(derivation.counts)
assert not derivation.failed
assert derivation.counts["twins_caught"] == derivation.counts["twins"]
