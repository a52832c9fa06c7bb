"""A reward model is judged on ProcessBench: scores made once and kept, numbers and tables from what was kept."""
