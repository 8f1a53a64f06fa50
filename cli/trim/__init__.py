"""dynacut trim: what its command line asks for, and its report."""
