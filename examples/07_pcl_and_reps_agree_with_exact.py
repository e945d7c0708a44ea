"""Path consistency and relative entropy policy search come to what exact inference says.

Neither passes messages. PCL uses that along any path, whoever took it, the soft values of its ends
and the log-probabilities on it must add up; REPS reweights what was sampled, within a divergence,
by the dual of that constraint. Both are compared here with messages passed backwards.
"""

import torch

from inference_rl import PCL, REPS, Exact, infer, load_target, tabulate
from inference_rl.duals import *

TEMPERATURE = 0.2
tree = tabulate(load_target("tree", env_kwargs={"depth": 3, "branching": 2}))
exact = infer(tree, Exact(temperature=TEMPERATURE))
