"""Worker processes: one desk on one port, served by several.

Owns the supervisor, which starts, restarts and replaces them and serves nobody itself, and what a worker process is
beside the host that it runs. What they serve is `app`'s, what they say to each other `web`'s.
"""
