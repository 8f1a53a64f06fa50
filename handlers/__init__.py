"""The in-process side: the SIGTRAP handler, the layout of its table, and the build of the handler."""
