"""Batches of m classes with k samples each: an order that is a pure function of (seed, global sample number), O(1) to seek.

Sample n is the (n mod k)-th of visit n // k. Visits go through all classes in a keyed order, and then through all again in another; on
its v-th visit a class gives the samples v k ... v k + k - 1 of an endless keyed order of its own, which repeats none before all have
been. So a batch of m k samples holds m different classes, but for a batch in which one round of the classes ends and the next begins.
"""

import numpy as np

from jaxvl.data.keyed import mix, permute
from jaxvl.data.order import REPLACE

CLASSES, MEMBERS = 8, 9  # what a key is for; order.py, mixing.py and prepare.py have the others


class Balanced:
    """at(n int64 [b]) -> sample ids int64 [b]; replace(n, attempt) -> the id of a substitute for sample n, of its own class."""

    def __init__(self, seed: int, labels: np.ndarray, per_class: int) -> None:
        """labels: int32 [sample], every class from 0 up with at least one. Raises ValueError for `per_class` below 1."""
        if per_class < 1:
            raise ValueError(f"data.per_class is {per_class}; it must be at least 1, or 0 for a random order")
        self.seed, self.per_class = seed, per_class
        self.members = np.argsort(labels, kind="stable")
        self.sizes = np.bincount(labels)
        self.starts = np.append(0, np.cumsum(self.sizes))[:-1]

    def class_of(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The class of sample n, and which visit of it this is."""
        visit = np.asarray(n, np.int64) // self.per_class
        lap, place = visit // len(self.sizes), visit % len(self.sizes)
        return permute(place, np.full_like(place, len(self.sizes)), mix(self.seed, CLASSES, lap)), lap

    def at(self, n: np.ndarray) -> np.ndarray:
        n = np.asarray(n, np.int64)
        label, lap = self.class_of(n)
        turn = lap * self.per_class + n % self.per_class
        size = self.sizes[label]
        member = permute(turn % size, size, mix(self.seed, MEMBERS, label, turn // size))
        return self.members[self.starts[label] + member]

    def replace(self, n: int, attempt: int) -> int:
        label = int(self.class_of(np.array([n]))[0][0])
        member = int(mix(self.seed, REPLACE, n, attempt)[0] % np.uint64(self.sizes[label]))
        return int(self.members[self.starts[label] + member])
