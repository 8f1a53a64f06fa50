"""CRIU's images: read as a target, changed in memory, written as a layer or as a copy."""
