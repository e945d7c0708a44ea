"""The derivation that checks itself: every step from evidence to algorithms, on a reader's model.

`derive(model, temperature=...)` gives a `Derivation`. `step` says what a step is and what a
renderer gets, `ladder` has their order, and each chapter is a file of steps. What steps are checked
by is in `independent`: the same quantities from their definitions, by other means than the
library's.
"""

from inference_rl.derivation.curves import Curves
from inference_rl.derivation.ladder import STEPS, Derivation, derive
from inference_rl.derivation.step import Finding, Row, Step, TwinFinding

__all__ = ["STEPS", "Curves", "Derivation", "Finding", "Row", "Step", "TwinFinding", "derive"]
