"""The room of the data: tasks, tokens, and who gets which examples. Only importer of `datasets`."""
