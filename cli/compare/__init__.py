"""dynacut compare: what its command line asks for, the comparison itself, and how it is told."""
