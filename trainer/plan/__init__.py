"""What memory the phases of a configuration need, known before anything is loaded."""
