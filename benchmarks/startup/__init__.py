"""What it takes until something runs."""
