"""Raw dumps to clean text and token shards, on datatrove."""
