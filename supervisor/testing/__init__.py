"""For programs that embed or extend Tenantry: fixtures, an in-memory launcher, and agents with one fault each."""
