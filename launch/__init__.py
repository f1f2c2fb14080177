"""The `pldr` command and the ways a training job is started."""
