"""What it takes to write the report of a large run, and to open it."""
