"""Federated LoRA fine-tuning under differential privacy, run as a reproducible experiment.

The science is in this package and needs neither Prefect nor DVC nor MLflow: `fedpipe.steps`
runs whole rounds. `flows` and `tasks` put Prefect around it, `fedpipe.tracking` MLflow.
"""
