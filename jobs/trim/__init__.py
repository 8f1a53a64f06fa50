"""Start-up code removed from a service: the steps, the service, and what it has come to."""
