"""The passage store: Arrow shards on disk, read by row or by id without loading them."""
