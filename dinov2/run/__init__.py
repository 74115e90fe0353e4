"""Running the entry points on a Slurm cluster."""
