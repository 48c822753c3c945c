"""The pieces: pure transformations and wrappers, one subject per file."""
