"""What `benchmark` is made of: candidates, a stopwatch, statistics, the report."""
