"""ArviZ 0.23 and 1.x behind one door: what the one calls otherwise than the other."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray


def arviz() -> Any:
    """The package, without the announcement of its successor that 0.23 makes when imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz

    return arviz


def is_old(az: Any) -> bool:
    """Whether it is 0.23, or another before 1.0."""
    return az.__version__.startswith("0.")


def as_arviz(tree: xarray.DataTree) -> Any:
    """`tree` in the form that the installed ArviZ works on: itself, or an `InferenceData`.

    The functions of 0.23 that summarise and compare refuse a DataTree, which it can only load.
    """
    az = arviz()
    if not is_old(az):
        return tree
    groups = {name: group.to_dataset() for name, group in tree.children.items()}
    return az.InferenceData(attrs=tree.attrs, warn_on_custom_groups=False, **groups)
