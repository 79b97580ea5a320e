"""Methods of merging models: pure functions of tensors and parameters, and the op that runs one block by block."""
