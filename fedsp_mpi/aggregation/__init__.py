"""Rules that make one prompt of many: pure functions over columns of values, in the order of client
ids.
"""
