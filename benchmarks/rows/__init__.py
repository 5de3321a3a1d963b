"""The rows of run.py's table: each module holds a group, functions of (quick, scratch) that yield entries."""
