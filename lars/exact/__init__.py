"""What makes a run the same everywhere: keyed random numbers, order-free sum, batch-norm groups, instruction set."""
