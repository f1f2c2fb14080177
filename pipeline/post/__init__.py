"""Checkpoints to weights, G_LM, a certificate of its invariance, and a bundle."""
