"""Action of any group by permutations of the places of an axis."""

import numpy as np
import torch
from torch import Tensor

from mechatlas.maths.actions import Action, Points
from mechatlas.maths.groups import Group


class Permute(Action):
    """Content i of an axis, counted from the end, goes to `permutations[element, i]`."""

    name = "permute"
    keeps_neighbors = False

    def __init__(self, group: Group, permutations: np.ndarray, *, axis: int = -1) -> None:
        self.group, self.axis = group, axis
        self.permutations = permutations.astype(np.int64)
        self.moves_places = axis == -1

    def act(self, element: int, x: Tensor) -> Tensor:
        inverse = self.permutations[self.group.inverses[element]]
        return x.index_select(self.axis, torch.from_numpy(inverse))

    def moved(self, element: int, points: Points, side: int) -> Points:
        if not self.moves_places:
            return points
        at = self.permutations[element][points[:, 1].astype(np.int64)]
        return np.stack([points[:, 0], at.astype(np.float64)], axis=1)
