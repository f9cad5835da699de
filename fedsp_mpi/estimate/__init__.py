"""Parameters, memory, FLOPs, bytes and hours of an experiment before it is run."""
