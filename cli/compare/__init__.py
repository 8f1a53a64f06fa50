"""dynacut compare: what its command line asks for, one step that it runs by itself, and how the results are told."""
