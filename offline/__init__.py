"""The offline backend: CRIU checkpoints, made, restored and rewritten."""
