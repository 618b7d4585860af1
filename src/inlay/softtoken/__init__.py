"""Soft tokens: a long context as a few slots in front of a frozen language model."""
