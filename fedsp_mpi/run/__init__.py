"""One experiment from start to end, on every rank."""
