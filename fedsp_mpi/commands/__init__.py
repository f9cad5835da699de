"""The verbs of the command line besides `run`, a file each."""
