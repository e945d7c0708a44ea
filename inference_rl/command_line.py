"""The words of a command line: what is wrong with them, in one sentence."""

from __future__ import annotations

import difflib
import itertools
import re

from inference_rl.inference import ROUTINES


def complaint(words: list[str], box: str, commands: list[str]) -> str:
    """What is wrong with `words`, of which tyro says `box`, in one sentence."""
    if not words or words[0] not in commands:
        given = f"unknown command {words[0]!r}" if words else "no command"
        close = closest(words[0] if words else "", commands)
        return f"{given}: expected one of {', '.join(commands)}{close}; see inference-rl --help"
    manual = f"see inference-rl {words[0]} --help"
    target, routine, *_ = [*positional(words[1:]), "", ""]
    takes_routine = words[0] in ("infer", "sweep")
    if takes_routine and target and routine not in ROUTINES:
        if target in ROUTINES:
            return f"no target: expected inference-rl {words[0]} TARGET {target}; {manual}"
        given = f"unknown routine {routine!r}" if routine else "no routine"
        return (
            f"{given}: expected inference-rl {words[0]} {target} ROUTINE, where ROUTINE is one of "
            f"{', '.join(ROUTINES)}{closest(routine, list(ROUTINES))}; {manual}"
        )
    # A title, perhaps a rule (of dashes, where the terminal has no better), and what it says.
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()]
    lines = ["" if set(line) == {"-"} else line for line in lines]
    below_title = itertools.dropwhile(lambda line: not line, lines[1:])
    said = " ".join(itertools.takewhile(bool, below_title))
    said = re.sub("^Error parsing (routine: )?", "", said)
    if missing := re.match(r"Missing from .*?: ([A-Z]+) (\w.*)\. \(required\)", said):
        what = missing[2][0].lower() + missing[2][1:]
        usage = f"{words[0]} {missing[1]}" + " ROUTINE" * takes_routine
        return (
            f"no {missing[1]}: expected inference-rl {usage}, {missing[1]} being {what}; {manual}"
        )
    for words_of_python, ours in (
        (r"invalid literal for int\(\) .*?: ('.*?')", "a whole number"),
        (r"could not convert string to float: ('.*?')", "a number"),
    ):
        said = re.sub(words_of_python, rf"expected {ours}, got \1", said)
    meant = re.search(r"Perhaps you meant.*?(--[\w-]+)", box, re.DOTALL)
    is_other = meant is not None and meant[1] not in options(words)
    close = f" (did you mean {meant[1]}?)" if meant is not None and is_other else ""
    return f"{said.strip('.').replace('. Expected', ', expected')}{close}; {manual}"


def options(words: list[str]) -> list[str]:
    """The options among `words`, without their values."""
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def positional(words: list[str]) -> list[str]:
    """What is left of `words` without options and their values; flags have none."""
    found, is_value = [], False
    for word in words:
        if word.startswith("-"):
            is_value = word not in ("--json", "--deterministic") and "=" not in word
        elif is_value:
            is_value = False
        else:
            found.append(word)
    return found


def closest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
