"""Imports point one way, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {
        "runs",
        "search_spaces",
        "html",
        "distributions",
        "truncated_normal",
        "squashed_normal",
        "stein",
        "randomness",
        "blocks",
    },
    {
        "priors",
        "policies",
        "networks",
        "action_values",
        "learned_prior",
        "features",
        "feature_policies",
        "contextual_policy",
        "softmax_policy",
        "stein_policy",
        "temperature",
        "environment",
    },
    {"trajectory", "decision", "decision_value"},
    {
        "state_rows",
        "finite",
        "tabulation",
        "prior_checks",
        "toy_text",
        "linear_gaussian",
        "simulate",
        "batch",
        "gymnasium_spaces",
        "gymnasium_environments",
        "program_environments",
        "vector_environments",
        "evaluation",
        "model_environment",
        "simulated_program",
        "targets",
        "fitting",
        "backups",
        "duals",
        "bellman_operators",
        "banded",
        "policy_evaluation",
        "end_components",
        "fixed_point",
        "linear_gaussian_backup",
        "linear_gaussian_evidence",
        "riccati",
        "riccati_stationary",
        "finite_messages",
        "models",
    },
    {"learning"},
    {"scale_out"},
    {"inference"},
    {"sweeping"},
    {"derivation", "diagnostics", "testing"},
    {"report", "doctor", "command_line", "command_context"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ROUTINES = {"exact", "sql", "sac", "policy_gradient", "pcl", "reps", "soft_ddpg", "soft_td3"}


def sources() -> list[Path]:
    inside = (ROOT / "inference_rl").rglob("*.py")
    files = [p for p in [*inside, *(ROOT / "models").glob("*.py")] if p.stem != "__init__"]
    return [*sorted(files), ROOT / "inference_rl/inference/__init__.py"]


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "models" if parts[0] == "models" else parts[1]


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules imported anywhere in a file, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(path: Path, tree: ast.AST) -> list[str]:
    own = layer_of(path)
    found = []
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] != "inference_rl" or len(parts) < 2 or parts[1] not in RANK:
            continue
        if RANK[parts[1]] > RANK[own]:
            found.append(f"{path.name} ({own}) imports {name}")
        if own == "inference" and parts[1] == "inference" and len(parts) > 2:
            routines = [
                next((r for r in ROUTINES if s.startswith(r)), None) for s in (path.stem, parts[2])
            ]
            if None not in routines and routines[0] != routines[1]:
                found.append(f"{path.name} imports another routine: {name}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert layer_of(path) in RANK, f"{path}: say in LAYERS where it belongs"
    assert violations(path, ast.parse(path.read_text())) == []


def test_the_check_sees_upward_and_sideways_imports() -> None:
    up = ast.parse("def f():\n    from inference_rl.inference import infer")
    assert violations(ROOT / "inference_rl/trajectory.py", up)
    sideways = ast.parse("from inference_rl.inference.reps import REPS")
    assert violations(ROOT / "inference_rl/inference/exact_finite.py", sideways)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_plotting_is_imported_in_diagnostics_only_and_lazily(path: Path) -> None:
    tree = ast.parse(path.read_text())
    heavy = {"arviz", "matplotlib"}
    if layer_of(path) != "diagnostics":
        assert not {n.split(".")[0] for n in imports(tree)} & heavy
    top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    assert not {n.split(".")[0] for n in imports(top)} & heavy


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_ray_is_imported_where_work_is_divided_only_and_lazily(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if layer_of(path) not in ("scale_out", "sweeping"):
        assert "ray" not in {n.split(".")[0] for n in imports(tree)}
    top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    assert "ray" not in {n.split(".")[0] for n in imports(top)}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_optimiser_of_sweeps_is_imported_by_sweeps_only(path: Path) -> None:
    if layer_of(path) != "sweeping":
        assert "optuna" not in {n.split(".")[0] for n in imports(ast.parse(path.read_text()))}
