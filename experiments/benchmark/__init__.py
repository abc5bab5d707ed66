"""Speed and memory against context: `python -m experiments.benchmark`."""
