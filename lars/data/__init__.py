"""From Parquet files to the samples of a pass."""
