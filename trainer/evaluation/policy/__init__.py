"""A policy is judged: its answers, how many are right, what choosing among them is worth, its candidates."""
