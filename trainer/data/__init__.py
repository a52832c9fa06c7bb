"""Where prompts, gold answers and demonstrations come from: files, the hub, and generated tasks."""
