"""Define an environment model, and infer a policy for it.

A model is three conditional distributions and two functions. Nothing else is needed: from them the
library makes the trajectory program, tables for exact inference, and a simulator to learn from.
"""

import pyro.distributions as dist
import torch
from gymnasium.spaces import Discrete

from inference_rl import SAC, EnvironmentModel, Exact, infer
from inference_rl.testing import assert_model_valid

STATES, GOAL = 6, 5


class Ferry(EnvironmentModel):
    """A river of six places, with a current that carries a boat back.

    Rowing (action 1) gets one place further with probability 0.8 and costs 0.1; drifting (action 0)
    is free. The far bank pays 1, once.
    """

    state_space, action_space, discount = Discrete(STATES), Discrete(2), 0.95

    def initial_state(self):
        return dist.Categorical(torch.nn.functional.one_hot(torch.tensor(2), STATES).double())

    def transition(self, state, action):  # tensors of one shape, whichever
        ahead = torch.nn.functional.one_hot((state + 1).clamp(max=GOAL), STATES)
        back = torch.nn.functional.one_hot((state - 1).clamp(min=0), STATES)
        forward = 0.8 * action.unsqueeze(-1).double()
        return dist.Categorical(forward * ahead + (1 - forward) * back)

    def reward(self, state, action, next_state):
        return (next_state == GOAL).double() - 0.1 * action

    def terminal(self, state):
        return state == GOAL


river = Ferry()
assert_model_valid(river)  # says what is wrong, where, and how to mend it

# Regular RL is the limit of temperature 0: a greedy policy. Above it the policy is stochastic.
for temperature in (0.0, 0.05, 0.5):
    result = infer(river, Exact(temperature=temperature))
    rows = [round(p, 3) for p in result.policy.probs[:GOAL, 1].tolist()]
    print(f"temperature {temperature}: J = {result.objective:.4f}, rows with probability {rows}")
    if temperature == 0:
        assert set(rows) <= {0.0, 1.0}
        hard = result.objective
    else:
        assert all(0 < p < 1 for p in rows)
        # What its price of entropy costs a soft policy, in KL form: at most
        # temperature · log|A| / (1 − discount), and never less than nothing.
        assert 0 <= hard - result.objective <= temperature * 0.6931472 / (1 - river.discount)

# The same model is a simulator: soft actor-critic learns from its samples alone, and comes to what
# exact inference says.
exact = infer(river, Exact(temperature=0.05))
learned = infer(
    river,
    SAC(
        temperature=0.05,
        total_steps=6000,
        environments=4,
        steps_per_round=5,
        updates_per_step=0.2,
        learning_rate=0.02,
        value_learning_rate=0.02,
        target_rate=0.05,
        evaluation_episodes=0,
    ),
)
states = torch.arange(GOAL)
apart = (learned.policy(states).probs - exact.policy(states).probs).abs().max()
print(f"learned from samples: probabilities within {apart:.3f} of the exact ones")
assert apart < 0.1
run = learned.evaluate(episodes=500)
print(f"return of the learned policy: {run.mean_return:.3f} ± {run.standard_error:.3f}")
