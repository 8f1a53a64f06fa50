"""dynacut trim: its command line, its steps, the service it works on, and what it has come to."""
