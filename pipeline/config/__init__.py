"""The configuration of a run: what each key is called, may be, means, and decides.

In: a YAML, the one it extends, and overrides. Imports `pipeline.io.urls` and the errors, and of the model its configuration.
Out: a checked, frozen `RunConfig` (load.py), what its keys mean (keys.py), the run's paths, its schedule and its plan.
"""
