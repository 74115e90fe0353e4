"""Which images: the order of training, a pure function of (seed, iteration), and samples spread evenly."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from utils.text import count_of


def spread_evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` numbers from 0, spread evenly: int64, rising."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


class IterationSampler:
    """Yields (iteration, indices) from start_iteration on, up to stop_iteration (None: without end).

    The global stream is one permutation of the n images after another, each keyed by (seed, number of the pass);
    iteration i takes its positions [i * batch_size, (i + 1) * batch_size), and a rank its contiguous part of those. So
    a run resumes at any iteration, on any number of ranks, with the same images. A batch may be larger than the set.

    batch_size: images of one iteration over all ranks. ValueError where ranks do not divide it or outnumber the images;
    option: what the user writes before that number.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_iteration: int = 0,
        stop_iteration: int | None = None,
        option: str = "train.batch_size=",
    ):
        assert 0 <= rank < world_size
        if world_size > n:
            raise ValueError(f"{world_size} ranks for {count_of(n, 'image')}: start at most {count_of(n, 'rank')}.")
        if batch_size % world_size:
            raise ValueError(f"{option}{batch_size} is not a multiple of the {world_size} ranks.")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start_iteration, self.stop_iteration = start_iteration, stop_iteration
        self._permutation = lru_cache(maxsize=2)(self._draw)  # a batch seldom touches more than two passes

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        iteration = self.start_iteration
        while self.stop_iteration is None or iteration < self.stop_iteration:
            yield iteration, self.indices(iteration)
            iteration += 1

    def positions(self, iteration: int) -> range:
        """Places in the global stream of this rank's images at an iteration."""
        rank_batch_size = self.batch_size // self.world_size
        first = iteration * self.batch_size + self.rank * rank_batch_size
        return range(first, first + rank_batch_size)

    def indices(self, iteration: int) -> list[int]:
        """Indices of this rank's images at an iteration."""
        positions = (divmod(position, self.n) for position in self.positions(iteration))
        return [int(self._permutation(number)[place]) for number, place in positions]

    def _draw(self, number: int) -> np.ndarray:
        return np.random.default_rng((self.seed, number)).permutation(self.n)
