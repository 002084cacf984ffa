"""Preparation of raw data: readers yield records, an encoder turns them into samples, a job writes shards in parallel."""
