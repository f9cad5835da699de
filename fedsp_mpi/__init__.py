"""FedSP on MPI: federated tuning of soft prompts, where the large model never leaves its owner and the text never leaves its."""

__version__ = "0.1.0"
