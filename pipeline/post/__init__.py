"""From a checkpoint to a certified bundle: consolidate, extract G_LM, validate, bundle, serve."""
