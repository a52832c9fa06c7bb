"""Answers to prompts: who samples them (one file each), and with their verdicts."""
