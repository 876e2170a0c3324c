"""From files to training data: readers of files, corpora of documents, packing into shards."""
