"""Files and folders that others may have written or changed: ownership, limits, digests."""
