"""Grid worlds drawn as text: `GridWorld`, and two well-known ones, `Cliff` and `FourRooms`."""

from __future__ import annotations

from pathlib import Path

import torch
from gymnasium.spaces import Discrete
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.distributions import SparseCategorical
from inference_rl.environment import EnvironmentModel, GridLayout

MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))
"""(row, column) steps left, down, right, up, FrozenLake's order; neighbours are perpendicular."""

RUSSELL_NORVIG = """
...G
.#.H
S...
"""

CLIFF = """
............
............
............
SCCCCCCCCCCG
"""

FOUR_ROOMS = """
#############
#S    #     #
#     #     #
#           #
#     #     #
#     #     #
## ####     #
#     ###G###
#     #     #
#     #     #
#           #
#     #     #
#############
"""


class GridWorld(EnvironmentModel):
    """A walk over a map, on ground that may be slippery.

    | character    | cell                                                                    |
    |--------------|-------------------------------------------------------------------------|
    | `S`          | start: one, or several of equal probability                             |
    | `G`          | goal: entering it pays `goal_reward` and ends the episode               |
    | `H`          | hole: entering it pays `hole_reward` and ends the episode               |
    | `C`          | cliff: entering it pays `cliff_reward`; the walk goes on from the start |
    | `#`          | wall: whoever walks into it, or off the map, stays where they are       |
    | `.` or space | free: a step that ends here, or on a start, pays `step_reward`          |

    State s is the cell in row s // columns, column s % columns; actions are left, down, right, up.
    A cliff cell is the start under another name: whoever stands there moves as from the start. So
    the way back takes no time, and what a step pays depends on where it ends and on nothing else.

    :param text: the map, rows of equal length. The default is the 4x3 world of Russell & Norvig,
        "Artificial Intelligence: A Modern Approach" (3rd ed.), fig. 17.1, which also charges
        `step_reward` for the step into G or H.
    :param slip: probability, in [0, 1], that a move goes to the side instead: half of it to each of
        the two perpendicular directions. FrozenLake's default ice is 2/3.
    :param goal_reward, hole_reward, cliff_reward, step_reward: what a step pays, by where it ends,
        in reward units; tensors keep their gradient.
    :param discount: in [0, 1], per step.
    """

    action_labels = ("left", "down", "right", "up")

    def __init__(
        self,
        *,
        text: str = RUSSELL_NORVIG,
        slip: float = 0.2,
        goal_reward: float | Tensor = 1.0,
        hole_reward: float | Tensor = -1.0,
        cliff_reward: float | Tensor = -100.0,
        step_reward: float | Tensor = -0.04,
        discount: float = 0.99,
    ) -> None:
        rows, columns, cells = _read_map(text)
        if not 0 <= slip <= 1:
            raise ValueError(f"GridWorld: slip must be a probability in [0, 1], got {slip}")
        if not 0 <= discount <= 1:
            raise ValueError(f"GridWorld: discount must be in [0, 1], got {discount}")
        rewards = (goal_reward, hole_reward, cliff_reward, step_reward)
        for name, reward in zip(("goal", "hole", "cliff", "step"), rewards, strict=True):
            if not torch.isfinite(torch.as_tensor(reward)):
                raise ValueError(f"GridWorld: {name}_reward must be a finite number, got {reward}")
        self.state_space, self.action_space = Discrete(rows * columns), Discrete(len(MOVES))
        self.discount = discount
        self.layout = GridLayout(rows, columns, MOVES, cells)

        codes = torch.frombuffer(bytearray(cells, "ascii"), dtype=torch.uint8)
        goal, hole, cliff, wall, start = (codes == ord(cell) for cell in "GHC#S")
        self.starts = start.nonzero().squeeze(-1)
        # Walls are never entered; as terminal states they cost no solver any thought.
        self.ended = goal | hole | wall
        self.pay = torch.empty(codes.shape, dtype=torch.float64)
        self.pay[:] = step_reward
        self.pay[goal], self.pay[hole], self.pay[cliff] = goal_reward, hole_reward, cliff_reward
        self.neighbours = _neighbours(rows, columns, wall)
        self.neighbours[cliff] = self.neighbours[self.starts[0]].clone()

        turns = torch.tensor([0, -1, 1])
        probs = torch.tensor([1 - slip, slip / 2, slip / 2], dtype=torch.float64)
        self.turns, self.turn_probs = turns[probs > 0], probs[probs > 0]

    @staticmethod
    def from_file(path: str | Path, **settings: float) -> GridWorld:
        """The world whose map is the text file `path`; `settings` are those of `GridWorld`."""
        return GridWorld(text=Path(path).read_text(encoding="utf-8"), **settings)

    def initial_state(self) -> TorchDistribution:
        return SparseCategorical(self.starts, torch.full(self.starts.shape, 1 / len(self.starts)))

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        directions = (action.unsqueeze(-1) + self.turns) % len(MOVES)
        probs = self.turn_probs.to(torch.get_default_dtype()).expand(directions.shape)
        return SparseCategorical(self.neighbours[state.unsqueeze(-1), directions], probs)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return self.pay[next_state].to(torch.get_default_dtype())

    def terminal(self, state: Tensor) -> Tensor:
        return self.ended[state]


