"""Programs in the place of gcloud, SLURM, Kubernetes and an installed Python: they record and keep state."""
