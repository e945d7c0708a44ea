"""Checkpoints and runs that are damaged, or made to do harm: what they were, or an error by name.

`damage.py` tries it out, in a process whose every import, file and socket an audit hook sees.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from summing import contents, run

from inference_rl import runs
from inference_rl.diagnostics.page import save
from inference_rl.learning import checkpoints


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_damage_is_named_and_nothing_else_happens(every: int, tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("damage.py"))
    ran = subprocess.run(
        [sys.executable, script, str(tmp_path), str(every)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["checkpoint"]["the one before"] * every > 1400
    assert told["run"]["refused"] * every > 1000
    assert sum(told["attack"].values()) >= 30


def test_what_is_edited_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, {"x": torch.zeros(2)})
    manifest = tmp_path / f"checkpoints/{1:012d}/run.json"
    manifest.write_text(manifest.read_text().replace('"steps": 1', '"steps": 2'))
    with (
        pytest.warns(UserWarning, match="is skipped: .*is damaged, or was edited"),
        pytest.raises(ValueError, match="every checkpoint in it is damaged; infer again, into"),
    ):
        checkpoints.load(tmp_path)


def test_old_checkpoints_that_are_links_lead_nowhere(tmp_path: Path) -> None:
    """Of two runs, one of which links to a checkpoint of the other, neither harms the other."""
    other, own = tmp_path / "other", tmp_path / "own"
    checkpoints.save(other, 1, {"x": torch.zeros(2)})
    before = contents(other)
    checkpoints.save(own, 5, {"x": torch.ones(2)})
    for steps in (1, 2):
        (own / f"checkpoints/{steps:012d}").symlink_to(other / f"checkpoints/{1:012d}")
    checkpoints.save(own, 6, {"x": torch.ones(2)})
    assert contents(other) == before
    assert [path.name for path in sorted((own / "checkpoints").iterdir())] == [
        f"{steps:012d}" for steps in (5, 6)
    ]


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "metrics.jsonl.partial", f"checkpoints/{8:012d}/run.json.partial"]
)
def test_nothing_is_written_through_a_link(name: str, tmp_path: Path) -> None:
    own, victim = tmp_path / "run", tmp_path / "victim"
    victim.write_text("mine")
    (own / name).parent.mkdir(parents=True)
    (own / name).symlink_to(victim)
    if name == "metrics.jsonl":  # is replaced, and the link with it
        run(own)
    else:
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            run(own)
    assert victim.read_text() == "mine"


def test_whether_a_directory_can_be_written_is_not_tried_through_a_link(tmp_path: Path) -> None:
    own, outside = tmp_path / "run", tmp_path / "outside"
    own.mkdir()
    (own / ".writable").symlink_to(outside)
    with pytest.raises(OSError, match=r"run cannot be written \(Too many levels of symbolic links"):
        runs.directory_for(own)
    assert not outside.exists()


def test_no_picture_is_drawn_through_a_link(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    victim, picture = tmp_path / "victim", tmp_path / "policy.png"
    victim.write_text("mine")
    picture.symlink_to(victim)
    save(Figure(figsize=(1, 1)), picture)
    assert victim.read_text() == "mine"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_metrics_are_added_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, victim = tmp_path / "run", tmp_path / "victim"
    own.mkdir()
    victim.write_text("mine")
    save = checkpoints.save

    def exchanged(*given: object) -> None:
        save(*given)  # type: ignore[arg-type]
        (own / "metrics.jsonl").unlink()
        (own / "metrics.jsonl").symlink_to(victim)

    monkeypatch.setattr(checkpoints, "save", exchanged)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        run(own)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": null}', "[" * 100_000])
def test_a_damaged_note_of_the_time_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / runs.TIMING).write_text(text)
    with pytest.raises(ValueError, match=r"timing\.json is damaged \(.*\); remove it"):
        runs.read_seconds(tmp_path)
