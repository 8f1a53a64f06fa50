"""Coverage of a running process, and programs started to be traced from their first block on."""
