"""What systems have in different ways, or not at all: the only place that asks which of their calls are there.

    machine.py    cores, memory, processes
    files.py      open files: positioned reads and writes, room on disk, locks
    entries.py    what stands in folders: renames that replace nothing, exchanges, links that are not followed
    names.py      which names a system can hold, and which of them it takes for one

Each call has a plain form for systems without it. Failures are `OSError`, as the system says them.
"""
