"""The gdb engine: the same patch sets, applied to a process that gdb holds, here or behind a gdbserver."""
