"""Contraction, extreme temperatures, and what a prior and a discount may be exchanged for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from inference_rl.backups import control_q, soft_value
from inference_rl.derivation import assumptions
from inference_rl.derivation.control import live
from inference_rl.derivation.independent import Array, best_value, divergence, soft_policy
from inference_rl.derivation.step import Check, DoesNotApplyError, Side, Step, Twin
from inference_rl.derivation.subject import Subject
from inference_rl.distributions import log_or_impossible
from inference_rl.finite import FiniteModel
from inference_rl.finite_messages import control_messages

PAIRS = ("two values at random", "the same, ten times as far apart", "a value and one far above")


# --- Contraction ----------------------------------------------------------------------------------


def _pairs(subject: Subject) -> list[tuple[Array, Array]]:
    """Values (S,) of live states, as they are named in `PAIRS`."""
    acts = subject.tables.live
    one = subject.other_value
    apart = np.where(acts, subject.generator("apart").normal(size=acts.shape), 0.0)
    far = 1000 * max(subject.size("reward"), float(np.abs(one).max()))
    return [(one, one + apart), (one, one + 10 * apart), (one, one + far * acts)]


def _ends_soon(subject: Subject) -> str | None:
    tables = subject.tables
    goes_on = (tables.moves @ tables.live).reshape(tables.prior.shape)
    likeliest = np.where(tables.prior > 0, goes_on, 0.0)[tables.live].max()
    if likeliest > tables.discount + 1e-9:
        return None
    return (
        f"no action goes on with a probability above {likeliest:.3g}, so that even without a "
        "discount values come closer by as much"
    )


def _apart_after(subject: Subject, discount: float) -> Array:
    whole = subject.whole.replace(discount=discount)

    def backed_up(value: Array) -> Array:
        q = control_q(whole, torch.as_tensor(value))
        soft = soft_value(q, whole.log_prior, subject.temperature)
        return torch.where(whole.is_terminal, 0.0, soft).numpy()

    return np.array([np.abs(backed_up(v) - backed_up(w)).max() for v, w in _pairs(subject)])


CONTRACTION = Step(
    id="contraction",
    title="The backup is a contraction",
    explanation=(
        "One soft backup brings any two values closer, by at least the discount. So there is only "
        "one solution, and backups lead to it from anywhere. The log-mean-exp does not spoil this, "
        "because it never stretches a difference between two Qs."
    ),
    formulas=(
        r"\left\| B V - B W \right\|_\infty \le \gamma \left\| V - W \right\|_\infty",
        r"(B V)(s) = \alpha \log \sum_a \rho(a \mid s)\,"
        r" e^{\left( \bar r(s, a) + \gamma\, \mathbb{E} V(s') \right) / \alpha}",
    ),
    relation="<=",
    unit="reward",
    assumptions=(assumptions.discounted,),
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "the greatest difference of two values after one backup by the library",
                lambda subject: _apart_after(subject, subject.whole.discount),
            ),
            right=Side(
                "the discount times the greatest difference before it",
                lambda subject: np.array(
                    [subject.whole.discount * np.abs(v - w).max() for v, w in _pairs(subject)]
                ),
            ),
            twin=Twin(
                "the discount is forgotten in the backup",
                "left",
                lambda subject: _apart_after(subject, 1.0),
                blind=_ends_soon,
            ),
            over=(PAIRS,),
        ),
    ),
    reference="Haarnoja et al. (2017), arXiv:1702.08165, appendix A.2",
    about=control_q,
)


# --- Cold and hot ---------------------------------------------------------------------------------

COLD = (1.0, 0.1, 0.001)
HOT = (1.0, 10.0, 1000.0)


def _cold_names(subject: Subject) -> Sequence[str]:
    return [f"temperature {subject.temperature * factor:.3g}" for factor in COLD]


def _library_value(subject: Subject, temperature: float, *, entropy_form: bool = False) -> Array:
    """V of exact inference at a temperature; or with α log|A| more for every step."""
    found = subject.control_at(temperature)
    value = np.asarray(found.v)
    if entropy_form:
        steps = subject.tables.along(np.asarray(found.policy), np.ones_like(value))
        value = value + temperature * np.log(subject.whole.num_actions) * steps
    return value


def _regular(subject: Subject) -> tuple[Array, Array]:
    """V of regular RL and a policy that attains it, by policy iteration."""
    tables = subject.tables
    try:
        value = subject.best_value_at(0.0)
    except (np.linalg.LinAlgError, RuntimeError) as error:
        raise DoesNotApplyError(
            "without a discount waiting may be free here, and a linear system tells nothing of it"
        ) from error
    return value, soft_policy(tables.action_value(value), tables.prior, 0.0)


def _cold_left(subject: Subject, *, with_price: bool = True) -> Array:
    """V_regular − α E Σ γ^t KL(greedy ‖ ρ), and V, at each temperature: (2, 3, S)."""
    value, greedy = _regular(subject)
    habits = subject.tables.along(greedy, divergence(greedy, subject.tables.prior))
    scales = [subject.temperature * factor for factor in COLD]
    below = [live(subject, value - scale * habits * with_price) for scale in scales]
    return np.array([below, [live(subject, _library_value(subject, scale)) for scale in scales]])


def _cold_right(subject: Subject) -> Array:
    """V, and V_regular, at each temperature: (2, 3, S)."""
    value, _ = _regular(subject)
    scales = [subject.temperature * factor for factor in COLD]
    soft = [live(subject, _library_value(subject, scale)) for scale in scales]
    return np.array([soft, [live(subject, value)] * len(COLD)])


COLD_LIMIT = Step(
    id="cold-limit",
    title="Cold: regular reinforcement learning",
    explanation=(
        "As the temperature goes to zero, the soft value becomes the value of regular "
        "reinforcement learning: leaving habits costs nothing any more. It approaches from below, "
        "and how far below is known at every temperature: by no more than the nats that the best "
        "deterministic policy pays. Written with entropy in place of a divergence it comes from "
        "above, because there randomness is paid for."
    ),
    formulas=(
        r"V_0(s) - \alpha\, \mathbb{E}_{\pi_0} \sum_t \gamma^t \log \frac{1}{\rho(a_t \mid s_t)}"
        r" \le V_\alpha(s) \le V_0(s)",
        r"V_0(s) = \max_a Q_0(s, a) = \lim_{\alpha \to 0} V_\alpha(s)",
    ),
    relation="<=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "the value of regular RL, by policy iteration in NumPy, less what its policy pays "
                "for leaving its habits; and the library's soft value",
                _cold_left,
            ),
            right=Side(
                "the library's soft value; and the value of regular RL, by policy iteration in "
                "NumPy",
                _cold_right,
            ),
            twin=Twin(
                "what the best deterministic policy pays for leaving its habits is forgotten",
                "left",
                lambda subject: _cold_left(subject, with_price=False),
                blind=assumptions.nothing_at_stake,
            ),
            tolerance=1e-9,
            over=(("lower bound", "upper bound"), _cold_names, "state"),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.3; Haarnoja et al. (2017), §3.1",
    about=soft_value,
)


def _hot_scales(subject: Subject) -> list[float]:
    """From the temperature itself to one beside which no reward counts."""
    large = max(subject.temperature, subject.size("reward"))
    return [subject.temperature * HOT[0], large * HOT[1], large * HOT[2]]


def _hot_names(subject: Subject) -> Sequence[str]:
    return [f"temperature {scale:.3g}" for scale in _hot_scales(subject)]


def _hot_left(subject: Subject, *, entropy_form: bool = False) -> Array:
    """What the prior earns, and V, at each temperature: (2, 3, S)."""
    habit = live(subject, subject.tables.value(subject.tables.prior, 0.0))
    soft = [
        live(subject, _library_value(subject, scale, entropy_form=entropy_form))
        for scale in _hot_scales(subject)
    ]
    return np.array([[habit] * len(HOT), soft])


def _hot_right(subject: Subject) -> Array:
    """V, and what the prior earns plus E Σ γ^t span² / 8α, at each temperature: (2, 3, S)."""
    tables = subject.tables
    habit = tables.value(tables.prior, 0.0)
    soft, above = [], []
    for scale in _hot_scales(subject):
        soft.append(live(subject, _library_value(subject, scale)))
        q = tables.action_value(subject.best_value_at(scale))
        high = np.where(tables.prior > 0, q, -np.inf).max(-1)
        low = np.where(tables.prior > 0, q, np.inf).min(-1)
        above.append(
            live(subject, habit + tables.along(tables.prior, (high - low) ** 2) / 8 / scale)
        )
    return np.array([soft, above])


HOT_LIMIT = Step(
    id="hot-limit",
    title="Hot: the prior",
    explanation=(
        "As the temperature grows, every nat costs more than any reward can pay for, and the "
        "policy becomes the prior. The soft value goes to what the prior earns by chance, from "
        "above, and by Hoeffding's lemma the excess falls at least as fast as one over the "
        "temperature."
    ),
    formulas=(
        r"V^\rho(s) \le V_\alpha(s) \le V^\rho(s) + \frac{1}{8 \alpha}\, \mathbb{E}_\rho \sum_t"
        r" \gamma^t \left( \max_a Q_\alpha(s_t, a) - \min_a Q_\alpha(s_t, a) \right)^2",
        r"\lim_{\alpha \to \infty} \pi^*(a \mid s) = \rho(a \mid s)",
    ),
    relation="<=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "what the prior earns, by a linear solve; and the library's soft value", _hot_left
            ),
            right=Side(
                "the library's soft value; and what the prior earns plus the excess that Q allows, "
                "by linear solves",
                _hot_right,
            ),
            twin=Twin(
                "the entropy form is taken for the KL form: it grows with the temperature",
                "left",
                lambda subject: _hot_left(subject, entropy_form=True),
                blind=assumptions.one_action,
            ),
            tolerance=1e-9,
            over=(("lower bound", "upper bound"), _hot_names, "state"),
        ),
    ),
    reference="Hoeffding (1963), JASA 58, 13-30 (the lemma); Levine (2018), §3.3",
    about=soft_value,
)


# --- What may be exchanged ------------------------------------------------------------------------


def _value_under_other_prior(subject: Subject) -> Array:
    """V where the prior is some policy, by the library."""
    model = subject.whole.replace(log_prior=log_or_impossible(torch.as_tensor(subject.policy)))
    return live(subject, np.asarray(control_messages(model, subject.temperature).v))


def _value_of_paid_habits(subject: Subject, *, with_count: bool = True) -> Array:
    """V where the prior is uniform and habits are paid for, by soft policy iteration."""
    tables = subject.tables
    count = tables.prior.shape[1] if with_count else 1
    taken = np.where(tables.live[:, None], subject.policy, 1.0)
    paid = tables.gain + subject.temperature * np.log(taken * count)
    uniform = np.full_like(tables.prior, 1 / tables.prior.shape[1])
    return live(subject, best_value(tables.replace(gain=paid, prior=uniform), subject.temperature))


PRIOR_AS_REWARD = Step(
    id="prior-as-reward",
    title="A prior is a reward, and back",
    explanation=(
        "A prior on actions is nothing that reward could not do: the same as a uniform prior and a "
        "bonus of α log(ρ|A|) for every action. It goes both ways, so that a cost of actions can "
        "be read as a habit. The two differ as soon as the temperature moves: a prior keeps its "
        "weight, and a reward does not."
    ),
    formulas=(
        r"(\rho,\; r) \;\equiv\; \left( \frac{1}{|A|},\; r + \alpha \log\left( \rho(a \mid s)\,"
        r" |A| \right) \right)",
    ),
    relation="=",
    unit="reward",
    assumptions=(assumptions.permissive,),
    checks=(
        Check(
            left=Side(
                "V of exact inference where the prior is some policy", _value_under_other_prior
            ),
            right=Side(
                "soft policy iteration with a uniform prior, and the bonus paid as a reward",
                _value_of_paid_habits,
            ),
            twin=Twin(
                "the number of actions is forgotten: a bonus of α log ρ",
                "right",
                lambda subject: _value_of_paid_habits(subject, with_count=False),
                blind=assumptions.one_action,
            ),
            tolerance=1e-9,
            over=("state",),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.2 (the prior folded into the reward)",
    about=FiniteModel,
)


def _value_of_the_mortal(subject: Subject, *, paid_first: bool = True) -> Array:
    """V without a discount, where a step is survived with probability γ, by the library."""
    model = subject.whole.with_survival()
    if not paid_first:
        dead = model.successors >= subject.whole.num_states
        model = model.replace(rewards=torch.where(dead, 0.0, model.rewards))
    value = np.asarray(control_messages(model, subject.temperature).v)
    return live(subject, value[: subject.whole.num_states])


SURVIVAL = Step(
    id="discount-as-survival",
    title="A discount is a chance of survival",
    explanation=(
        "To weigh step t by γ^t is the same as not to weigh at all and to end the episode after "
        "every step with probability 1 − γ, once it has been paid. So a discount is a property of "
        "the dynamics, and the posterior may condition on it. Adding log γ to every reward is "
        "something else, though it looks alike."
    ),
    formulas=(
        r"P_\gamma(s' \mid s, a) = \gamma\, P(s' \mid s, a), \qquad"
        r" P_\gamma(\mathrm{end} \mid s, a) = 1 - \gamma",
        r"V_{\gamma = 1}^{P_\gamma} = V_\gamma^{P}",
    ),
    relation="=",
    unit="reward",
    assumptions=(assumptions.discounted,),
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "V of exact inference on the undiscounted model in which steps are survived by "
                "chance",
                _value_of_the_mortal,
            ),
            right=Side(
                "soft policy iteration on the discounted model",
                lambda subject: live(subject, subject.best_value),
            ),
            twin=Twin(
                "whoever does not survive a step is not paid for it",
                "left",
                lambda subject: _value_of_the_mortal(subject, paid_first=False),
                blind=assumptions.nothing_earned,
            ),
            tolerance=1e-9,
            over=("state",),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §4.2; Toussaint and Storkey (2006), ICML",
    about=FiniteModel.with_survival,
)

STEPS = (CONTRACTION, COLD_LIMIT, HOT_LIMIT, PRIOR_AS_REWARD, SURVIVAL)
