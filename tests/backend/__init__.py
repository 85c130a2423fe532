"""The journal on disk: what it keeps, and what happens when the disk or the file does not."""
