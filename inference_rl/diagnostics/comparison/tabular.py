"""Q-learning in a table, soft or regular, of many learners side by side: `Learners`.

The cheapest learner there is, so that many seeds can be afforded: after every step of its own
episode each learner moves one entry,

    Q(s, a) += rate · [r + γ V(s') - Q(s, a)],

V = max Q for regular RL (Watkins and Dayan 1992, doi:10.1007/BF00992698), V = α log Σ ρ e^{Q/α} for
MaxEnt RL (Haarnoja et al. 2017, arXiv:1702.08165, eq. 8, of one sample). Regular learners take the
best action, one of several at random, or with probability ε one of the prior; soft ones draw from
ρ e^{Q/α}. A temperature that is tuned follows its dual, as that of the learned routines does: log α
rises while KL(π ‖ ρ) exceeds its target. Q starts at zero; nothing else is remembered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from inference_rl.diagnostics.comparison.visits import Dynamics
from inference_rl.finite import FiniteModel
from inference_rl.temperature import default_target_entropy, divergence_of_entropy

Array = np.ndarray[Any, Any]

TUNING_RATE = 0.01
"""Of the logarithm of a tuned temperature, for every step."""

TOLD_EVERY = 500
"""Steps between words on progress."""

MOST_ENTRIES = 2**27
"""Of the tables of all learners together."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What sets learners apart besides their seed.

    :ivar temperature: reward units; 0 is regular RL, None is tuned. :ivar epsilon: chance of an
        action of the prior, at temperature 0. :ivar rate: of learning, in (0, 1].
    """

    name: str
    temperature: float | None
    rate: float
    epsilon: float = 0.0


@dataclasses.dataclass(frozen=True)
class Learned:
    """What learners of K seeds came to.

    :ivar covered: states they have been in, (K,). :ivar found: the step at which they first saw
        what is worth finding, the budget where they did not, (K,). :ivar policies: as they act, but
        for ε, (K, S, A) or (K, T, S, A). :ivar greedy: the best actions by their Q, likewise.
    :ivar temperatures: reward units, (K,).
    """

    kind: Kind
    covered: Array
    found: Array
    policies: Array
    greedy: Array
    temperatures: Array


def worth_finding(dynamics: Dynamics, model: FiniteModel, prior: Array) -> tuple[float, str]:
    """A reward that is rare under the prior, and what it is in words; inf where there is none.

    More than 95% of the steps of the prior pay, if anything does; or else the most that is paid, if
    that is more than half of them pay.
    """
    visits = dynamics.visits(prior[None])[0].reshape(-1)
    weights = visits[model.rows().numpy()] * model.probabilities.detach().numpy()
    return rare(model.rewards.detach().numpy(), weights)


def rare(rewards: Array, weights: Array) -> tuple[float, str]:
    """The same, of rewards that come as often as `weights` say."""
    possible = weights > 0
    rewards, weights = rewards[possible], weights[possible]
    if not rewards.size:
        return math.inf, "the end of an episode"
    order = np.argsort(rewards, kind="stable")
    below = np.cumsum(weights[order]) / weights.sum()
    median, top = (float(rewards[order][np.searchsorted(below, q)]) for q in (0.5, 0.95))
    better = rewards[rewards > top]
    if better.size:
        least = float(better.min())
        return least, f"a reward of at least {least:.4g}, which under 5% of the prior's steps pay"
    best = float(rewards.max())
    if best > median:
        return best, f"a reward of {best:.4g}, the most that is paid"
    return math.inf, "the end of an episode, for no reward is rare"


def learn(
    model: FiniteModel,
    kinds: list[Kind],
    *,
    seeds: int,
    steps: int,
    generator: np.random.Generator,
    prior: Array,
    worth: float,
    unit: float,
    progress: Callable[[str], None] | None = None,
) -> list[Learned]:
    """Let `seeds` learners of every kind take `steps` steps.

    :param prior: (S, A), or (T, S, A). :param worth: reward worth finding; inf for an end.
    :param unit: where tuned temperatures begin, reward units.
    """
    dynamics = Dynamics.of(model)
    count, (states, actions) = len(kinds) * seeds, dynamics.reward.shape
    times = model.horizon or 1
    q = np.zeros((count, times * states, actions))
    each = np.arange(count)
    rate = np.repeat([kind.rate for kind in kinds], seeds)
    epsilon = np.repeat([kind.epsilon for kind in kinds], seeds)
    tuned = np.repeat([kind.temperature is None for kind in kinds], seeds)
    given = [unit if kind.temperature is None else kind.temperature for kind in kinds]
    temperature = np.repeat(np.array(given, dtype=float), seeds)
    soft = temperature > 0
    tempered = np.where(soft, temperature, 1.0)
    target = divergence_of_entropy(default_target_entropy(model.action_space), model.action_space)
    log_prior = np.log(np.maximum(prior, 1e-300)).reshape(-1, actions)[:states]
    log_prior = np.where(log_prior < -600, -np.inf, log_prior)
    table = _Table(model)
    # An episode that ends where it starts takes no step.
    starts = np.cumsum(np.where(dynamics.ended, 0.0, dynamics.initial))
    covered = np.zeros((count, states), dtype=bool)
    found = np.full(count, steps)

    def values(rows: Array, at: Array) -> tuple[Array, Array]:
        """V and π of soft learners; V of regular ones, whose π means nothing."""
        scores = log_prior[at % states] + rows / tempered[:, None]
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        best = np.where(log_prior[at % states] > -np.inf, rows, -np.inf).max(-1)
        value = np.where(soft, tempered * (top + np.log(total))[:, 0], best)
        return value, weights / total

    def begin(number: int) -> Array:
        drawn = generator.random(number) * starts[-1]
        return np.searchsorted(starts, drawn, side="right").clip(max=states - 1)

    state, t = begin(count), np.zeros(count, dtype=int)
    for step in range(steps):
        if progress is not None and step % TOLD_EVERY == 0:
            progress(f"learning in tables: step {step:,} of {steps:,}")
        covered[each, state] = True
        at = state if model.horizon is None else t * states + state
        rows = q[each, at]
        _, policy = values(rows, at)
        allowed = np.where(log_prior[state] > -np.inf, rows, -np.inf)
        best = allowed >= allowed.max(-1, keepdims=True)
        explores = generator.random(count) < epsilon
        chances = np.where(soft[:, None], policy, best / best.sum(-1, keepdims=True))
        chances = np.where(explores[:, None], np.exp(log_prior[state]), chances)
        action = _drawn(chances, generator)
        following, reward = table.step(state, action, generator)
        t = t + 1
        ended = dynamics.ended[following]
        cut = ~ended & (t >= dynamics.steps)
        last = ended | (cut & (model.horizon is not None))
        ahead = (
            following if model.horizon is None else np.minimum(t, times - 1) * states + following
        )
        value, _ = values(q[each, ahead], ahead)
        goal = reward + dynamics.discount * np.where(last, 0.0, value)
        q[each, at, action] += rate * (goal - rows[each, action])
        seen = ended if worth == math.inf else reward >= worth
        found = np.where(seen & (found == steps), step + 1, found)
        if tuned.any():
            ratio = np.where(policy > 0, np.log(np.maximum(policy, 1e-300)), 0.0)
            ratio -= np.where(policy > 0, log_prior[state], 0.0)
            excess = (policy * ratio).sum(-1) - target
            tempered = np.where(tuned, tempered * np.exp(TUNING_RATE * excess), tempered)
        covered[each, following] = True
        state = following
        if (ends := ended | cut).any():
            state = state.copy()
            state[ends] = begin(int(ends.sum()))
            t = np.where(ends, 0, t)
    return _learned(model, kinds, seeds, q, soft, tempered, log_prior, covered, found)


def _learned(
    model: FiniteModel,
    kinds: list[Kind],
    seeds: int,
    q: Array,
    soft: Array,
    tempered: Array,
    log_prior: Array,
    covered: Array,
    found: Array,
) -> list[Learned]:
    states, actions = log_prior.shape
    times = q.shape[1] // states
    known = q.reshape(len(q), times, states, actions)
    allowed = np.where(log_prior > -np.inf, known, -np.inf)
    best = allowed >= allowed.max(-1, keepdims=True)
    regular = best / best.sum(-1, keepdims=True)
    scores = log_prior + known / tempered[:, None, None, None]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    drawn = weights / weights.sum(-1, keepdims=True)
    policies = np.where(soft[:, None, None, None], drawn, regular)
    if model.horizon is None:
        policies, regular = policies[:, 0], regular[:, 0]
    parts = [slice(i * seeds, (i + 1) * seeds) for i in range(len(kinds))]
    return [
        Learned(
            kind=kind,
            covered=covered[part].sum(-1),
            found=found[part],
            policies=policies[part],
            greedy=regular[part],
            temperatures=np.where(soft, tempered, 0.0)[part],
        )
        for kind, part in zip(kinds, parts, strict=True)
    ]


class _Table:
    """Successors of every row, as wide as the longest, to draw from for many at once."""

    def __init__(self, model: FiniteModel) -> None:
        pointers = model.pointers.numpy()
        self.first, self.actions = pointers[:-1], model.num_actions
        probabilities = model.probabilities.detach().numpy()
        self.successors = model.successors.numpy().astype(int)
        self.rewards = model.rewards.detach().numpy()
        width = int(np.diff(pointers).max(initial=1))
        slots = self.first[:, None] + np.arange(width)
        inside = slots < pointers[1:, None]
        chances = np.where(inside, probabilities[np.minimum(slots, len(probabilities) - 1)], 0.0)
        self.cumulative = chances.cumsum(-1)
        self.last = np.maximum(np.diff(pointers) - 1, 0)

    def step(
        self, state: Array, action: Array, generator: np.random.Generator
    ) -> tuple[Array, Array]:
        """Next states and rewards."""
        row = state * self.actions + action
        below = self.cumulative[row]
        slot = (generator.random(len(row))[:, None] * below[:, -1:] >= below).sum(-1)
        slot = self.first[row] + np.minimum(slot, self.last[row])
        return self.successors[slot], self.rewards[slot]


def _drawn(chances: Array, generator: np.random.Generator) -> Array:
    below = chances.cumsum(-1)
    drawn: Array = (generator.random(len(chances))[:, None] * below[:, -1:] >= below).sum(-1)
    return np.minimum(drawn, chances.shape[-1] - 1)


def fits(model: FiniteModel, learners: int) -> bool:
    """Whether the tables of so many learners can be held."""
    return learners * (model.horizon or 1) * model.num_states * model.num_actions <= MOST_ENTRIES
