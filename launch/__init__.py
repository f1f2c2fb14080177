"""The `pldr` command and the ways a training job is started."""

import os

# Before torch is loaded: threads that wait for one another sleep instead of spinning. On a busy machine with few cores
# spinning made the validate stage take twice as long; on an idle one it makes no difference that we could measure.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
