"""Federated tuning of soft prompts on MPI: the large model stays with its owner, and so does the
text.
"""

__version__ = "0.1.0"
