"""What may be asked of an op, by family, and the errors that say what may not."""
