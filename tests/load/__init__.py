"""Load against real processes: every figure the README gives, and the one judge of what a run remembers.

`history` is what a run writes down, `checker` judges it afterwards and knows nothing else. `client`, `sockets`
and `streams` make the load; `hosts` starts what is loaded, `bare` is what it is compared with, `desk` speaks the
host's JSON. Every other module is one run: `python -m tests.load.NAME [--short]`.
"""
