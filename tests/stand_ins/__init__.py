"""Programs that stand in for gcloud, SLURM, Kubernetes and an installed Python: they record and keep state."""
