"""Files and folders of others: whose they are, what is in them, and whether it changed."""
