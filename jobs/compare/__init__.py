"""Every way to apply a plan, measured on one process under the eyes of its clients."""
