"""The live backend: applies a patch set to a running process with ptrace and /proc/PID/mem."""
