"""Plugins from the file to the snapshot: watch, load, swap, call, release.

Leaves to others: what a turn is (chat), how a change is asked for over HTTP (web), where kv lives (backend).
"""
