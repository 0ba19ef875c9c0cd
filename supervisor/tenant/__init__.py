"""One tenant: its life as a table, its ladder, its idleness, and the nursery that owns its agent."""
