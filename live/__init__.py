"""The live backend: applies a patch set to a running process, by ptrace or through gdb, and traces its code."""
