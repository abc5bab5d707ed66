"""What measured the project: see README.md. Run from the root of the repository, `python -m experiments.evidence`."""
