"""The methods: equations, provenance and a chain of pieces, one method a file."""
