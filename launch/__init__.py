"""The `pldr` command line and the ways a training job is started.

In: `pipeline`, its stages above all, and what a person types.
Out: the console script `pldr` (`launch.entry:main`).
"""

import os

from pipeline.environment import prepare

prepare(os.environ)
