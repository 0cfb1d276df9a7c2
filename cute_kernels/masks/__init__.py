"""Which keys a query sees, and how scores of the others are hidden."""
