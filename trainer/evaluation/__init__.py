"""What a run is judged by: step localisation, candidate credit, policy accuracy."""
