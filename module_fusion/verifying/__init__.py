"""What `verify` is made of: runs that are watched, differences, judging, the report."""
