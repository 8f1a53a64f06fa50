"""dynacut offline: what its command line asks for, and what only an image shows."""
