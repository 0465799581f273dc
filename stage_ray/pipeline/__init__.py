"""What flows: prompts are drawn, groups are admitted into slots that bound their age, generated, scored, trained."""
