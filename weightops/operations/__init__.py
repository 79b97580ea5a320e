"""One module per verb: pure functions from checkpoints and options to a checkpoint or a report."""
