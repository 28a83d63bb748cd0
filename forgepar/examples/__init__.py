"""Small complete programs, to import or to run from the command line."""
