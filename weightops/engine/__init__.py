"""Running a plan: streaming, threads, commit, resume."""
