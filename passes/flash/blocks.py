"""Which blocks of an attention matrix have to be computed at all."""

import math

import numpy as np

from compax.passes.flash.spec import Pattern


def even_block(length: int, wanted: int, multiple: int = 8) -> int:
    """A block size of at most about `wanted` that cuts a length into equal parts with as little left over as can be."""
    if length <= wanted:
        return length
    count = math.ceil(length / wanted)
    return math.ceil(math.ceil(length / count) / multiple) * multiple


def block_pairs(pattern: Pattern, lengths: tuple[int, int], blocks: tuple[int, int]) -> np.ndarray:
    """The pairs of a block of queries and a block of keys of which some query sees some key, queries first.

    Args:
        pattern: which keys queries see.
        lengths: number of queries and keys.
        blocks: size of their blocks; the last one may be cut off.

    Returns:
        int32[number of pairs, 2].
    """
    (num_queries, num_keys), (block_q, block_k) = lengths, blocks
    num_rows, num_columns = math.ceil(num_queries / block_q), math.ceil(num_keys / block_k)
    found = np.zeros((num_rows, num_columns), bool)
    if pattern.kind == "other":
        whole = pattern.matrix(num_queries, num_keys)
        padded = np.zeros((num_rows * block_q, num_columns * block_k), bool)
        padded[:num_queries, :num_keys] = whole
        found = padded.reshape(num_rows, block_q, num_columns, block_k).any((1, 3))
    else:
        first, last = (np.clip(edge, 0, num_keys) for edge in pattern.span(num_queries))
        for row in range(num_rows):
            own = slice(row * block_q, (row + 1) * block_q)
            some = last[own] > first[own]
            if some.any():
                start, stop = int(first[own][some].min()), int(last[own][some].max())
                found[row, start // block_k : math.ceil(stop / block_k)] = True
    return np.argwhere(found).astype(np.int32)


def needs_mask(pattern: Pattern, lengths: tuple[int, int], blocks: tuple[int, int]) -> bool:
    """Whether any block that is computed has a pair in it that is not seen."""
    uneven = lengths[0] % blocks[0] or lengths[1] % blocks[1]
    return bool(uneven) or pattern.kind != "full"
