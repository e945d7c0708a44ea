"""What is installed is what lies in the tree."""

from __future__ import annotations

import importlib
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import inference_rl
from inference_rl.models import grid_world

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    inside = {p.parent for p in (ROOT / "inference_rl").rglob("__init__.py")}
    names = {".".join(p.relative_to(ROOT).parts) for p in inside} | {"inference_rl.models"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names


def test_every_other_file_of_a_package_is_listed() -> None:
    other = [p for p in (ROOT / "inference_rl").rglob("*.*") if p.suffix not in (".py", ".pyc")]
    assert other
    listed = {
        ROOT.joinpath(*package.split(".")) / name
        for package, names in PROJECT["tool"]["setuptools"]["package-data"].items()
        for name in names
    }
    assert set(other) == listed


def test_the_models_folder_is_the_package_inference_rl_models() -> None:
    assert Path(grid_world.__file__).parent.name == "models"
    assert PROJECT["tool"]["setuptools"]["package-dir"]["inference_rl.models"] == "models"


def test_the_version_is_said_once() -> None:
    assert PROJECT["project"]["version"] == inference_rl.__version__


@pytest.mark.parametrize("group", ["models", "priors"])
def test_entry_points_name_what_exists(group: str) -> None:
    declared = PROJECT["project"]["entry-points"][f"inference_rl.{group}"]
    installed = {e.name: e.value for e in entry_points(group=f"inference_rl.{group}")}
    assert declared.items() <= installed.items()
    for value in declared.values():
        module, _, name = value.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_all_public_names_resolve() -> None:
    for name in inference_rl.__all__:
        assert getattr(inference_rl, name).__module__.startswith("inference_rl")
