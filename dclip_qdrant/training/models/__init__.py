"""Models of the training wing."""
