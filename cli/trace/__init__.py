"""dynacut trace: what its command line asks for, one run of it, and sets of logs."""
