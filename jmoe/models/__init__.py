"""WHAT is computed: pure maths of a decoder. Knows nothing of files or of where weights live."""
