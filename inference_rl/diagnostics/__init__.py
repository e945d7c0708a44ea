"""Looking at what inference found, and at what is said of it: `compare`."""

from inference_rl.diagnostics.comparison.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
