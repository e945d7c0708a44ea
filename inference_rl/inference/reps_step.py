"""Step-based REPS: what a round's steps say, the dual of it, and the policy refitted."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from inference_rl import duals
from inference_rl.feature_policies import FeaturePolicy, FeatureValue, with_share
from inference_rl.features import RandomFourierFeatures, median_bandwidth
from inference_rl.inference import learned
from inference_rl.inference.reps import absorbed, soft_reward, table_from_draws
from inference_rl.inference.reps_fits import fit_features, fit_module
from inference_rl.inference.reps_rows import (
    MOST_COLUMNS,
    Columns,
    ModelRows,
    ModuleFeatures,
    Rows,
    reachable,
)
from inference_rl.randomness import derived
from inference_rl.tabulation import tabulate

if TYPE_CHECKING:
    from torch import nn

    from inference_rl.environment import EnvironmentModel
    from inference_rl.finite import FiniteModel
    from inference_rl.inference.reps import REPS
    from inference_rl.learning.collection import Collector, Segment
    from inference_rl.policies import Policy
    from inference_rl.priors import ActionPrior


class StepLearner:
    """The state of a run: policy, θ and its features, the temperature."""

    def __init__(self, settings: REPS, model: EnvironmentModel, prior: ActionPrior) -> None:
        check_discount(model)
        check_ends(model)
        self.settings, self.model, self.prior = settings, model, prior
        self.tempering = learned.Tempering(settings, model, prior)
        self.seed = int(torch.randint(2**62, ()))
        self.policy: Policy
        self.value: nn.Module | None
        self.policy, self.value = learned.policy_and_value(settings, model, prior)
        self.fourier: RandomFourierFeatures | None = None
        self.form = self._form()
        finite = _tables(settings, model, prior, self.form == "table")
        self.features = self._features(finite)
        self.by_model = None
        if finite is not None and isinstance(self.features, Columns):
            self.by_model = ModelRows(finite, self.features)
        if self.form == "linear":
            self.policy = self._linear_policy()
        self.theta: Tensor | None = None
        self.rounds, self.steps = 0, 0

    def _form(self) -> str:
        """That of the policy: table, linear or neural."""
        settings, spaces = self.settings, (self.model.state_space, self.model.action_space)
        own = settings.policy is not None
        possible = {
            "table": not own and all(isinstance(space, Discrete) for space in spaces),
            "linear": not own
            and settings.feature_module is None
            and all(isinstance(space, Box) for space in spaces),
            "neural": True,
        }
        if settings.form == "auto":
            return next(form for form in possible if possible[form])
        if not possible[settings.form]:
            needs = {
                "table": "Discrete states and actions",
                "linear": "Box states and actions, and Fourier features",
            }[settings.form]
            raise ValueError(
                f"form: a {settings.form} policy needs {needs}, and no module of your own, got "
                f"states in {spaces[0]} and actions in {spaces[1]}; leave it at auto"
            )
        return settings.form

    def _features(self, finite: FiniteModel | None) -> Columns | ModuleFeatures:
        settings, horizon, space = self.settings, self.model.horizon, self.model.state_space
        if settings.feature_module is not None:
            self.value = None
            return ModuleFeatures(copy.deepcopy(settings.feature_module), horizon)
        expected = "tabular" if isinstance(space, Discrete) else "fourier"
        if settings.features not in ("auto", expected):
            raise ValueError(
                f"features: expected {expected} ones of states in {space}, got "
                f"{settings.features}; leave it at auto, or give a feature_module"
            )
        if not isinstance(space, Discrete):
            dim = math.prod(space.shape or ()) + (horizon is not None)
            # Their bandwidth is that of the states of the first round.
            self.fourier = RandomFourierFeatures(dim, settings.feature_count, 1.0, self.seed)
            self.value = FeatureValue(self.fourier, horizon)
            return ModuleFeatures(self.fourier, horizon)
        every = torch.ones(horizon or 1, int(space.n), dtype=torch.bool)
        columns = Columns(every if finite is None else reachable(finite), horizon)
        if columns.count > MOST_COLUMNS:
            raise ValueError(
                f"features: expected at most {MOST_COLUMNS} states (and steps) to hold the flow "
                f"of, got {columns.count}; give fewer features by feature_module"
            )
        return columns

    def _linear_policy(self) -> FeaturePolicy:
        space = self.model.action_space
        assert self.fourier is not None
        assert isinstance(space, Box)
        return FeaturePolicy(
            self.fourier,
            math.prod(space.shape),
            bounded=bool(space.is_bounded()),
            horizon=self.model.horizon,
        )

    def collect(self, collector: Collector) -> Segment:
        return collector.collect_episodes(self.policy)

    def update(self, data: Segment) -> dict[str, Tensor | float]:
        self.rounds += 1
        self.steps += data.steps
        temperature, valid = self.tempering.temperature, data.valid
        before = self._log_prob(data)
        log_ratio = before - learned.log_prior(self.prior, data)[valid].double()
        if self.rounds == 1:
            self._set_bandwidth(data)
            learned.observe(data, self.policy)
        mass, ended = 0.0, data.terminated & valid
        if ended.any():
            mass = float(absorbed(data.step[ended], self.model.discount, self.model.horizon).sum())
        if self.by_model is not None:
            found, share = self._update_by_model(data, mass, temperature)
        else:
            found, share = self._update_by_draws(data, log_ratio, mass, temperature)
        divergence = log_ratio.mean()
        self.tempering.update(divergence, data.steps)
        return {
            "entropy": -before.mean(),
            "divergence": divergence,
            "temperature": temperature,
            "dual_temperature": found.temperature,
            "divergence_of_weights": found.divergence,
            "divergence_of_policies": (before - self._log_prob(data)).mean(),
            "effective_sample_size": data.steps * share,
            "feature_mismatch": found.feature_mismatch,
        }

    def _log_prob(self, data: Segment) -> Tensor:
        """log π of the actions that were taken, (N,) float64."""
        with torch.no_grad():
            log_prob = self.policy(data.state, data.step).log_prob(data.action)
        return log_prob[data.valid].double()

    def _set_bandwidth(self, data: Segment) -> None:
        if self.fourier is None:
            return
        states = with_share(data.state[data.valid], data.step[data.valid], self.model.horizon)
        width = self.settings.bandwidth * median_bandwidth(states, self.seed)
        count = self.settings.feature_count
        drawn = RandomFourierFeatures(states.shape[1], count, width, self.seed)
        self.fourier.load_state_dict(drawn.state_dict())

    def _update_by_model(
        self, data: Segment, mass: float, temperature: float
    ) -> tuple[duals.StepDual, float]:
        rows, valid = self.by_model, data.valid
        assert rows is not None
        policy: Any = self.policy
        visits = torch.full((rows.columns.count,), 1 / rows.columns.count, dtype=torch.float64)
        at = rows.columns.of(data.state[valid], data.step[valid])
        visits.index_add_(0, at, self.model.discount ** data.step[valid].double())
        with torch.no_grad():
            log_policy = policy(rows.state, rows.step).logits.double().log_softmax(-1)
        weighed = rows.weighed(visits, log_policy, temperature)
        found, advantage, share = self._solve(weighed.absorbing(mass), mass, temperature)
        advantage = advantage[: log_policy.numel()].reshape(log_policy.shape)
        self._set_table(rows.columns.cells, log_policy + advantage / found.temperature)
        return found, share

    def _update_by_draws(
        self, data: Segment, log_ratio: Tensor, mass: float, temperature: float
    ) -> tuple[duals.StepDual, float]:
        valid, discount = data.valid, self.model.discount
        state, step = data.state[valid], data.step[valid]
        goes_on = ~data.terminated[valid]
        rows = Rows(
            soft_reward(data.reward[valid], log_ratio, temperature),
            self.features(state, step),
            self.features(data.next_state[valid], step + 1) * goes_on.unsqueeze(-1),
            discount ** step.double(),
        )
        found, _, share = self._solve(rows.absorbing(mass), mass, temperature)
        weights = torch.from_numpy(found.weights)[: len(step)]
        if self.form == "table":
            policy: Any = self.policy
            assert isinstance(self.features, Columns)
            cell = self.features.cell(state, step)
            logits = policy.parameters_of.table.detach().double()
            action = data.action[valid]
            self._set_table(
                torch.arange(len(logits)),
                table_from_draws(logits, cell, action, rows.base, weights),
            )
            return found, share
        seed = derived(self.seed, f"round {self.rounds}")
        if isinstance(self.policy, FeaturePolicy):
            fit_features(
                self.policy, state, step, data.action[valid], weights, self.settings.fit_penalty
            )
        else:
            fit_module(self.policy, state, step, data.action[valid], weights, self.settings, seed)
        return found, share

    def _set_table(self, cells: Tensor, logits: Tensor) -> None:
        """Of an action that is never taken any finite number will do."""
        policy: Any = self.policy
        table = policy.parameters_of.table
        logits = logits.log_softmax(-1)
        with torch.no_grad():
            table[cells] = torch.where(logits > -torch.inf, logits, 0.0).to(table.dtype)

    def _solve(
        self, rows: Rows, mass: float, temperature: float
    ) -> tuple[duals.StepDual, Tensor, float]:
        """The dual's solution, δ of the rows, and the effective share of the sample.

        θ moves on to the solution. Only its change is what the dual sees: see departure 3.
        """
        discount, horizon = self.model.discount, self.model.horizon
        if self.theta is None:
            self.theta = rows.features.new_zeros(rows.features.shape[1])
        difference = discount * rows.next_features - rows.features
        base = rows.base / rows.base.sum()
        source = -(base @ difference) / duals.start_mass(discount, horizon)
        found = duals.solve_step(
            rows.reward + difference @ self.theta,
            rows.features,
            rows.next_features,
            self.settings.epsilon,
            discount=discount,
            initial_features=source,
            log_base=rows.base.log(),
            horizon=horizon,
            least_temperature=temperature,
            flow_tolerance=self.settings.flow_tolerance,
        )
        self.theta = self.theta + torch.from_numpy(found.theta)
        weights = torch.from_numpy(found.weights)
        kept = base > 0
        share = 1 / float((weights[kept].square() / base[kept]).sum())
        advantage = torch.from_numpy(found.advantages)
        # Without ends θ is known up to a constant, with which δ averages to zero.
        self._set_value(0.0 if mass else float(weights @ advantage))
        return found, advantage, share

    def _set_value(self, excess: float) -> None:
        assert self.theta is not None
        discount, horizon = self.model.discount, self.model.horizon
        if isinstance(self.features, Columns):
            step = self.features.cells // self.features.states
            if horizon is None:
                left = torch.full(step.shape, 1 / (1 - discount), dtype=torch.float64)
            else:
                left = 1 + absorbed(step, discount, horizon) / discount ** step.double()
            value: Any = self.value
            with torch.no_grad():
                table = value.table
                table[self.features.cells, 0] = (self.theta + excess * left).to(table.dtype)
        elif isinstance(self.value, FeatureValue):
            self.value.theta.copy_(self.theta)
            if horizon is None:
                self.value.offset.fill_(excess / (1 - discount))

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "fourier": None if self.fourier is None else self.fourier.state_dict(),
            "value": None if self.value is None else self.value.state_dict(),
            "theta": self.theta,
            "temperature": self.tempering.state_dict(),
            "rounds": self.rounds,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        if self.fourier is not None:
            self.fourier.load_state_dict(state["fourier"])
        if self.value is not None:
            self.value.load_state_dict(state["value"])
        self.theta = state["theta"]
        self.tempering.load_state_dict(state["temperature"])
        self.rounds, self.steps = state["rounds"], state["steps"]


def check_discount(model: EnvironmentModel) -> None:
    """:raises ValueError: discounted visits of `model` cannot be normalised."""
    if model.discount == 0 or (model.discount == 1 and model.horizon is None):
        raise ValueError(
            f"discount: expected one above 0, and below 1 where there is no horizon, for visits "
            f"that can be counted, got {model.discount} of {model.name}; give --discount"
        )


def check_ends(model: EnvironmentModel) -> None:
    """:raises ValueError: a round would never end."""
    if model.gymnasium_id is None and model.horizon is None and not model.can_end:
        raise ValueError(
            f"horizon: expected one, as a round is whole episodes and those of {model.name} never "
            "end; give the model a horizon or terminal states"
        )


def _tables(
    settings: REPS, model: EnvironmentModel, prior: ActionPrior, is_table: bool
) -> FiniteModel | None:
    """The model as tables, if its expectations are to be taken and it has any."""
    if settings.expectation == "sample" or (settings.expectation == "auto" and not is_table):
        return None
    try:
        if not is_table:
            raise TypeError("the policy is no table")
        return tabulate(model, prior=prior)
    except TypeError as error:
        if settings.expectation == "auto":
            return None
        raise TypeError(
            "expectation: expected a finite model and a table for its policy, to take the model's "
            f"own means, but {error}; choose expectation='sample'"
        ) from error
