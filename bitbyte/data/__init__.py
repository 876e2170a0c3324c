"""What becomes training data: readers of files, corpora of documents, and the pack of shards."""
