"""One file an algorithm: it answers the round's questions and knows no rank, no communicator, no
file.
"""
