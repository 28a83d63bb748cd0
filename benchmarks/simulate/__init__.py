"""What runs would take by simulation, beside what they took."""