class Cliff(GridWorld):
    """Walk along a cliff, or take the safe way round: 13 steps at best, so a return of −13.

    Sutton & Barto, "Reinforcement Learning: An Introduction" (2nd ed., 2018), example 6.6: each
    step costs 1, a fall 100, undiscounted. Deterministic, unless `slip` makes the edge dangerous.

    :param slip: probability, in [0, 1], of a step to the side.
    """

    def __init__(self, *, slip: float = 0.0) -> None:
        super().__init__(
            text=CLIFF,
            slip=slip,
            goal_reward=-1.0,
            cliff_reward=-100.0,
            step_reward=-1.0,
            discount=1.0,
        )


class FourRooms(GridWorld):
    """Four rooms joined by four hallways; the goal, in the eastern hallway, pays 1.

    Sutton, Precup & Singh (1999), "Between MDPs and semi-MDPs", Artificial Intelligence 112. One
    departure: a slip goes to a perpendicular direction, not to any of the three others.

    :param slip: probability, in [0, 1], of a step to the side.
    :param discount: in [0, 1], per step.
    """

    def __init__(self, *, slip: float = 1 / 3, discount: float = 0.95) -> None:
        super().__init__(
            text=FOUR_ROOMS, slip=slip, goal_reward=1.0, step_reward=0.0, discount=discount
        )


def _read_map(text: str) -> tuple[int, int, str]:
    """Rows, columns and all cells in one string, once they are known to make a map."""
    lines = text.strip("\r\n").splitlines()
    for row, line in enumerate(lines, start=1):
        for column, cell in enumerate(line, start=1):
            if cell not in "SGHC#. ":
                raise ValueError(
                    f"GridWorld: unknown character {cell!r} in row {row}, column {column} of the "
                    "map (counted from 1); cells are S, G, H, C, #, '.' and space, and a map in a "
                    "file is read by GridWorld.from_file"
                )
        if len(line) != len(lines[0]):
            raise ValueError(
                f"GridWorld: the rows of a map must be equally long, but row {row} has {len(line)} "
                f"characters and row 1 has {len(lines[0])}"
            )
    cells = "".join(lines)
    for cell, name in (("S", "start"), ("G", "goal")):
        if cell not in cells:
            raise ValueError(f"GridWorld: the map has no {name}; mark one cell or more with {cell}")
    if "C" in cells and cells.count("S") > 1:
        raise ValueError(
            "GridWorld: a map with a cliff (C) needs exactly one start (S), to which a fall leads, "
            f"got {cells.count('S')}"
        )
    return len(lines), len(lines[0]), cells


def _neighbours(rows: int, columns: int, wall: Tensor) -> Tensor:
    """The state that each move leads to from each state, (S, 4): the same one, if it is blocked."""
    row, column = torch.arange(rows).unsqueeze(-1), torch.arange(columns)
    here = torch.arange(rows * columns)
    table = torch.empty(rows * columns, len(MOVES), dtype=torch.long)
    for action, (down, right) in enumerate(MOVES):
        there = (row + down).clamp(0, rows - 1) * columns + (column + right).clamp(0, columns - 1)
        table[:, action] = torch.where(wall[there.flatten()], here, there.flatten())
    return table
