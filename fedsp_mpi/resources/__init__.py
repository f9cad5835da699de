"""What the embedded default needs: `model/`, a tiny GPT-2, and `data/`, questions about the world
it was trained on.

Nothing here is read at import. `make_embedded.py` makes both folders from one seed:
`python -m fedsp_mpi.resources.make_embedded DEST`.
"""
