"""What needs both backends: comparing them, falling back from one to the other, removing start-up code."""
