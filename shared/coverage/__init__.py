"""Which code ran, and what follows from it: logs, sets, suggested plans, start-up code."""
