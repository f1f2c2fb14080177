"""What a configuration lets a sequence see of its own future, beyond what a learned G_LM shows anyway."""

from __future__ import annotations

from pipeline.config.run import RunConfig


def around_the_circle(config: RunConfig) -> str | None:
    """`train.g_from: neighbor` lends each sequence the G of the next one, which in layer 2 depends on the one after that; after
    as many layers as the micro batch has sequences it is the sequence's own. One line where that happens, with the fix."""
    layers, sequences = config.model.num_layers, config.train.micro_batch
    if config.train.g_from != "neighbor" or sequences > layers:
        return None
    return (
        f"train.g_from neighbor: G goes around {sequences} sequences in {layers} layers, so that each can see its own future "
        f"through G; set train.micro_batch above model.num_layers, {layers + 1} or more"
    )
