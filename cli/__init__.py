"""The dynacut command: a module or a folder for each subcommand, no logic of its own."""
