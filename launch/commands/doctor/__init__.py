"""`pldr doctor`: is every node ready to train?

In: `launch.backends.hosts` (hostfile, ssh) and the configuration of a run. `probe.py` and `allreduce.py` run on the hosts.
Out: a table of findings, each with its fix, and the same as JSON.
"""
