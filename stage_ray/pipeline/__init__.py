"""The pipeline of the driver: prompts are drawn, groups are admitted into slots, generated, scored, trained."""
