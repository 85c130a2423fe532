"""All runs of `tests.load` and `tests.chaos`, one after the other: `python -m tests.bench [--short] [NAME]...`."""
