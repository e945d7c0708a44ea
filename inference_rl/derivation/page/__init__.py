"""The derivation as one HTML file that needs nothing else: `render`.

Everything that can be shown is in the file when it is written: formulas as MathML, the numbers of
the twins beside the right ones, and the numbers at every temperature of the slider. The style sheet
and the script choose what is seen, and compute nothing. The file asks nothing of any network, and
its content policy would not let it.
"""

from inference_rl.derivation.page.document import render

__all__ = ["render"]
