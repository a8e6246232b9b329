"""Methods of unlearning, each in a file."""
