"""One RL step in its parts; step.py has them in their order."""
