"""A permutation of range(n) by name, computed for each index alone: nothing is drawn, built or stored."""

import hashlib
import math
from typing import TypeVar

import numpy as np

Indices = TypeVar("Indices", int, np.ndarray)

# After 6 rounds no test tells permutations of 1,030 elements or more from random ones. Of few elements more rounds are
# needed until all n! permutations are equally likely: of 5 or 6, chi-square tests tell 8 rounds, and not 16.
ROUNDS, ROUNDS_OF_SMALL, SMALL = 6, 24, 1 << 10


class Permutation:
    """The permutation of range(n) that a name stands for, always the same one.

    A Feistel network on the two digits of an index in mixed radix, rows x columns >= n: each round adds a hash of one
    digit to the other. An index that lands beyond n is sent through again (Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002). All of it is integer arithmetic, the same in every version of Python and numpy.
    """

    def __init__(self, n: int, name: str) -> None:
        self._n, self._rows = n, math.isqrt(n - 1) + 1
        self._columns = -(-n // self._rows)
        self._keys = words_of(name, ROUNDS if n > SMALL else ROUNDS_OF_SMALL)

    def at(self, i: Indices) -> Indices:
        """Return the element at each place i: an int, or uint32 [any] where n < 2^32."""
        rows, columns = self._rows, self._columns
        row, column = i // columns, i % columns
        for number, key in enumerate(self._keys):
            if number % 2:
                column = (column + mix(row ^ key) % columns) % columns
            else:
                row = (row + mix(column ^ key) % rows) % rows
        j: Indices = row * columns + column
        if isinstance(j, int):
            return j if j < self._n else self.at(j)
        beyond = j >= self._n
        if beyond.any():
            j[beyond] = self.at(j[beyond])
        return j

    def places(self, j: np.ndarray) -> np.ndarray:
        """Return the place of each element j, uint32 [any], where n < 2^32: the inverse of `at`."""
        rows, columns = self._rows, self._columns
        row, column = j // columns, j % columns
        for number, key in reversed([*enumerate(self._keys)]):
            if number % 2:
                column = (column + (columns - mix(row ^ key) % columns)) % columns
            else:
                row = (row + (rows - mix(column ^ key) % rows)) % rows
        i = row * columns + column
        beyond = i >= self._n
        if beyond.any():
            i[beyond] = self.places(i[beyond])
        return i


def words_of(name: str, count: int) -> list[int]:
    """Return pseudorandom numbers below 2^32 that a name stands for."""
    words: list[int] = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * count), "<u4").tolist()
    return words


def mix(x: Indices) -> Indices:
    """Return a hash of each x below 2^32, one to one on these (lowbias32 of github.com/skeeto/hash-prospector)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)
