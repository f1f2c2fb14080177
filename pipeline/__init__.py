"""From a corpus to a certified, cached inference bundle: data, training and post-training stages."""
