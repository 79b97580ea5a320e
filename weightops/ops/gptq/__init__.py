"""GPTQ: the solver, its grid and Hessians, and the tensors of a packed layer."""
