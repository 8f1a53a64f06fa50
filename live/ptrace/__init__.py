"""The ptrace engine: threads stopped one at a time, and system calls made by the process itself."""
