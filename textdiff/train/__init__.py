"""Training: the loop, its optimizers, averaged weights, checkpoints and the export."""
