"""Score options and greedy answers as lm-eval defines them, and compute the loss on answers."""
