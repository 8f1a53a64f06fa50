"""ELF files and the code in them: by module offset, without a target."""
