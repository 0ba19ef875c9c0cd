"""What clients reach: the accept loop, HTTP, the upgrade's way to the agent, and the bytes in between."""
