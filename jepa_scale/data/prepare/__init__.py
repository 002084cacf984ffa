"""From raw data to shards: readers give records, an encoder makes samples of them, a job writes shards in parallel."""
