"""A user's own handler library: read, relocated against a target, ready to be mapped."""
