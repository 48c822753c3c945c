"""The pieces: pure transformations and wrappers, one subject a file."""
