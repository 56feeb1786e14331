"""What training costs: memory, the time of a step, of a resume and of loading data."""
