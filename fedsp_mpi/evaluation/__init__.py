"""Scores: options by log-likelihood and greedy answers as lm-eval defines them, and the loss on
answers.
"""
