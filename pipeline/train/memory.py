"""Out of memory: what was in it, written down before the rank ends.

`logs/memory/rank-N.txt`: the tensors alive, largest first, parameters by name. On a GPU also `rank-N.pickle`, the allocator's
blocks, which https://pytorch.org/memory_viz draws (we write it and never read it); with `train.memory_history` it says which
line of code asked for each block. What autograd keeps for the backward pass is not in the list: only the totals show it.
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)
