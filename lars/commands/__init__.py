"""What works on this repository, a verb of the command `lars` each."""
