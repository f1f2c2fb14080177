"""What a person types: one file per group of verbs, each with its parser and the functions behind it.

In: `launch.backends` and `pipeline`, imported inside the functions that need them, so that `pldr --help` stays fast.
Out: an `add_*_verbs` per file, which `launch/cli.py` calls; each verb's function returns the result that --json prints.
"""
