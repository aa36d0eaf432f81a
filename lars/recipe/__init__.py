"""What is trained and where: the typed recipe, the launch file, the arithmetic of batches, the schedule."""
