"""Where an agent runs: the keeper that is its parent, and the launchers that confine it."""
