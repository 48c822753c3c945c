"""The methods, one per file: equations, provenance and a chain of pieces."""
