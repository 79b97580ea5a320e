"""`weightops browse`: a checkpoint, or two side by side, to walk through in a terminal."""
