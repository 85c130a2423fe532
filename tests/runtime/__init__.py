"""Plugins from the file to the snapshot, held to design sections 3 and 4."""
