"""The tests of this folder import `promises` by its name."""
