"""The vocabulary cut into blocks.

A block is a residue class: with G blocks, block g holds the ids g, g + G, g + 2G, ...  Any partition would
do, and this one turns both reductions into sums of whole vectors, with nothing to add up across a vector
register. The sums of a block are relative to its own maximum: none underflows, a block can be exchanged for what is
left of it, and maxima and sums need the logits once.

N: rows, G: blocks of a row, J: entries in a block, K: tail nodes.
"""

from typing import NamedTuple

import torch

BLOCK = 32
"""J: long enough that block data are small, short enough that few entries are gathered."""
LOWEST = torch.finfo(torch.float32).min
"""For a maximum of -inf, of which nothing can be taken."""


class Blocks(NamedTuple):
    """Every block of some rows."""

    maxima_NG: torch.Tensor
    """float32; -inf where nothing in the block is possible."""
    sums_NKG: torch.Tensor
    """float32: sums over the block of exp(beta * (l - maximum)); 0 where nothing in it is possible."""


def num_blocks(vocab_size: int) -> int:
    """G: as few as hold the vocabulary.  The last stripe of G ids may be short."""
    return -(-vocab_size // BLOCK)
