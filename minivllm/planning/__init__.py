"""How much fits into a memory, and how much of it is wasted: calculated without running a model."""
