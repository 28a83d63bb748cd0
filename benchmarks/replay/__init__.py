"""Workflows of real runs, replayed with their own durations, beside what a perfect engine would take."""
