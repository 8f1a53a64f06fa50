"""dynacut live: what its command line asks for, the engine, and the way around a refusal."""
