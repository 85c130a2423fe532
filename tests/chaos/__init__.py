"""Faults made on purpose under load, with the same history and the same judge as `tests.load`."""
