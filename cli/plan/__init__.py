"""dynacut plan: what its command line asks for, and what it has found."""
