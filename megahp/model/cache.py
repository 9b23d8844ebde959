"""Keys and values of tokens that a model has read, so that the tokens after them can be computed alone."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Cache:
    """Keys and values of every block, of the first `length` tokens of the sequences.

    They are those after norm and rotary positions: valid as long as the sequences only grow at their end, and as long
    as ALiBi's slopes, which are interpolated beyond the longest sequence trained on, do not change.

    capacity: the most tokens; memory for them is allocated at the first ones.
    """

    capacity: int
    length: int = 0
    blocks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extend(self, block: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a block's keys and values of the next tokens, [b, kv heads, s, head_size]; return those of all tokens,
        [b, kv heads, length + s, head_size]. Raises RuntimeError beyond the capacity."""
        if block not in self.blocks:
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            self.blocks[block] = key.new_empty(shape), value.new_empty(shape)
        for kept, new in zip(self.blocks[block], (key, value), strict=True):
            kept.narrow(2, self.length, new.shape[2]).copy_(new)  # not by a slice, which would end at the capacity
        keys, values = (kept[:, :, : self.length + key.shape[2]] for kept in self.blocks[block])
        return keys, values

    @property
    def bytes(self) -> int:
        """The memory that is allocated."""
        return sum(kept.nbytes for both in self.blocks.values() for kept in both)

    def repeated(self, samples: int) -> "Cache":
        """Return the cache of `samples` copies of the sequences, those of each in a row."""
        blocks = {
            block: (keys.repeat_interleave(samples, 0), values.repeat_interleave(samples, 0))
            for block, (keys, values) in self.blocks.items()
        }
        return Cache(self.capacity, self.length, blocks)
