"""The `pldr` command line and the ways a training job is started.

In: `pipeline`, its stages above all, and what a person types.
Out: the console script `pldr` (`launch.entry:main`).
"""

import os

# Before torch is loaded: threads that wait for one another sleep instead of spinning. On two cores kept busy by others
# spinning made the validate stage take 18 s instead of 9 (2026-11-24).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
