"""From an accepted message to a stored reply: intake, turns in order, the onion, who hears of it.

Leaves to others: how a door speaks (web), what is on disk (backend), how plugins come and go (runtime).
"""
