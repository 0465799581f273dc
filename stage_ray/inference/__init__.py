"""One model drawing pictures without training: evaluated, drawing prompts, or encoding pictures to retrieve from."""
