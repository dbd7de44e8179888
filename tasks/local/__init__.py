"""Servers of this machine: Prefect, MLflow, a worker, the kept retriever, and the settings that point at them."""
