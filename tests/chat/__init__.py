"""Turns: what stops, what stays, and what a plugin can't break."""
