"""What must survive a restart: tenants and their journal."""
