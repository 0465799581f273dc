"""Supervised actors and rank groups: who is asked, what happens when one is lost. They know no role."""
